"""Values of a configuration that are paths. This module doesn't import torch."""

import re
from collections.abc import Iterator
from typing import Any

from varitok import UserError

__all__ = ["check_locations", "is_location"]

# By the names of keys, since an override is read before there is a type.
KEYS = re.compile(
    r"init_from|resume|tokenizer|hydra\.(run|sweep)\.dir|data\.(roots\..+|clips|images)|.+\.(root|folder|cached)"
)


def is_location(key: str) -> bool:
    """Return whether the value of a whole key is a path."""
    return KEYS.fullmatch(key) is not None


def check_locations(plain: Any) -> None:
    """Refuse empty paths, which would be the current folder.

    Args:
        plain: Resolved configuration, plain containers.

    Raises:
        UserError: A path is empty.
    """
    for _, key, path in _locations(plain):
        if not path:
            raise UserError(f"{key}: is empty; give a path, or leave the key out (is a variable of the shell unset?)")


def _locations(node: Any, before: str = "") -> Iterator[tuple[dict[str, Any], str, str]]:
    """List the paths of a configuration: the mapping that holds each, its whole key, and the path."""
    if isinstance(node, dict):
        for name, value in node.items():
            key = f"{before}{name}"
            if isinstance(value, str) and is_location(key):
                yield node, key, value
            yield from _locations(value, f"{key}.")
