"""List the files of a folder or of its shards, and split them into training and validation."""

import logging
import os
from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, NamedTuple, TypeAlias

from varitok import UserError

from .file_index import Entry, FileIndex, Files, build_index, hash_of
from .folders import changed_at, describe_skipped, find_files, printable
from .index_cache import is_large, share_index
from .members import File, Member, is_url
from .shard_reader import open_shards, subfolders
from .split_names import TEST, TRAINING, VALIDATION, join_folders, require_undivided

__all__ = ["Share", "SplitFiles", "list_splits", "name_in", "names_in", "split_folders"]

_log = logging.getLogger(__name__)

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

    10,000 files or more are listed by one process of a machine, and mapped by the others; the next start lists them
    only if some folder has changed since.

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
    found = [_list(folder, suffixes, what) for folder in folders]
    files = [one.files for one in found]
    if parts:
        splits = SplitFiles(*files)
        if any(one.linked or os.path.islink(folder) for one, folder in zip(found, folders, strict=True)):
            _require_apart(root, parts, found)
    else:
        require_undivided(root, _folders(root, files[0]))
        splits = _hold_out(root, files[0], val_share)
    skipped = sum((one.skipped for one in found), Counter[str]())
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
            f"data.root={root}: has {join_folders([*train, *held])}; keep one folder for training and one for"
            " validation"
        )
    return None


def _subfolder(root: str | Path, name: str) -> str | Path:
    return f"{root}/{name}" if is_url(str(root)) else Path(root) / name


class _Listed(NamedTuple):
    """The files of a folder, the numbers of those skipped, and the real paths of those behind a link, by name."""

    files: Sequence[File]
    skipped: Counter[str]
    linked: Mapping[str, str]


def _require_apart(root: str | Path, parts: Sequence[str], found: Sequence[_Listed]) -> None:
    """Check that no link makes a file part of both splits."""
    train, val = (
        {
            one.linked.get(name) or os.path.join(os.path.realpath(Path(root, part)), name): f"{part}/{name}"
            for name in names_in(Path(root, part), one.files)
        }
        for part, one in zip(parts, found, strict=True)
    )
    if both := sorted(train.keys() & val.keys()):
        names = " and ".join(printable(split[both[0]]) for split in (train, val))
        raise UserError(
            f"data.root={root}: {names} are one file; remove the link, since a file in both splits is trained and"
            " tested on"
        )


def _list(folder: str | Path, suffixes: Collection[str], what: str) -> _Listed:
    """List the files below a folder; if there are none, the members of its shards."""
    skipped = Counter[str]()
    if not is_url(str(folder)):
        index = share_index(
            str(folder),
            beside=None,
            about=" ".join(suffixes),
            is_current=_is_current,
            build=lambda: _build(Path(folder), suffixes),
        )
        skipped.update(index.header["skipped"])
        if len(index):
            files: Files[Path] = Files(index)
            return _Listed(files if is_large(len(index)) else list(files), skipped, index.header["linked"])
    members, others = open_shards(folder).of_kinds(suffixes)
    skipped += others
    if not members:
        looked = f"(looked for {' '.join(suffixes)})"
        raise UserError(f"data.root={folder}: no {what} in this folder {looked}{describe_skipped(skipped)}")
    return _Listed(members, skipped, {})


def _build(folder: Path, suffixes: Collection[str]) -> FileIndex:
    """Search a folder, and build the index of its files."""
    files, skipped, linked, searched = find_files(folder, suffixes)
    names = (file.relative_to(folder).as_posix() for file in files)
    return build_index(
        str(folder),
        (Entry(name, 0, os.fsencode(name)) for name in names),
        skipped=skipped,
        linked={path.relative_to(folder).as_posix(): real for path, real in linked.items()},
        searched={os.path.relpath(path, folder): changed for path, changed in searched.items()},
    )


def _is_current(index: FileIndex) -> bool:
    """Return whether no folder has changed since it was searched."""
    searched: Mapping[str, int] = index.header["searched"]
    return all(seen and seen == changed_at(os.path.join(index.root, path)) for path, seen in searched.items())


def _hold_out(root: str | Path, files: Sequence[File], val_share: float) -> SplitFiles:
    """Split files by the hashes of their names."""
    if len(files) == 1 or val_share == 1:
        return SplitFiles(files, files)
    count = min(len(files) - 1, max(1, round(val_share * len(files))))
    if isinstance(files, Files):
        return SplitFiles(*files.hold_out(count))
    hashes = [hash_of(name) for name in names_in(root, files)]
    held = set(sorted(range(len(files)), key=hashes.__getitem__)[:count])
    return SplitFiles(*([file for at, file in enumerate(files) if (at in held) == is_val] for is_val in (False, True)))


def _folders(root: str | Path, files: Sequence[File]) -> set[str]:
    """Return the folders of files, relative to the dataset's, or as much of them as `require_undivided` needs."""
    if isinstance(files, Files):
        return files.folders()
    return {name.rpartition("/")[0] for name in names_in(root, files)}


def names_in(root: str | Path, files: Sequence[File]) -> Iterator[str]:
    """Yield the path of each file relative to its dataset's folder; see `name_in`."""
    return files.sources() if isinstance(files, Files) else (name_in(root, file) for file in files)


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
