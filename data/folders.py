"""Folders of files as data sets: what is trained on, what is held out, and what is fetched."""

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor
from torch.utils.data import Dataset

from varitok import UserError

from .batch import BadSample

__all__ = ["FileDataset", "fetched", "list_files"]


def list_files(root: Path, split: str, val_share: float, suffixes: Collection[str], what: str) -> list[Path]:
    """List a split's files, sorted.

    Where the folder has subfolders `train` and `val`, these are the splits; otherwise a share of the files is held out,
    chosen by the hash of each path below the folder. One file alone is both.

    Args:
        root: The folder; files may lie at any depth.
        split: "train" or "val".
        val_share: Share of the files that is held out.
        suffixes: Of the files, in lower case, with their dots.
        what: What the files are, in the singular, for the error.

    Raises:
        UserError: The folder isn't there, or holds no such file.
    """
    if not root.is_dir():
        raise UserError(f"data.root={root}: no such folder")
    parted = (root / "train").is_dir() and (root / "val").is_dir()
    folder = root / split if parted else root
    files = sorted(path for path in folder.rglob("*") if path.suffix.lower() in suffixes and path.is_file())
    if not files:
        raise UserError(f"data.root={folder}: no {what} in this folder (looked for {' '.join(suffixes)})")
    if parted or len(files) == 1:
        return files

    def rank(path: Path) -> str:
        return hashlib.sha256(path.relative_to(root).as_posix().encode()).hexdigest()

    held = set(sorted(files, key=rank)[: min(len(files) - 1, max(1, round(val_share * len(files))))])
    return [path for path in files if (path in held) == (split == "val")]


class FileDataset(Dataset[Tensor], ABC):
    """A data set of files, each a signal that has a length.

    Args:
        files: The files.
    """

    def __init__(self, files: Sequence[Path]) -> None:
        self.files = list(files)

    def __len__(self) -> int:
        """Count the files."""
        return len(self.files)

    @abstractmethod
    def size(self, path: Path) -> int:
        """Count the samples or frames that a file gives, from its header.

        Raises:
            BadSample: It can't be read.
        """

    def sizes(self) -> list[int]:
        """Count those of each file; 0 where it can't be read."""
        found = []
        for path in self.files:
            try:
                found.append(self.size(path))
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
