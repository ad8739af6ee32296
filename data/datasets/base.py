"""A data set of files, and how published ones are downloaded."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor
from torch.utils.data import Dataset

from varitok import UserError

from ..batch import BadSample
from ..storage.members import File

__all__ = ["FileDataset", "fetched"]


class FileDataset(Dataset[Tensor], ABC):
    """A data set of files, each a signal that has a length.

    Args:
        files: The files; of paths, or of members of shards, which stay packed.
    """

    def __init__(self, files: Sequence[File]) -> None:
        self.files = files

    def __len__(self) -> int:
        """Count the files."""
        return len(self.files)

    @abstractmethod
    def size(self, file: File) -> int:
        """Count the samples or frames that a file gives, from its header, or from the index of its shard.

        Raises:
            BadSample: It can't be read.
        """

    def sizes(self) -> list[int]:
        """Count those of each file; 0 where it can't be read."""
        found = []
        for file in self.files:
            try:
                found.append(self.size(file))
            except BadSample:
                found.append(0)
        return found


def fetched(make: Callable[[], Any], root: str, archive: str) -> Any:
    """Make one of torchvision's or torchaudio's datasets; say in one line what to do where it can't be had.

    Args:
        make: Makes it, below `root`.
        root: The folder; it is made where it isn't there.
        archive: Name of the file that it is fetched as.

    Raises:
        UserError: The files are not in `root` and can't be fetched.
    """
    try:
        Path(root).mkdir(parents=True, exist_ok=True)
        return make()
    except (OSError, RuntimeError) as error:  # URLError is an OSError
        reason = " ".join(str(error).split())
        raise UserError(
            f"data.root={root}: {archive} is not there and could not be fetched ({reason}); place it in that folder"
        ) from error
