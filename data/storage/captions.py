"""Captions of signals, read from text files beside the signals' files.

The caption of `photo.jpg` is `photo.txt` (UTF-8), in a folder or a shard (WebDataset's layout). Indices store captions.
"""

from collections.abc import Sequence
from pathlib import Path, PurePosixPath

from varitok import UserError

from .members import File, Member

__all__ = ["SUFFIX", "caption_of", "read_caption", "require_captions"]

SUFFIX = ".txt"
MOST_BYTES = 1 << 14  # bytes of a caption file that are read
LOOKED_AT = 100  # number of first files that are checked: at least one must have a caption


def read_caption(file: File) -> str:
    """Read a caption file as one line, truncated to 16 KiB.

    Raises:
        OSError: The file is missing or can't be read.
    """
    with file.open("rb") as source:
        return " ".join(source.read(MOST_BYTES).decode("utf-8", errors="ignore").split())


def caption_of(file: File) -> str:
    """Return the caption of a signal's file; empty if it has none."""
    if isinstance(file, Member):
        return str(file.facts.get("caption", ""))
    beside = Path(file).with_suffix(SUFFIX)
    try:
        return read_caption(beside)
    except OSError:
        return ""


def require_captions(files: Sequence[File]) -> None:
    """Check that files have captions.

    Raises:
        UserError: The list is empty, or none of the first 100 files has a caption.
    """
    if not files:
        raise UserError("loader.captions: this dataset has no files with captions beside them; give a folder or shards")
    if not any(caption_of(file) for file in files[:LOOKED_AT]):
        first = PurePosixPath(files[0].name)
        raise UserError(
            f"loader.captions: none of the first {min(LOOKED_AT, len(files))} files has a caption; write that of"
            f" {first.name} to {first.with_suffix(SUFFIX).name} beside it (and run `varitok shards` again)"
        )
