"""Torch datasets of media files for a bundle, with the evaluation's preprocessing."""

from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from torch import Tensor
from torch.utils.data import Dataset

from varitok import UserError
from varitok.codecs.modalities.registry import MODALITIES
from varitok.data.storage.folders import describe_skipped, find_files

from ..runtime.bundle import Bundle

__all__ = ["dataset_of", "files_of", "noun_of"]

SIDE = 128  # height and width of frames in pixels, for bundles of any frame size


def noun_of(bundle: Bundle) -> str:
    """Return the noun for a bundle's files, for messages."""
    return MODALITIES[bundle.modality].file_noun


def files_of(bundle: Bundle, paths: Sequence[Path], option: str) -> list[Path]:
    """List the files of a bundle's modality, recursively and without duplicates.

    Args:
        bundle: A bundle of a modality with media files.
        paths: Files and folders.
        option: Name of the command-line option of `paths`, for messages.

    Raises:
        UserError: A path doesn't exist, or no file has a suffix of the modality.
    """
    what, suffixes = noun_of(bundle), bundle.suffixes
    found: list[Path] = []
    skipped = Counter[str]()
    for path in paths:
        if not path.exists():
            raise UserError(f"{option} {path}: no such file or folder")
        files, others = find_files(path, suffixes)[:2] if path.is_dir() else ([path], {})
        found += files
        skipped.update(others)
    mine = list(dict.fromkeys(path for path in found if path.suffix.lower() in suffixes and path.is_file()))
    if not mine:
        none = f"{option} has no {what}s ({' '.join(suffixes)}){describe_skipped(skipped)}"
        ask = none if paths else f"give some {what}s with {option}"
        raise UserError(f"{bundle.folder}: a bundle needs files to run on; {ask}")
    return mine


def dataset_of(
    bundle: Bundle, files: Sequence[Path], seconds: float | None, side: int = SIDE
) -> tuple[Dataset[Tensor], str]:
    """Build a dataset of a bundle's inputs with the evaluation's preprocessing, and describe the preprocessing.

    Args:
        bundle: A bundle of a modality with media files.
        files: Files of its modality.
        seconds: Duration taken from the beginning of each audio or video file; None: the whole audio file.
        side: Height and width of video frames in pixels, if the bundle has no frame size.
    """
    return MODALITIES[bundle.modality]().dataset(bundle.config, files, seconds, side)
