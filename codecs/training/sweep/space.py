"""A sweep's file, in the format of W&B: what is searched, how, and the words of a trial's command line."""

import itertools
import json
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import yaml
from optuna import Trial

from varitok import UserError

__all__ = ["Choices", "Halving", "Numbers", "Sweep", "read_sweep", "short", "word"]

METHODS = ("bayes", "random", "grid")
KNOWN = {"program", "method", "metric", "parameters", "command", "early_terminate", "run_cap"}
LABELS = {"name", "project", "entity", "description"}  # of W&B's pages
PLAIN = re.compile(
    r"(?!(?i:null|true|false|nan|inf)$)[a-zA-Z_/][\w./@:+-]*", re.ASCII
)  # text that Hydra reads as it is


class Choices(NamedTuple):
    """A parameter that is one of several values.

    Attributes:
        values: Words of a command line.
    """

    values: list[str]

    def suggest(self, trial: Trial, name: str) -> str:
        """Draw one."""
        return str(trial.suggest_categorical(name, self.values))


class Numbers(NamedTuple):
    """A parameter that is a number out of a range.

    Attributes:
        low: The least.
        high: The largest.
        whole: Whether only whole numbers are meant.
        logarithmic: Whether each of its octaves is as likely.
        step: What values are rounded to multiples of; 0: they are not.
    """

    low: float
    high: float
    whole: bool = False
    logarithmic: bool = False
    step: float = 0.0

    def suggest(self, trial: Trial, name: str) -> str:
        """Draw one."""
        if self.whole:
            return word(trial.suggest_int(name, int(self.low), int(self.high)))
        value = trial.suggest_float(name, self.low, self.high, log=self.logarithmic)
        return word(round(round(value / self.step) * self.step, 12) if self.step else value)


class Halving(NamedTuple):
    """When trials that fall behind end early: at `first`, `first * factor`, ... evaluations all but 1 / `factor` do.

    Attributes:
        first: Evaluations.
        factor: Of both.
    """

    first: int
    factor: int


class Sweep(NamedTuple):
    """What a sweep's file says.

    Attributes:
        method: "bayes", "random" or "grid".
        metric: Name of what is best to be large or small, as evaluations log it.
        maximize: Whether large.
        space: What varies, by its key in the configuration.
        fixed: Words of what doesn't.
        trials: The most; None where it doesn't say.
        halving: When trials end early; None: never.
    """

    method: str
    metric: str
    maximize: bool
    space: dict[str, Choices | Numbers]
    fixed: dict[str, str]
    trials: int | None
    halving: Halving | None

    def grid(self) -> list[dict[str, str]]:
        """List all combinations of what varies."""
        lists = [parameter.values for parameter in self.space.values() if isinstance(parameter, Choices)]
        return [dict(zip(self.space, values, strict=True)) for values in itertools.product(*lists)]


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
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}; give a sweep's file, such as those in configs/sweep") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: not YAML ({' '.join(str(error).split())})") from error
    if not isinstance(found, dict) or not isinstance(found.get("parameters"), dict):
        raise UserError(f"{path}: has no parameters; see configs/sweep for examples")
    try:
        return _sweep(found)
    except UserError as error:
        raise UserError(f"{path}: {error}") from error


def _sweep(found: Mapping[str, Any]) -> Sweep:
    if unknown := found.keys() - KNOWN - LABELS:
        raise UserError(f"{min(unknown)}: not understood here; there are {', '.join(sorted(KNOWN))}")
    if found.get("method") not in METHODS:
        raise UserError(f"method: {found.get('method')} is none of {', '.join(METHODS)}")
    if Path(str(found.get("program", "train.py"))).name != "train.py":
        raise UserError(f"program: {found['program']} can't be run here; give train.py")
    metric = found.get("metric")
    goals = ("minimize", "maximize")
    if not isinstance(metric, dict) or "name" not in metric or metric.get("goal", goals[0]) not in goals:
        raise UserError("metric: give its name, and its goal, minimize or maximize")
    read = {str(name): _parameter(str(name), form) for name, form in found["parameters"].items()}
    space = {name: parameter for name, parameter in read.items() if not isinstance(parameter, str)}
    if not space:
        raise UserError("parameters: none varies; give one values, or min and max")
    if found["method"] == "grid" and not all(isinstance(parameter, Choices) for parameter in space.values()):
        raise UserError("method: a grid has no ranges; give each parameter its values")
    return Sweep(
        method=found["method"],
        metric=str(metric["name"]),
        maximize=metric.get("goal") == "maximize",
        space=space,
        fixed={name: parameter for name, parameter in read.items() if isinstance(parameter, str)},
        trials=found.get("run_cap"),
        halving=_halving(found["early_terminate"]) if found.get("early_terminate") else None,
    )


def _parameter(name: str, form: Any) -> str | Choices | Numbers:
    """Read a parameter: the word of one that doesn't vary, or what it may be."""
    if not isinstance(form, dict):
        raise UserError(f"parameters.{name}: give it a value, values, or min and max")
    values = form.get("values", [form["value"]] if "value" in form else [])
    if any(isinstance(value, dict) for value in values) or "parameters" in form:
        raise UserError(f"parameters.{name}: nested values; give each its own key, as optim.codec.lr")
    kind = form.get("distribution", _usual(form))
    if kind == "constant" and "value" in form:
        return word(form["value"])
    if kind == "categorical" and values:
        return Choices([word(value) for value in values])
    kinds = {
        "int_uniform": {"whole": True},
        "uniform": {},
        "q_uniform": {"step": form.get("q", 1)},
        "log_uniform_values": {"logarithmic": True},
        "q_log_uniform_values": {"logarithmic": True, "step": form.get("q", 1)},
    }
    if kind not in kinds:
        raise UserError(f"parameters.{name}: distribution {kind} is none of {', '.join([*kinds, 'categorical'])}")
    if unknown := form.keys() - {"distribution", "min", "max", "q"}:
        raise UserError(f"parameters.{name}: {min(unknown)} is not understood with {kind}")
    try:
        found = Numbers(float(form["min"]), float(form["max"]), **kinds[kind])
    except (KeyError, TypeError, ValueError):
        raise UserError(f"parameters.{name}: {kind} takes numbers as min and max") from None
    if not (found.low < found.high and math.isfinite(found.high - found.low)) or (found.logarithmic and found.low <= 0):
        raise UserError(f"parameters.{name}: min must be below max{', and above 0' * found.logarithmic}")
    return found


def _usual(form: Mapping[str, Any]) -> str:
    """Give the distribution that W&B takes where none is named."""
    if "value" in form or "values" in form:
        return "constant" if "value" in form else "categorical"
    whole = all(isinstance(form.get(end), int) for end in ("min", "max"))
    return "int_uniform" if whole else "uniform"


def _halving(form: Any) -> Halving:
    """Read when trials end early: hyperband's first bracket, or its smallest below the last."""
    factor = form.get("eta", 3) if isinstance(form, dict) else 0
    if not factor or form.get("type") != "hyperband" or not ("min_iter" in form or {"max_iter", "s"} <= form.keys()):
        raise UserError("early_terminate: give type: hyperband, and min_iter, or max_iter and s")
    first = form["min_iter"] if "min_iter" in form else math.ceil(form["max_iter"] / factor ** form["s"])
    return Halving(int(first), int(factor))
