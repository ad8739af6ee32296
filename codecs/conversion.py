"""Plain values in the types that annotations ask for, and annotations in a user's words. Nothing here loads torch."""

import inspect
import math
import types
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin

from varitok import UserError

__all__ = ["convert"]

WORDS = {
    int: "a whole number", float: "a number", bool: "true or false", str: "text", list: "a list", type(None): "null",
}  # fmt: skip
LISTS = (list, tuple, Sequence)


def convert(value: Any, hint: Any, key: str) -> Any:
    """Return a value in the type of an annotation: 1e3 is a whole number, 7 may be text.

    Pydantic's own conversion takes "3" for a number and 1 for true, and has messages of several lines.

    Args:
        value: Plain value of a configuration; a mapping builds an object, and fits all but plain types.
        hint: The annotation; an unknown one fits.
        key: Key of the value, for the message.

    Raises:
        UserError: It doesn't fit.
    """
    fits, found = _fit(value, hint)
    if not fits:
        raise UserError(f"{key}: expected {_say(hint)}, got {value!r}")
    return found


def _fit(value: Any, hint: Any) -> tuple[bool, Any]:  # noqa: PLR0911 (one for each kind of annotation)
    """Return whether a value fits, and the value in that type."""
    origin, options = get_origin(hint) or hint, get_args(hint)
    if isinstance(value, Mapping):
        return hint not in WORDS, value
    if origin in (Union, types.UnionType):
        fitting = [found for fits, found in (_fit(value, option) for option in options) if fits]
        same = [found for found in fitting if type(found) is type(value)]
        return bool(fitting), next(iter(same + fitting), value)
    if origin is Literal:
        return value in options, value
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
        # By the bases' names: isinstance fails on some protocols.
        return hint in type(value).__mro__ or (hint is Path and isinstance(value, str)), value
    return True, value


def _say(hint: Any) -> str:
    """Name an annotation in a user's words."""
    origin, options = get_origin(hint), get_args(hint)
    if origin in (Union, types.UnionType):
        simple = [option for option in options if option in WORDS or get_origin(option)]
        return " or ".join(_say(option) for option in simple or options)
    if origin is Literal:
        return " or ".join(repr(option) for option in options)
    if origin in LISTS:
        count = f"{len(options)} values" if origin is tuple and Ellipsis not in options else "a list"
        return f"{count}, each {_say(options[0])}"
    return WORDS.get(hint, getattr(hint, "__name__", str(hint)))
