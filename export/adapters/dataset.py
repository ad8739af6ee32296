"""Ordinary files as the signals that a bundle takes, made as an evaluation makes them; with torch."""

from collections.abc import Sequence
from pathlib import Path

from torch import Tensor
from torch.utils.data import Dataset

from varitok import UserError
from varitok.codecs.modalities.registry import MODALITIES

from ..runtime.bundle import Bundle

__all__ = ["dataset_of", "files_of", "noun_of"]

SIDE = 128  # pixels of a clip's frames, where a bundle takes any


def noun_of(bundle: Bundle) -> str:
    """Return the noun for a bundle's files."""
    return MODALITIES[bundle.modality].file_noun


def files_of(bundle: Bundle, paths: Sequence[Path], option: str) -> list[Path]:
    """List the files of a bundle's kind, those below folders too, each once.

    Args:
        bundle: A bundle of a modality that files hold.
        paths: Files and folders.
        option: The option that they were given by, for messages.

    Raises:
        UserError: One isn't there, or none is of the kind.
    """
    what, suffixes = noun_of(bundle), MODALITIES[bundle.modality].suffixes
    found: list[Path] = []
    for path in paths:
        if not path.exists():
            raise UserError(f"{option} {path}: no such file or folder")
        found += sorted(path.rglob("*")) if path.is_dir() else [path]
    mine = list(dict.fromkeys(path for path in found if path.suffix.lower() in suffixes and path.is_file()))
    if not mine:
        none = f"none of {option} is a {what} ({' '.join(suffixes)})"
        ask = none if paths else f"give some {what}s with {option}"
        raise UserError(f"{bundle.folder}: a bundle is shown on files of yours; {ask}")
    return mine


def dataset_of(
    bundle: Bundle, files: Sequence[Path], seconds: float | None, side: int = SIDE
) -> tuple[Dataset[Tensor], str]:
    """Make files what the bundle takes, as an evaluation does, and say how.

    Args:
        bundle: A bundle of a modality that files hold.
        files: Files of its kind.
        seconds: Duration taken from the beginning of each sound or clip; None: all of a sound.
        side: Side of video frames, in pixels, if the bundle takes any.
    """
    return MODALITIES[bundle.modality]().dataset(bundle.config, files, seconds, side)
