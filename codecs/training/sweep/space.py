"""A sweep's file, in W&B's format: the search space, the method, and a trial's command line."""

import itertools
import json
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import yaml
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution
from optuna.pruners import BasePruner, NopPruner, SuccessiveHalvingPruner

from varitok import UserError

__all__ = ["Sweep", "read_sweep", "short", "word"]

METHODS = ("bayes", "random", "grid")
GOALS = ("minimize", "maximize")
KNOWN = {"program", "method", "metric", "parameters", "command", "early_terminate", "run_cap"}
LABELS = {"name", "project", "entity", "description"}  # of W&B's pages
# Distributions of ranges: whether the logarithm is uniform, and whether values are rounded to multiples of `q`.
RANGES = {
    "int_uniform": (False, False), "uniform": (False, False), "q_uniform": (False, True),
    "log_uniform_values": (True, False), "q_log_uniform_values": (True, True),
}  # fmt: skip
PLAIN = re.compile(
    r"(?!(?i:null|true|false|nan|inf)$)[a-zA-Z_/][\w./@:+-]*", re.ASCII
)  # text that Hydra reads as it is


class Sweep(NamedTuple):
    """What a sweep's file says.

    Attributes:
        method: "bayes", "random" or "grid".
        metric: Name of the metric, as evaluations log it.
        maximize: Whether large values are good.
        space: The search space, by configuration key; choices are words of a command line.
        steps: What numbers are rounded to multiples of, by key (W&B's `q`; Optuna's steps begin at the least value).
        fixed: Words of what doesn't vary.
        trials: The most; None if it doesn't say.
        halving: At `first`, `first * factor`, ... evaluations all trials but 1 / `factor` end early; None: none does.
    """

    method: str
    metric: str
    maximize: bool
    space: dict[str, BaseDistribution]
    steps: dict[str, float]
    fixed: dict[str, str]
    trials: int | None
    halving: tuple[int, int] | None

    def grid(self) -> list[dict[str, str]]:
        """List all combinations of what varies."""
        choices = [map(str, one.choices) for one in self.space.values() if isinstance(one, CategoricalDistribution)]
        return [dict(zip(self.space, values, strict=True)) for values in itertools.product(*choices)]

    def words(self, drawn: Mapping[str, Any]) -> dict[str, str]:
        """Write a trial's parameters as words of its command line."""
        found = {}
        for name, value in drawn.items():
            step = self.steps.get(name)
            rounded = round(round(value / step) * step, 12) if step else value
            found[name] = rounded if isinstance(rounded, str) else word(rounded)
        return found

    def pruner(self) -> BasePruner:
        """Build the pruner of trials that have fallen behind."""
        if self.halving is None:
            return NopPruner()
        return SuccessiveHalvingPruner(min_resource=self.halving[0], reduction_factor=self.halving[1])


def word(value: Any) -> str:
    """Write a value as Hydra reads it."""
    if isinstance(value, str):
        return value if PLAIN.fullmatch(value) else "'" + value.replace("'", "\\'") + "'"
    return f"[{','.join(map(word, value))}]" if isinstance(value, list) else json.dumps(value)


def short(text: str) -> str:
    """Write a number with few digits; other text as it is."""
    try:
        return f"{float(text):.4g}"
    except ValueError:
        return text


def read_sweep(path: Path) -> Sweep:
    """Read a sweep's file.

    Raises:
        UserError: It isn't there, or says something that is not understood here.
    """
    try:
        found = yaml.safe_load(path.read_text(encoding="utf-8"))
        if not isinstance(found, dict) or not isinstance(found.get("parameters"), dict):
            raise UserError("has no parameters; see configs/sweep for examples")
        return _sweep(found)
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}; give a sweep's file, such as those in configs/sweep") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: not YAML ({' '.join(str(error).split())})") from error
    except UserError as error:
        raise UserError(f"{path}: {error}") from error


