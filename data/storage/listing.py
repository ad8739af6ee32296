"""List the files of a folder or of its shards, and split them into training and validation."""

import hashlib
import logging
import os
import re
from collections import Counter, defaultdict
from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, NamedTuple, TypeAlias

from varitok import UserError

from .folders import describe_skipped, find_files, printable, skip_reason
from .members import File, Member, Members, is_url
from .shard_reader import open_shards, subfolders

__all__ = ["Share", "SplitFiles", "list_splits", "name_in", "require_undivided", "split_folders"]

_log = logging.getLogger(__name__)

TRAINING = ("train", "training")
VALIDATION = ("val", "valid", "validation", "dev", "eval", "evaluation")
TEST = ("test", "testing")
HELD_OUT = VALIDATION + TEST
Share: TypeAlias = Annotated[float, "[0, 1]"]
"""Share of files that is held out; 1 puts all in both splits."""


class SplitFiles(NamedTuple):
    """The files of both splits of a dataset, sorted.

    Attributes:
        train: Training files.
        val: Validation files.
    """

    train: Sequence[File]
    val: Sequence[File]


def list_splits(root: str | Path, val_share: Share, suffixes: Collection[str], what: str) -> SplitFiles:
    """List the files of both splits, sorted: files below a folder, or members of the shards in it.

    If the folder has subfolders for training and validation (`split_folders`), these are the splits. Otherwise a share
    of the files is held out, chosen by the hash of each path relative to the folder. A single file is in both splits.
    So a folder and the shards that `varitok shards` packs from it have the same splits, in the same order.
    One line about the result is logged.

    Args:
        root: The folder, with files at any depth or shards directly in it; or an fsspec URL of shards.
        val_share: Share of the files that is held out; 1: each file is in both splits, as for a test set.
        suffixes: Suffixes of the files, in lower case, with their dots.
        what: Noun for the files, in the singular, for the error message.

    Raises:
        UserError: The folder doesn't exist or contains no such file, or its splits are ambiguous or share a file.
    """
    if not is_url(str(root)) and not Path(root).is_dir():
        raise UserError(f"data.root={root}: no such folder")
    parts = split_folders(root)
    folders = [_subfolder(root, part) for part in parts] if parts else [root]
    skipped = Counter[str]()
    linked: dict[Path, str] = {}
    found = [_files(folder, suffixes, what, skipped, linked) for folder in folders]
    if parts:
        splits = SplitFiles(*found)
        if linked:
            _require_apart(root, folders, splits, linked)
    else:
        names = [name_in(root, file) for file in found[0]]
        require_undivided(root, names)
        splits = _hold_out(found[0], names, val_share)
    _log.info("%s", _describe(root, parts, splits) + describe_skipped(skipped))
    return splits


def split_folders(root: str | Path) -> tuple[str, str] | None:
    """Return the names of a folder's subfolders for training and validation; None if it doesn't have both.

    They are `train` or `training`, beside `val`, `valid`, `validation`, `dev`, `eval` or `evaluation`, in any case. If
    there is none of the latter, `test` or `testing` is for validation.

    Raises:
        UserError: There are several of a kind.
    """
    names = subfolders(str(root))
    train, val, test = ([name for name in names if name.lower() in known] for known in (TRAINING, VALIDATION, TEST))
    held = val or test
    if len(train) == len(held) == 1:
        return train[0], held[0]
    if train and held:
        raise UserError(
            f"data.root={root}: has {_folders([*train, *held])}; keep one folder for training and one for validation"
        )
    return None


def require_undivided(root: str | Path, names: Iterable[str]) -> None:
    """Check that no subfolder of a folder without `split_folders` looks like a split: a test set isn't trained on.

    Args:
        root: The folder.
        names: Paths of its files relative to it, with slashes.

    Raises:
        UserError: Some folder has `train/` beside `test/`, `train2017/` beside `val2017/` and so on, or the folder
            itself has other files beside `test/`.
    """
    children = defaultdict[str, set[str]](set)
    folders = {name.rpartition("/")[0] for name in names}
    for parts in (folder.split("/") for folder in folders if folder):
        for depth, own in enumerate(parts):
            children["/".join(parts[:depth])].add(own)
    for parent, owns in sorted(children.items()):
        paths = {own: f"{parent}/{own}" if parent else own for own in sorted(owns)}
        train, held = ([paths[own] for own in paths if _first_word(own) in known] for known in (TRAINING, HELD_OUT))
        if train and held:
            raise UserError(
                f"data.root={root}: has {_folders([*train, *held])}, which look like splits; give a folder with one"
                " train/ and one val/, or rename these"
            )
    held = sorted(own for own in children[""] if own.lower() in HELD_OUT)
    if held and ("" in folders or len(held) < len(children[""])):
        raise UserError(
            f"data.root={root}: has {_folders(held)}, but no train/; move the training files to train/, or rename"
            f" {held[0]}/"
        )


