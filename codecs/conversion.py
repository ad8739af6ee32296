"""Conversion of configuration values to annotated types, and their ranges. This module doesn't import torch.

An annotation names a number's range as an interval, `Annotated[float, "(0, 1]"]`. A second text says what a user who
wants none of it should write: `Annotated[float, "(0, inf]", "inf doesn't clip"]`.
"""

import inspect
import math
import types
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from varitok import UserError

__all__ = ["RANGES", "convert"]

WORDS = {
    int: "a whole number", float: "a number", bool: "true or false", str: "text", list: "a list", type(None): "null",
}  # fmt: skip
LISTS = (list, tuple, Sequence)
RANGES = {int: "[1, inf)", float: "[0, inf)"}  # of what our classes take, unless they say otherwise: sizes and weights
ANY = {int: "(-inf, inf)", float: "[-inf, inf]"}


def convert(value: Any, hint: Any, key: str, ranges: Mapping[type, str] = ANY) -> Any:
    """Convert a value to the type of an annotation: int accepts 1e3, str accepts 7. Check its range.

    Pydantic instead accepts "3" as a number and 1 as true, and raises messages of several lines.

    Args:
        value: Plain value of a configuration. A mapping that builds an object, by its `_target_`, fits all but plain
            types; one that doesn't can't be of our own classes either.
        hint: The annotation; an unsupported one accepts any value.
        key: Key of the value, for the message.
        ranges: Intervals of numbers whose annotation names none, by type.

    Raises:
        UserError: The value doesn't fit the annotation, or is out of range.
    """
    if isinstance(value, Mapping) and get_origin(hint) is Mapping:
        return {name: convert(item, get_args(hint)[1], f"{key}.{name}", ranges) for name, item in value.items()}
    fits, found = _fit(value, hint)
    if not fits:
        note = f"; {hint.__metadata__[1]}" if get_origin(hint) is Annotated and len(hint.__metadata__) > 1 else ""
        got = f"{', '.join(value)} without _target_" if isinstance(value, Mapping) and value else repr(value)
        raise UserError(f"{key}: expected {_name_type(hint)}, got {got}{note}")
    _check_range(found, hint, key, ranges)
    return found


def _check_range(value: Any, hint: Any, key: str, ranges: Mapping[type, str], note: str = "") -> None:
    """Check the range of a number, or of each in a list, that fits the annotation."""
    origin, options = get_origin(hint), get_args(hint)
    if origin is Annotated:
        interval, *notes = hint.__metadata__
        _check_range(value, options[0], key, dict.fromkeys(ranges, interval), *notes)
    elif origin in (Union, types.UnionType):
        note = note or ("write null for none" if type(None) in options else "")
        _check_range(value, next(option for option in options if _fit(value, option)[0]), key, ranges, note)
    elif origin in LISTS and options:
        for index, item in enumerate(value):
            _check_range(item, options[0], f"{key}[{index}]", ranges, note)
    elif hint in ranges and not _within(value, ranges[hint]):
        raise UserError(f"{key}={value}: must be {_name_range(value, ranges[hint])}{note and f'; {note}'}")


def _ends(interval: str) -> tuple[float, float]:
    low, high = interval[1:-1].split(",")
    return float(low), float(high)


def _within(value: float, interval: str) -> bool:
    low, high = _ends(interval)
    return (low < value or (value == low and interval[0] == "[")) and (
        value < high or (value == high and interval[-1] == "]")
    )


def _name_range(value: float, interval: str) -> str:
    """Describe a range that a value is not in."""
    low, high = _ends(interval)
    if math.isinf(value) and low <= value <= high:
        return "finite"
    least = f"{'at least' if interval[0] == '[' else 'above'} {low:.12g}"
    most = f"{'at most' if interval[-1] == ']' else 'below'} {high:.12g}"
    return " and ".join(part for part, end in ((least, low), (most, high)) if math.isfinite(end))


def _fit(value: Any, hint: Any) -> tuple[bool, Any]:  # noqa: PLR0911 (one for each kind of annotation)
    """Return whether a value fits an annotation, and the converted value."""
    origin, options = get_origin(hint) or hint, get_args(hint)
    if origin is Annotated:
        return _fit(value, options[0])
    if hint is type(None):
        return value is None, value
    if isinstance(value, Mapping) and (hint in WORDS or "_target_" in value):
        return hint not in WORDS, value
    if origin in (Union, types.UnionType):
        fitting = [found for fits, found in (_fit(value, option) for option in options) if fits]
        same = [found for found in fitting if type(found) is type(value)]
        return bool(fitting), next(iter(same + fitting), value)
    if origin is Literal:
        return value in options, value
    if isinstance(value, Mapping):
        return not getattr(origin, "__module__", "").startswith("varitok."), value
    if origin in LISTS:
        if not isinstance(value, list):
            return False, value
        pairs = [_fit(item, options[0] if options else Any) for item in value]
        fixed = origin is tuple and options and Ellipsis not in options
        return all(fits for fits, _ in pairs) and (not fixed or len(pairs) == len(options)), [item for _, item in pairs]
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if hint is int:
        whole = number and math.isfinite(value) and value == int(value)
        return whole, int(value) if whole else value
    if hint is float:
        return number and not math.isnan(value), value
    if hint is str and number:
        return True, str(value)
    if inspect.isclass(hint) and hint is not Any and isinstance(value, str | int | float | None):
        # Not isinstance, which fails on some protocols.
        return hint in type(value).__mro__ or (hint is Path and isinstance(value, str)), value
    return True, value


def _name_type(hint: Any) -> str:
    """Describe an annotation for an error message."""
    origin, options = get_origin(hint), get_args(hint)
    if origin is Annotated:
        return _name_type(options[0])
    if origin in (Union, types.UnionType):
        simple = [option for option in options if option in WORDS or get_origin(option)]
        return " or ".join(_name_type(option) for option in (options if simple in ([], [type(None)]) else simple))
    if origin is Literal:
        return " or ".join(repr(option) for option in options)
    if origin in LISTS:
        count = f"{len(options)} values" if origin is tuple and Ellipsis not in options else "a list"
        return f"{count}, each {_name_type(options[0])}"
    return WORDS.get(hint, getattr(hint, "__name__", str(hint)))
