"""What a sweep has found, out of the files that it left: rows, their table, their CSV file."""

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

STATES = {
    TrialState.COMPLETE: "finished",
    TrialState.FAIL: "failed",
    TrialState.PRUNED: "fell behind",
    TrialState.RUNNING: "cut off",
}
ASIDE = ("hydra", "logger", "name", "resume")  # of a configuration, what makes no difference


class Result(NamedTuple):
    """A run of a sweep.

    Attributes:
        name: Of its folder.
        state: How it ended, or why it failed.
        updates: That it has done.
        value: Of the metric, the last; None where there is none.
        parameters: What differs from run to run, by key.
    """

    name: str
    state: str
    updates: int
    value: float | None
    parameters: dict[str, str]


class Results(NamedTuple):
    """All runs of a sweep.

    Attributes:
        metric: What they are compared by.
        maximize: Whether a large value is good.
        runs: The best first; then those that have no value.
    """

    metric: str
    maximize: bool
    runs: list[Result]

    def write_csv(self, path: Path) -> None:
        """Write a row for each run."""
        rows = [
            {"run": run.name, "state": run.state, "updates": run.updates, self.metric: _told(run.value)}
            | run.parameters
            for run in self.runs
        ]
        write_rows(path, {"best": f"the {'largest' if self.maximize else 'smallest'} {self.metric}"}, rows)

    def print(self) -> None:
        """Print the table."""
        table = RichTable(box=rich.box.SIMPLE_HEAD, collapse_padding=True, pad_edge=False)
        table.add_column("run")
        for name in (self.metric, *self.runs[0].parameters, "updates"):
            table.add_column(name, justify="right")
        table.add_column("state")
        for run in self.runs:
            parameters = (short(value) for value in run.parameters.values())
            table.add_row(run.name, _told(run.value), *parameters, str(run.updates), run.state)
        wide_console().print(table)


def read_results(folder: Path, metric: str | None = None, maximize: bool | None = None) -> Results:
    """Read the runs of a local sweep, or any runs below a folder: of W&B's agents, of Hydra's `--multirun`.

    Args:
        folder: The sweep's, or one above the runs'.
        metric: What they are compared by; None: what the sweep was by, or the first metric at the most tokens or books.
        maximize: Whether a large value is good; None: what the sweep said, or what is known of the metric.

    Raises:
        UserError: There are no runs, or none logged the metric.
    """
    if (folder / JOURNAL).is_file():
        study = open_study(folder)
        metric = metric or str(study.user_attrs["metric"])
        if maximize is None:
            maximize = study.direction == StudyDirection.MAXIMIZE
        found = [
            (folder / trial_name(trial), trial.user_attrs.get("why", STATES.get(trial.state, "cut off")), words)
            for trial in study.get_trials(deepcopy=False)
            if (words := trial.user_attrs.get("words")) is not None
        ]
    else:
        found = list(_runs(folder))
    logged = {path: read_scalars(path / "metrics.csv") for path, _, _ in found}
    metric = metric or next((name for path in logged for name in _last(logged[path])), None)
    if metric is None or not any(metric in values for values in logged.values()):
        known = sorted({name for values in logged.values() for name in values if name.startswith("val/")})
        lacking = f"no run logged {metric}; there are {', '.join(known)}" if known else "no runs that were evaluated"
        raise UserError(f"{folder}: {lacking}")
    if maximize is None:
        name = metric.removeprefix("val/").partition("@")[0]
        maximize = not lower_is_better(name) and name != "bits" and "loss" not in metric
    runs = []
    for path, state, parameters in found:
        values = list(logged[path].get(metric, {}).values())
        updates = max((max(series) for series in logged[path].values()), default=0)
        runs.append(Result(path.name, state, updates, values[-1] if values else None, parameters))
    sign = -1 if maximize else 1
    runs.sort(key=lambda run: (run.value is None, sign * (run.value or 0)))
    return Results(metric, maximize, runs)


def _last(logged: dict[str, Any]) -> Iterator[str]:
    """Give the first metric of the evaluations at its last number of tokens or books."""
    evaluated = [name for name in logged if name.startswith("val/") and "@" in name]
    if evaluated:
        first = evaluated[0].partition("@")[0]
        yield [name for name in evaluated if name.partition("@")[0] == first][-1]


def _runs(folder: Path) -> Iterator[tuple[Path, str, dict[str, str]]]:
    """Find the runs below a folder; what differs between their configurations is their parameters."""
    paths = sorted(path.parent for path in folder.rglob("config.yaml") if (path.parent / "metrics.csv").is_file())
    flats = [dict(_flat(OmegaConf.to_container(OmegaConf.load(path / "config.yaml")))) for path in paths]
    states = [_state(path, flat) for path, flat in zip(paths, flats, strict=True)]
    columns: dict[str, list[str]] = {}
    for key in dict.fromkeys(key for flat in flats for key in flat):
        column = [flat.get(key, "") for flat in flats]
        chosen = any(key.startswith(f"{other.removesuffix('_target_')}") for other in columns if "_target_" in other)
        # A group that was chosen says it all; and of keys that go together, the first does.
        if len(set(column)) > 1 and not chosen and column not in columns.values():
            columns[key] = column
    for place, path in enumerate(paths):
        yield path, states[place], dict(_named(key, column[place]) for key, column in columns.items())


def _named(key: str, value: str) -> tuple[str, str]:
    """Name what was chosen of a group by its class alone."""
    chosen = key.endswith("._target_")
    return (key.removesuffix("._target_"), value.rpartition(".")[2]) if chosen else (key, value)


def _state(path: Path, flat: dict[str, str]) -> str:
    """Tell whether a run has come to its end."""
    updates = max((max(series) for series in read_scalars(path / "metrics.csv").values()), default=0)
    return "finished" if updates >= int(flat.get("updates", 0)) else "cut off"


def _flat(value: Any, key: str = "") -> Iterator[tuple[str, str]]:
    """List what a configuration says, by whole keys; what is chosen before what it holds."""
    if isinstance(value, dict):
        for name in sorted(value, key=lambda name: name != "_target_"):
            if key or name not in ASIDE:
                yield from _flat(value[name], f"{key}.{name}" if key else str(name))
    else:
        yield key, str(value)


def _told(value: float | None) -> str:
    return "" if value is None else f"{value:.6g}"
