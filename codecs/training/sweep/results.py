"""Results of a sweep, read from its folder: runs ranked by a metric, as a table and a CSV file."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import rich.box
from omegaconf import OmegaConf
from optuna.study import StudyDirection
from optuna.trial import TrialState
from rich.table import Table as RichTable

from varitok import UserError

from ...evaluation.table import wide_console, write_rows
from ...modalities.registry import lower_is_better
from ..logging.scalars import read_scalars
from .search import JOURNAL, open_study, trial_name
from .space import short

__all__ = ["Result", "Results", "read_results"]

STATES = {TrialState.COMPLETE: "finished", TrialState.FAIL: "failed", TrialState.PRUNED: "fell behind"}
IRRELEVANT = ("hydra", "logger", "name", "resume")  # keys that don't affect a run's result


class Result(NamedTuple):
    """A run of a sweep.

    Attributes:
        name: Name of the run's folder.
        state: Final state, or the reason of a failure.
        updates: Number of logged updates.
        value: Last value of the metric; None if it has none.
        parameters: Parameters that differ between runs, by key.
    """

    name: str
    state: str
    updates: int
    value: float | None
    parameters: dict[str, str]


class Results(NamedTuple):
    """All runs of a sweep.

    Attributes:
        metric: Metric that ranks them.
        maximize: Whether larger values are better.
        runs: Runs from best to worst, then those without a value.
    """

    metric: str
    maximize: bool
    runs: list[Result]

    def write_csv(self, path: Path) -> None:
        """Write a row for each run."""
        rows = [
            {"run": run.name, "state": run.state, "updates": run.updates, self.metric: _digits(run)} | run.parameters
            for run in self.runs
        ]
        write_rows(path, {"best": f"the {'largest' if self.maximize else 'smallest'} {self.metric}"}, rows)

    def print(self) -> None:
        """Print the table."""
        table = RichTable("run", box=rich.box.SIMPLE_HEAD, collapse_padding=True, pad_edge=False)
        for name in (self.metric, *self.runs[0].parameters, "updates"):
            table.add_column(name, justify="right")
        table.add_column("state")
        for run in self.runs:
            parameters = (short(value) for value in run.parameters.values())
            table.add_row(run.name, _digits(run), *parameters, str(run.updates), run.state)
        wide_console().print(table)


def _digits(run: Result) -> str:
    return "" if run.value is None else f"{run.value:.6g}"


def read_results(folder: Path, metric: str | None = None, maximize: bool | None = None) -> Results:
    """Read the runs of a local sweep, or all runs below a folder, such as those of W&B agents or `--multirun`.

    Args:
        folder: Folder of the sweep, or one that contains runs.
        metric: Metric to rank by; None: the sweep's, or the first metric at the most tokens or codebooks.
        maximize: Whether larger values are better; None: the sweep's goal, or the metric's own.

    Raises:
        UserError: There are no evaluated runs, or none logged the metric.
    """
    if (folder / JOURNAL).is_file():
        study = open_study(folder)
        metric = metric or str(study.user_attrs["metric"])
        maximize = study.direction == StudyDirection.MAXIMIZE if maximize is None else maximize
        found = [
            (folder / trial_name(trial), trial.user_attrs.get("why", STATES.get(trial.state, "cut off")), words)
            for trial in study.get_trials(deepcopy=False)
            if (words := trial.user_attrs.get("words")) is not None
        ]
    else:
        found = _runs(folder)
    logged = [read_scalars(path / "metrics.csv") for path, _, _ in found]
    evaluated = [[name for name in scalars if name.startswith("val/")] for scalars in logged]
    metric = metric or next(filter(None, map(_usual, evaluated)), None)
    if not any(metric in scalars for scalars in logged):
        known = ", ".join(sorted({name for names in evaluated for name in names}))
        lacking = f"no run logged {metric}; there are {known}" if known else "no runs that were evaluated"
        raise UserError(f"{folder}: {lacking}")
    assert metric is not None
    if maximize is None:
        name = metric.removeprefix("val/").partition("@")[0]
        maximize = not lower_is_better(name) and "loss" not in metric
    runs = []
    for (path, end, parameters), scalars in zip(found, logged, strict=True):
        value = next(reversed(scalars.get(metric, {}).values()), None)
        updates = max((max(series) for series in scalars.values()), default=0)
        state = end if isinstance(end, str) else "finished" if updates >= end else "cut off"
        runs.append(Result(path.name, state, updates, value, parameters))
    runs.sort(key=lambda run: (run.value is None, (-1 if maximize else 1) * (run.value or 0)))
    return Results(metric, maximize, runs)


def _usual(evaluated: list[str]) -> str | None:
    """Return the first metric at its largest number of tokens or codebooks."""
    first = next((name.partition("@")[0] for name in evaluated if "@" in name), None)
    return next((name for name in reversed(evaluated) if name.partition("@")[0] == first), None)


def _runs(folder: Path) -> list[tuple[Path, str | int, dict[str, str]]]:
    """Return the runs below a folder: path, configured number of updates, and parameters that differ."""
    paths = sorted(path.parent for path in folder.rglob("config.yaml") if (path.parent / "metrics.csv").is_file())
    flats = [dict(_flat(OmegaConf.to_container(OmegaConf.load(path / "config.yaml")))) for path in paths]
    columns: dict[str, list[str]] = {}
    for key in dict.fromkeys(key for flat in flats for key in flat):
        column = [flat.get(key, "") for flat in flats]
        chosen = any(key.startswith(other.removesuffix("_target_")) for other in columns if other.endswith("_target_"))
        # A differing group replaces all its keys; of keys with identical columns only the first is shown.
        if len(set(column)) > 1 and not chosen and column not in columns.values():
            columns[key] = column
    # A group's option is shown by its class name.
    named = {key.removesuffix("._target_"): (key.endswith("._target_"), column) for key, column in columns.items()}
    return [
        (
            path,
            int(flats[row].get("updates", 0)),
            {key: column[row].rpartition(".")[2] if group else column[row] for key, (group, column) in named.items()},
        )
        for row, path in enumerate(paths)
    ]


def _flat(value: Any, key: str = "") -> Iterator[tuple[str, str]]:
    """Flatten a configuration to dotted keys, `_target_` before the other keys of a group."""
    if isinstance(value, dict):
        for name in sorted(value, key=lambda name: name != "_target_"):
            if key or name not in IRRELEVANT:
                yield from _flat(value[name], f"{key}.{name}" if key else str(name))
    else:
        yield key, str(value)
