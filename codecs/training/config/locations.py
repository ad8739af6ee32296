"""Values of a configuration that are paths. This module doesn't import torch."""

import copy
import os
import re
from collections.abc import Iterator
from typing import Any

from varitok import UserError

__all__ = ["check_locations", "is_location", "with_absolute_paths"]

# By the names of keys, since an override is read before there is a type.
KEYS = re.compile(
    r"init_from|resume|tokenizer|hydra\.(run|sweep)\.dir|data\.(roots\..+|clips|images)|.+\.(root|folder|cached)"
)

RESUME = ("auto", "none")  # values of `resume` that aren't paths


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
    for key, node, name in _locations(plain):
        if not node[name]:
            raise UserError(f"{key}: is empty; give a path, or leave the key out (is a variable of the shell unset?)")


def with_absolute_paths(plain: dict[str, Any]) -> dict[str, Any]:
    """Return a copy in which paths that exist are absolute, so that they hold in any current folder.

    Others stay: names of weights, URLs, `resume=auto`.

    Args:
        plain: Resolved configuration, plain containers.
    """
    found = copy.deepcopy(plain)
    for _, node, name in _locations(found):
        if node[name] not in RESUME and os.path.exists(node[name]):
            node[name] = os.path.abspath(node[name])
    return found


def _locations(node: Any, before: str = "") -> Iterator[tuple[str, dict[str, Any], str]]:
    """List the paths of a configuration: the whole key of each, the mapping that holds it, and its name there."""
    if isinstance(node, dict):
        for name, value in node.items():
            if isinstance(value, str) and is_location(f"{before}{name}"):
                yield f"{before}{name}", node, name
            yield from _locations(value, f"{before}{name}.")
