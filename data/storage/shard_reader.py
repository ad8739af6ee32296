"""Read shards: tar files of many small files, in WebDataset's layout, with an index beside each.

Many small files are slow to list, copy and open, especially over a network. A shard `000000.tar` is an ordinary tar
file, whose members are named by their paths relative to the packed folder. Its index `000000.index.jsonl` has a line
about the shard, then one per member, with its name, offset, size and header (pixels, samples, frames). If `varitok
shards` had to rename a file, `a.b.png` to `a_b.png`, the index has its path too, as `source`.
So members are read at random: a dataset of shards resumes as exactly as one of a folder. Nothing is unpacked or
executed (WebDataset's reader runs pickles as it decodes).

To write:

    with ShardWriter(Path("shards")) as shards:
        shards.write("a/1.npy", content, {"frames": 25})  # bytes, or the path of a file

To read, from a folder or an fsspec URL:

    members = open_shards("shards")  # a sequence of `Member`, sorted by name
    members[0].name, members[0].facts["frames"], members[0].read()
    with members[0].open() as file: ...  # a seekable file
"""

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO, cast

from varitok import UserError

from .file_index import Entry, FileIndex, Files, build_index, write_index
from .index_cache import is_large, share_index
from .members import Member, clear_handles, is_url, reader_of, source_of
from .shard_index import FORMAT, SUFFIX, _log, index_of, index_shard
from .tar import BLOCK, read_header

__all__ = ["index_shards", "open_index", "open_shards", "shards_in", "subfolders"]

WHOLE = ".index.safetensors"  # index of all shards of a folder, in the folder
READERS = 16  # threads that check whether it is current


def shards_in(folder: str) -> list[tuple[str, int]]:
    """List the shards in a folder, sorted: path or URL of each, and its size in bytes.

    Raises:
        UserError: fsspec doesn't support the URL, or can't reach it.
    """
    if not is_url(folder):
        paths = sorted(path for path in Path(folder).glob("[!.]*" + SUFFIX) if path.is_file())
        return [(str(path), path.stat().st_size) for path in paths]
    with _convert_errors(folder):
        files, entries = _entries(folder)
        found = {one["name"]: one["size"] for one in entries if _is_shard(one["name"])}
        return [
            (files.unstrip_protocol(name), int(files.size(name) if size is None else size))
            for name, size in sorted(found.items())
        ]


def subfolders(folder: str) -> list[str]:
    """List the names of a folder's subfolders, sorted, without hidden ones.

    Raises:
        UserError: The folder can't be read, or fsspec doesn't support the URL.
    """
    with _convert_errors(folder):
        if is_url(folder):
            entries = _entries(folder)[1]
            names = {one["name"].rstrip("/").rpartition("/")[2] for one in entries if one["type"] == "directory"}
        else:
            with os.scandir(folder) as found:
                names = {entry.name for entry in found if entry.is_dir()}
    return sorted(name for name in names if not name.startswith("."))


def _entries(url: str) -> tuple[Any, list[dict[str, Any]]]:
    """List a folder at a URL: its file system, and the entries."""
    from fsspec.core import url_to_fs  # noqa: PLC0415 (training brings it; local shards don't need it)

    files, path = url_to_fs(url)
    files.invalidate_cache()
    return files, files.ls(path, detail=True) if files.isdir(path) else []


def _is_shard(name: str) -> bool:
    return name.endswith(SUFFIX) and not name.rpartition("/")[2].startswith(".")


@contextmanager
def _convert_errors(folder: str) -> Iterator[None]:
    """Convert ValueError, ImportError, OSError and errors of fsspec's file systems into a `UserError`."""
    try:
        yield
    except Exception as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise UserError(f"data.root={folder}: can't be read ({reason})") from error


def open_shards(folder: str | Path) -> Files[Member]:
    """List the members of all shards in a folder, sorted by `Member.source`.

    If a local shard has no index, or an outdated one, it is rebuilt. If a shard was truncated after it was indexed,
    all its members are listed; reading a lost one raises an error that names it.

    The index of all shards together is kept in the folder, or else in the user's cache, if it has 10,000 members.

    Args:
        folder: Path, or an fsspec URL: `s3://...`, `https://...`.

    Raises:
        UserError: A shard or its index can't be read.
    """
    clear_handles()
    root = str(folder)
    shards = shards_in(root)
    beside = None if is_url(root) else Path(root) / WHOLE
    return Files(
        share_index(
            root,
            beside=beside,
            about="shards",
            is_current=lambda index: _is_current(index, shards),
            build=lambda: _build(root, shards),
        )
    )


