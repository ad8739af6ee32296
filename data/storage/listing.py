"""List the files of a folder or of its shards, and split them into training and validation."""

import hashlib
from collections.abc import Collection, Sequence
from pathlib import Path, PurePosixPath

from varitok import UserError

from .members import File, Member, Members, is_url
from .shard_reader import open_shards, shards_in

__all__ = ["list_files"]


def list_files(root: str | Path, split: str, val_share: float, suffixes: Collection[str], what: str) -> Sequence[File]:
    """List the files of a split, sorted: files below a folder, or members of the shards in it.

    If the folder has subfolders `train` and `val`, these are the splits. Otherwise a share of the files is held out,
    chosen by the hash of each path relative to the folder. A single file is in both splits. So a folder and the
    shards that `varitok shards` packs from it have the same splits, in the same order.

    Args:
        root: The folder, with files at any depth or shards directly in it; or an fsspec URL of shards.
        split: "train" or "val".
        val_share: Share of the files that is held out.
        suffixes: Suffixes of the files, in lower case, with their dots.
        what: Noun for the files, in the singular, for the error message.

    Raises:
        UserError: The folder doesn't exist, or contains no such file.
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
    return files.select(chosen) if isinstance(files, Members) else [files[at] for at in chosen]


def _files(folder: str | Path, suffixes: Collection[str]) -> Sequence[File]:
    """List the files below a folder; if there are none, the members of its shards."""
    loose = [] if isinstance(folder, str) else list(folder.rglob("*"))
    files = sorted(path for path in loose if path.suffix.lower() in suffixes and path.is_file())
    return files or open_shards(folder, lambda name: PurePosixPath(name).suffix.lower() in suffixes)
