"""Where files of trained weights are looked for on this machine; nothing is ever downloaded."""

import os
from pathlib import Path

import torch

from varitok import UserError

__all__ = ["find_weights", "require_weights", "weight_folders"]

HOME = Path("~/.cache/varitok/weights")


def weight_folders() -> list[Path]:
    """List the folders in which weights are looked for: $VARITOK_WEIGHTS, the user's cache, torch hub's."""
    named = os.environ.get("VARITOK_WEIGHTS")
    return [*([Path(named)] if named else []), HOME.expanduser(), Path(torch.hub.get_dir()) / "checkpoints"]


def find_weights(filename: str) -> Path | None:
    """Find a file of weights by its name, or give None."""
    return next((path for folder in weight_folders() if (path := folder / filename).is_file()), None)


def require_weights(filename: str, purpose: str, source_hint: str) -> Path:
    """Find a file of weights.

    Args:
        filename: The name under which its makers publish it.
        purpose: What needs it, the first words of the error.
        source_hint: Whose file it is.

    Raises:
        UserError: It isn't there; the message says which file to place where.
    """
    path = find_weights(filename)
    if path is None:
        raise UserError(
            f"{purpose} needs the file {filename} ({source_hint}), and nothing is downloaded:"
            f" place it in {HOME}, or set VARITOK_WEIGHTS to its folder"
        )
    return path