def index_shards(folder: str | Path) -> None:
    """Write the index of all shards of a local folder, if they have 10,000 members or more."""
    index = _build(str(folder), shards_in(str(folder)))
    if is_large(len(index)):
        write_index(index, Path(folder) / WHOLE)


def _build(root: str, shards: Sequence[tuple[str, int]]) -> FileIndex:
    """Build the index of all shards of a folder, from those of the shards."""
    about: list[dict[str, Any]] = []

    def entries() -> Iterator[Entry]:
        for number, (shard, length) in enumerate(shards):
            lines = _index(shard, length)
            last, lost = _last_whole(lines, length)
            name = shard if is_url(shard) else Path(shard).name
            about.append({"name": name, "bytes": length, "members": len(lines), "lost": lost, "last": last})
            for line in lines:
                yield Entry(source_of(line), number, line)

    index = build_index(root, entries(), about)
    _warn_of_lost(index)
    return index


def _is_current(index: FileIndex, shards: Sequence[tuple[str, int]]) -> bool:
    """Return whether an index is of these shards as they are now."""
    if [(one["name"], one["bytes"]) for one in index.header["shards"]] != [
        (shard if is_url(shard) else Path(shard).name, length) for shard, length in shards
    ]:
        return False
    lasts = [(shard, about["last"]) for (shard, _), about in zip(shards, index.header["shards"], strict=True)]
    with ThreadPoolExecutor(READERS) as readers:  # over a network each waits
        same = all(readers.map(lambda one: not one[1] or _has_member(*one), lasts))
    if same:
        _warn_of_lost(index)
    return same


def _warn_of_lost(index: FileIndex) -> None:
    for shard, about in zip(index.shards or (), index.header["shards"], strict=True):
        if about["lost"]:
            _log.warning("%s is truncated: %d of its %d members are lost", shard, about["lost"], about["members"])


def _index(shard: str, length: int) -> list[bytes]:
    """Read the lines of a shard's index, or build it."""
    try:
        with open_index(shard) as file:
            head, *lines = file.read().splitlines(keepends=True)
        _check(shard, length, json.loads(head), lines)
        for line in lines:
            source_of(line)
        return lines
    except FileNotFoundError:
        reason = "has no index"
    except (ValueError, KeyError, TypeError):  # from parsing JSON, or from `_check`
        reason = "has an index that doesn't match it"
    except Exception as error:  # errors of fsspec's file systems
        raise UserError(f"{index_of(shard)}: can't be read ({' '.join(str(error).split())})") from error
    if is_url(shard):
        raise UserError(f"{shard}: {reason}; run `varitok shards FOLDER` where the shards are, and copy the index too")
    _log.info("%s %s; building the index", shard, reason)
    try:
        return index_shard(shard)
    except OSError as error:
        raise UserError(f"{shard}: can't be read ({error.strerror or error})") from error


def open_index(shard: str) -> BinaryIO:
    """Open the index of a shard, by the shard's path or URL.

    Raises:
        FileNotFoundError: There is none.
    """
    if not is_url(shard):
        return open(index_of(shard), "rb")
    import fsspec  # noqa: PLC0415 (training brings it; local shards don't need it)

    return cast(BinaryIO, fsspec.open(index_of(shard), "rb").open())


def _check(shard: str, length: int, head: Mapping[str, Any], lines: Sequence[bytes]) -> None:
    """Check that an index belongs to a shard.

    Raises:
        ValueError: The index belongs to another shard, or has another format.
    """
    if head["format"] != FORMAT or head["members"] != len(lines) or length > head["bytes"]:
        raise ValueError
    last, _ = _last_whole(lines, length)
    if last and not _has_member(shard, last):
        raise ValueError


def _last_whole(lines: Sequence[bytes], length: int) -> tuple[dict[str, Any] | None, int]:
    """Return the name, offset and size of the last member before `length`, if any, and the number of those after it."""
    for lost, line in enumerate(reversed(lines)):
        one = json.loads(line)
        if one["offset"] + one["size"] <= length:
            return {key: one[key] for key in ("name", "offset", "size")}, lost
    return None, len(lines)


def _has_member(shard: str, one: Mapping[str, Any]) -> bool:
    """Return whether a member is where an index says, which distinguishes shards of the same size.

    At URLs that isn't checked: it would cost a request for each shard.
    """
    if is_url(shard):
        return True
    header, name = read_header(reader_of(shard)(one["offset"] - BLOCK, BLOCK)), one["name"]
    # A long name is stored before the header, which contains only part of it.
    misnamed = header is not None and len(name) <= 100 and name.isascii() and header.name != name
    return header is not None and header.size == one["size"] and not misnamed
