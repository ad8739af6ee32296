"""Captions: what a text says of a signal, from a file beside the signal's own.

Of `photo.jpg` it is `photo.txt`, in UTF-8, in a folder as in a shard (WebDataset's layout), whose index holds it.
"""

from pathlib import Path, PurePosixPath
from typing import Any

from torch import Tensor
from torch.utils.data import Dataset

from varitok import UserError

from .members import File, Member

__all__ = ["SUFFIX", "Captions", "caption_of", "read_caption"]

SUFFIX = ".txt"
MOST_BYTES = 1 << 14  # of a text that are read
LOOKED_AT = 100  # files of which one must have a caption


def read_caption(file: File) -> str:
    """Read a caption's own file, as one line; of a long one the beginning.

    Raises:
        OSError: It isn't there, or can't be read.
    """
    with file.open("rb") as source:
        return " ".join(source.read(MOST_BYTES).decode("utf-8", errors="ignore").split())


def caption_of(file: File) -> str:
    """Give a signal's caption; empty where it has none."""
    if isinstance(file, Member):
        return str(file.facts.get("caption", ""))
    beside = Path(file).with_suffix(SUFFIX)
    try:
        return read_caption(beside)
    except OSError:
        return ""


class Captions:
    """The captions of a data set of files.

    Args:
        dataset: The data set.

    Raises:
        UserError: It isn't one of files, or has no captions.
    """

    def __init__(self, dataset: Dataset[Tensor]) -> None:
        files: Any = getattr(dataset, "files", None)
        if not files:
            raise UserError("loader.captions: these data are no folder or shards, beside whose files captions lie")
        if not any(caption_of(file) for file in files[:LOOKED_AT]):
            first = PurePosixPath(getattr(files[0], "name", files[0]))
            raise UserError(
                f"loader.captions: none of the first {min(LOOKED_AT, len(files))} files has a caption; write that of"
                f" {first.name} to {first.with_suffix(SUFFIX).name} beside it (and run `varitok shards` again)"
            )
        self._files = files

    def __getitem__(self, place: int) -> str:
        """Give that of a signal; empty where it has none."""
        return caption_of(self._files[place])