def _sweep(found: Mapping[str, Any]) -> Sweep:
    if unknown := found.keys() - KNOWN - LABELS:
        raise UserError(f"{min(unknown)}: not understood here; there are {', '.join(sorted(KNOWN))}")
    method, metric = found.get("method"), found.get("metric")
    if method not in METHODS:
        raise UserError(f"method: {method} is none of {', '.join(METHODS)}")
    if Path(str(found.get("program", "train.py"))).name != "train.py":
        raise UserError(f"program: {found['program']} can't be run here; give train.py")
    if not isinstance(metric, dict) or "name" not in metric or metric.get("goal", GOALS[0]) not in GOALS:
        raise UserError("metric: give its name, and its goal, minimize or maximize")
    read = {str(name): _parameter(f"parameters.{name}", form) for name, form in found["parameters"].items()}
    varied = {name: parameter for name, parameter in read.items() if not isinstance(parameter, str)}
    if not varied:
        raise UserError("parameters: none varies; give one values, or min and max")
    if method == "grid" and not all(isinstance(one, CategoricalDistribution) for one, _ in varied.values()):
        raise UserError("method: a grid has no ranges; give each parameter its values")
    return Sweep(
        method=method,
        metric=str(metric["name"]),
        maximize=metric.get("goal") == "maximize",
        space={name: distribution for name, (distribution, _) in varied.items()},
        steps={name: step for name, (_, step) in varied.items() if step},
        fixed={name: parameter for name, parameter in read.items() if isinstance(parameter, str)},
        trials=found.get("run_cap"),
        halving=_halving(found["early_terminate"]) if found.get("early_terminate") else None,
    )


def _parameter(key: str, form: Any) -> str | tuple[BaseDistribution, float]:
    """Read a parameter: the word of one that doesn't vary, or what it may be and its step."""
    if not isinstance(form, dict):
        raise UserError(f"{key}: give it a value, values, or min and max")
    values = form.get("values", [form["value"]] if "value" in form else [])
    if any(isinstance(value, dict) for value in values) or "parameters" in form:
        raise UserError(f"{key}: nested values; give each its own key, as optim.codec.lr")
    whole = all(isinstance(form.get(end), int) for end in ("min", "max"))
    usual = "constant" if "value" in form else "categorical" if values else "int_uniform" if whole else "uniform"
    kind = form.get("distribution", usual)
    if kind == "constant" and "value" in form:
        return word(form["value"])
    if kind == "categorical" and values:
        return CategoricalDistribution([word(value) for value in values]), 0
    if kind not in RANGES:
        raise UserError(f"{key}: distribution {kind} is none of {', '.join([*RANGES, 'categorical'])}")
    if unknown := form.keys() - {"distribution", "min", "max", "q"}:
        raise UserError(f"{key}: {min(unknown)} is not understood with {kind}")
    try:
        low, high = float(form["min"]), float(form["max"])
    except (KeyError, TypeError, ValueError):
        raise UserError(f"{key}: {kind} takes numbers as min and max") from None
    logarithmic, stepped = RANGES[kind]
    if not (low < high and math.isfinite(high - low)) or (logarithmic and low <= 0):
        raise UserError(f"{key}: min must be below max{', and above 0' * logarithmic}")
    if kind == "int_uniform":
        return IntDistribution(int(low), int(high)), 0
    return FloatDistribution(low, high, log=logarithmic), form.get("q", 1) if stepped else 0


def _halving(form: Any) -> tuple[int, int]:
    """Read when trials end early: hyperband's first bracket, or its smallest below the last."""
    factor = form.get("eta", 3) if isinstance(form, dict) else 0
    if not factor or form.get("type") != "hyperband" or not ("min_iter" in form or {"max_iter", "s"} <= form.keys()):
        raise UserError("early_terminate: give type: hyperband, and min_iter, or max_iter and s")
    return int(form["min_iter"] if "min_iter" in form else math.ceil(form["max_iter"] / factor ** form["s"])), int(
        factor
    )
