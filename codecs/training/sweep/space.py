"""Sweep files in W&B's format: search space, method, and command lines of trials."""

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
LABELS = {"name", "project", "entity", "description"}  # keys for W&B's pages only, ignored here
# Distributions of ranges: (the logarithm is uniform, values are rounded to multiples of `q`).
RANGES = {
    "int_uniform": (False, False), "uniform": (False, False), "q_uniform": (False, True),
    "log_uniform_values": (True, False), "q_log_uniform_values": (True, True),
}  # fmt: skip
PLAIN = re.compile(
    r"(?!(?i:null|true|false|nan|inf)$)[a-zA-Z_/][\w./@:+-]*", re.ASCII
)  # text that needs no quotes for Hydra


class Sweep(NamedTuple):
    """The content of a sweep file.

    Attributes:
        method: "bayes", "random" or "grid".
        metric: Name of the metric in the log.
        maximize: Whether larger values are better.
        space: Distribution of each varied configuration key; choices are written as on a command line.
        steps: Step that values are rounded to, by key (W&B's `q`; Optuna's own steps start at the minimum).
        fixed: Values of constant keys, written as on a command line.
        trials: Maximum number of trials; None if the file has no `run_cap`.
        halving: (first, factor): after `first`, `first * factor`, ... evaluations only the best 1 / `factor` of the
            trials continue (successive halving); None: no trial is pruned.
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
        """List all combinations of the varied keys' choices."""
        choices = [map(str, one.choices) for one in self.space.values() if isinstance(one, CategoricalDistribution)]
        return [dict(zip(self.space, values, strict=True)) for values in itertools.product(*choices)]

    def words(self, drawn: Mapping[str, Any]) -> dict[str, str]:
        """Format a trial's parameters as on a command line."""
        found = {}
        for name, value in drawn.items():
            step = self.steps.get(name)
            rounded = round(round(value / step) * step, 12) if step else value
            found[name] = rounded if isinstance(rounded, str) else word(rounded)
        return found

    def pruner(self) -> BasePruner:
        """Build the pruner: successive halving, or none."""
        if self.halving is None:
            return NopPruner()
        return SuccessiveHalvingPruner(min_resource=self.halving[0], reduction_factor=self.halving[1])


def word(value: Any) -> str:
    """Format a value in Hydra's override syntax."""
    if isinstance(value, str):
        return value if PLAIN.fullmatch(value) else "'" + value.replace("'", "\\'") + "'"
    return f"[{','.join(map(word, value))}]" if isinstance(value, list) else json.dumps(value)


def short(text: str) -> str:
    """Format a number with four digits; return other text unchanged."""
    try:
        return f"{float(text):.4g}"
    except ValueError:
        return text


def read_sweep(path: Path) -> Sweep:
    """Read a sweep's file.

    Raises:
        UserError: The file is missing or invalid, or uses a feature that is not supported.
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
        raise UserError(f"{min(unknown)}: not supported; there are {', '.join(sorted(KNOWN))}")
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
        raise UserError("parameters: all are constant; give one of them values, or min and max")
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
    """Read a parameter: a constant as on a command line, or its distribution and step."""
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
        raise UserError(f"{key}: {min(unknown)} is not supported with {kind}")
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
    """Read first rung and reduction factor of hyperband's smallest bracket, by `min_iter`, or `max_iter` and `s`."""
    factor = form.get("eta", 3) if isinstance(form, dict) else 0
    if not factor or form.get("type") != "hyperband" or not ("min_iter" in form or {"max_iter", "s"} <= form.keys()):
        raise UserError("early_terminate: give type: hyperband, and min_iter, or max_iter and s")
    return int(form["min_iter"] if "min_iter" in form else math.ceil(form["max_iter"] / factor ** form["s"])), int(
        factor
    )
