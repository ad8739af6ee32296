"""Find files of pretrained weights on this machine; nothing is ever downloaded."""

import os
from pathlib import Path

import torch
from torch import nn

from varitok import UserError

__all__ = ["find_weights", "load_weights", "require_weights", "weight_folders"]

HOME = Path("~/.cache/varitok/weights")


def weight_folders() -> list[Path]:
    """Return the folders that are searched: $VARITOK_WEIGHTS, the user's cache, torch hub's checkpoints."""
    named = os.environ.get("VARITOK_WEIGHTS")
    return [*([Path(named)] if named else []), HOME.expanduser(), Path(torch.hub.get_dir()) / "checkpoints"]


def find_weights(filename: str) -> Path | None:
    """Return the path of a weight file, or None if it isn't found."""
    return next((path for folder in weight_folders() if (path := folder / filename).is_file()), None)


def require_weights(filename: str, purpose: str, source_hint: str) -> Path:
    """Return the path of a weight file.

    Args:
        filename: Name under which its authors publish the file.
        purpose: Component that needs the file; begins the error message.
        source_hint: Origin of the file, for the error message.

    Raises:
        UserError: The file isn't found; the message says which file to place where.
    """
    path = find_weights(filename)
    if path is None:
        raise UserError(
            f"{purpose} needs the file {filename} ({source_hint}), and nothing is downloaded:"
            f" place it in {HOME}, or set VARITOK_WEIGHTS to its folder"
        )
    return path


def load_weights(
    network: nn.Module, path: Path, what: str, prefix: str = "", *, key: str | None = None, beside: tuple[str, ...] = ()
) -> None:
    """Load a file of weights, as tensors only, into a network built on the meta device.

    Args:
        network: Network whose parameters and buffers the file must have, and no others.
        path: The file.
        what: Name of the expected weights, for the error message.
        prefix: Prefix of the parameters to load, which is removed; the others are ignored.
        key: Entry of the file that has the parameters; None if the file is they.
        beside: Prefixes of further parameters, which are ignored.

    Raises:
        UserError: The file is damaged, or has other weights.
    """
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
        state = state if key is None else state[key]
        own = {name: value for name, value in state.items() if name.startswith(prefix) and not name.startswith(beside)}
        found = {name.removeprefix(prefix): value for name, value in own.items()}
        network.load_state_dict(found, assign=True)
    except Exception as error:  # torch raises RuntimeError, UnpicklingError, EOFError, struct.error and more
        raise UserError(f"{path}: not {what} ({type(error).__name__}); download it again") from error
