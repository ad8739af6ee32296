"""Folders of files, or of shards, as data sets: what is trained on, what is held out, and what is fetched."""

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

from torch import Tensor
from torch.utils.data import Dataset

from varitok import UserError

from .batch import BadSample
from .members import File, Member, Members, is_url
from .shards import open_shards, shards_in

__all__ = ["FileDataset", "fetched", "list_files"]


def list_files(root: str | Path, split: str, val_share: float, suffixes: Collection[str], what: str) -> Sequence[File]:
    """List a split's files, sorted: those below a folder, or the members of the shards in it (`shards`).

    Where the folder has subfolders `train` and `val`, these are the splits; otherwise a share of the files is held out,
    chosen by the hash of each path below the folder. One file alone is both. So the splits and the order of a folder
    are those of the shards that `varitok shards` makes of it.

    Args:
        root: The folder; files may lie at any depth, shards directly in it. Or an address of shards that fsspec knows.
        split: "train" or "val".
        val_share: Share of the files that is held out.
        suffixes: Of the files, in lower case, with their dots.
        what: What the files are, in the singular, for the error.

    Raises:
        UserError: The folder isn't there, or holds no such file.
    """
    if is_url(str(root)):
        parted = all(shards_in(f"{root}/{name}") for name in ("train", "val"))
        folder: str | Path = f"{root}/{split}" if parted else root
    else:
        root = Path(root)
        if not root.is_dir():
            raise UserError(f"data.root={root}: no such folder")
        parted = (root / "train").is_dir() and (root / "val").is_dir()
        folder = root / split if parted else root
    files = _files(folder, suffixes)
    if not files:
        raise UserError(f"data.root={folder}: no {what} in this folder (looked for {' '.join(suffixes)})")
    if parted or len(files) == 1:
        return files

    def rank(at: int) -> str:
        file = files[at]
        name = file.name if isinstance(file, Member) else file.relative_to(root).as_posix()
        return hashlib.sha256(name.encode(errors="surrogateescape")).hexdigest()

    held = set(sorted(range(len(files)), key=rank)[: min(len(files) - 1, max(1, round(val_share * len(files))))])
    chosen = [at for at in range(len(files)) if (at in held) == (split == "val")]
    return files.chosen(chosen) if isinstance(files, Members) else [files[at] for at in chosen]


def _files(folder: str | Path, suffixes: Collection[str]) -> Sequence[File]:
    """List the files below a folder, or else the members of its shards."""
    loose = [] if isinstance(folder, str) else list(folder.rglob("*"))
    files = sorted(path for path in loose if path.suffix.lower() in suffixes and path.is_file())
    return files or open_shards(folder, lambda name: PurePosixPath(name).suffix.lower() in suffixes)


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
