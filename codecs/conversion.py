"""Conversion of configuration values to annotated types. This module doesn't import torch."""

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
    """Convert a value to the type of an annotation: int accepts 1e3, str accepts 7.

    Pydantic instead accepts "3" as a number and 1 as true, and raises messages of several lines.

    Args:
        value: Plain value of a configuration; a mapping, which builds an object, fits all but plain types.
        hint: The annotation; an unsupported one accepts any value.
        key: Key of the value, for the message.

    Raises:
        UserError: The value doesn't fit the annotation.
    """
    fits, found = _fit(value, hint)
    if not fits:
        raise UserError(f"{key}: expected {_name_type(hint)}, got {value!r}")
    return found


def _fit(value: Any, hint: Any) -> tuple[bool, Any]:  # noqa: PLR0911 (one for each kind of annotation)
    """Return whether a value fits an annotation, and the converted value."""
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
        # Not isinstance, which fails on some protocols.
        return hint in type(value).__mro__ or (hint is Path and isinstance(value, str)), value
    return True, value


def _name_type(hint: Any) -> str:
    """Describe an annotation for an error message."""
    origin, options = get_origin(hint), get_args(hint)
    if origin in (Union, types.UnionType):
        simple = [option for option in options if option in WORDS or get_origin(option)]
        return " or ".join(_name_type(option) for option in simple or options)
    if origin is Literal:
        return " or ".join(repr(option) for option in options)
    if origin in LISTS:
        count = f"{len(options)} values" if origin is tuple and Ellipsis not in options else "a list"
        return f"{count}, each {_name_type(options[0])}"
    return WORDS.get(hint, getattr(hint, "__name__", str(hint)))