def _first_word(name: str) -> str:
    """Return the letters before the first other character, in lower case: "val" of "val2017"."""
    return re.split(r"[^a-z]", name.lower(), maxsplit=1)[0]


def _folders(names: Sequence[str]) -> str:
    return " beside ".join(f"{printable(name)}/" for name in names)


def _subfolder(root: str | Path, name: str) -> str | Path:
    return f"{root}/{name}" if is_url(str(root)) else Path(root) / name


def _require_apart(
    root: str | Path, folders: Sequence[str | Path], splits: SplitFiles, linked: Mapping[Path, str]
) -> None:
    """Check that no link makes a file part of both splits."""
    train, val = (
        {
            linked.get(file) or os.path.join(os.path.realpath(folder), file.relative_to(folder)): file
            for file in files
            if isinstance(file, Path)
        }
        for folder, files in zip(folders, splits, strict=True)
    )
    if both := sorted(train.keys() & val.keys()):
        names = " and ".join(printable(name_in(root, split[both[0]])) for split in (train, val))
        raise UserError(
            f"data.root={root}: {names} are one file; remove the link, since a file in both splits is trained and"
            " tested on"
        )


def _files(
    folder: str | Path, suffixes: Collection[str], what: str, skipped: Counter[str], linked: dict[Path, str]
) -> Sequence[File]:
    """List the files below a folder; if there are none, the members of its shards."""

    def wanted(name: str) -> bool:
        reason = skip_reason(name, suffixes)
        skipped.update([reason] if reason else [])
        return not reason

    files: Sequence[File] = []
    if not is_url(str(folder)):
        files, others, links = find_files(Path(folder), suffixes)
        skipped.update(others)
        linked |= links
    files = files or open_shards(folder, wanted)
    if not files:
        looked = f"(looked for {' '.join(suffixes)})"
        raise UserError(f"data.root={folder}: no {what} in this folder {looked}{describe_skipped(skipped)}")
    return files


def _hold_out(files: Sequence[File], names: Sequence[str], val_share: float) -> SplitFiles:
    """Split files by the hashes of their names."""
    if len(files) == 1 or val_share == 1:
        return SplitFiles(files, files)
    ranks = [hashlib.sha256(name.encode(errors="surrogateescape")).hexdigest() for name in names]
    count = min(len(files) - 1, max(1, round(val_share * len(files))))
    held = set(sorted(range(len(files)), key=ranks.__getitem__)[:count])
    train, val = ([at for at in range(len(files)) if (at in held) == is_val] for is_val in (False, True))
    return SplitFiles(_select(files, train), _select(files, val))


def _select(files: Sequence[File], indices: Sequence[int]) -> Sequence[File]:
    return files.select(indices) if isinstance(files, Members) else [files[at] for at in indices]


def name_in(root: str | Path, file: File) -> str:
    """Return the path of a file relative to its dataset's folder, or to the folder that was packed."""
    return file.source if isinstance(file, Member) else file.relative_to(root).as_posix()


def _describe(root: str | Path, parts: tuple[str, str] | None, splits: SplitFiles) -> str:
    """Describe both splits: number of files, first and last name."""
    found = []
    for at, (noun, files) in enumerate(zip(("training", "validation"), splits, strict=True)):
        folder = _subfolder(root, parts[at]) if parts else root
        first, last = (printable(name_in(folder, file)) for file in (files[0], files[-1]))
        where = f" in {printable(parts[at])}/" if parts else ""
        found.append(f"{len(files):,} for {noun}{where} ({first} ... {last})")
    return f"data.root={printable(root)}: {', '.join(found)}"
