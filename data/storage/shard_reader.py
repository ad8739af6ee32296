"""Shards: tar files that hold many small files in a row, in WebDataset's layout, and an index beside each.

Many small files are slow to list, to copy and to open, above all over a network. A shard `000000.tar` is an ordinary
tar file, whose members have the names that the files had below their folder. Beside it is `000000.index.jsonl`: a
line about the shard, then one for each member, with its name, offset, size and header
(pixels, samples, frames). So any member is read at once, in any order: a data set of shards resumes as exactly as
one of a folder, and nothing is unpacked or executed (WebDataset's reader runs pickles as it decodes).

To write:

    with ShardWriter(Path("shards")) as shards:
        shards.write("a/1.npy", content, {"frames": 25})  # bytes, or the path of a file

To read, from a folder or whatever fsspec has an address for:

    members = open_shards("shards")  # a sequence of `Member`s, sorted by name
    members[0].name, members[0].facts["frames"], members[0].read()
    with members[0].open() as file: ...  # sought and read like a file
"""

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import fsspec
from fsspec.core import url_to_fs

from varitok import UserError

from .members import Members, clear_handles, is_url, reader_of
from .shard_index import FORMAT, SUFFIX, _log, index_of, index_shard
from .tar import BLOCK, read_header

__all__ = ["open_shards", "shards_in"]


def shards_in(folder: str) -> list[tuple[str, int]]:
    """List the shards in a folder: the path or address of each and its bytes, by name.

    Raises:
        UserError: fsspec doesn't know such addresses, or can't reach this one.
    """
    if not is_url(folder):
        paths = sorted(path for path in Path(folder).glob("*" + SUFFIX) if path.is_file())
        return [(str(path), path.stat().st_size) for path in paths]
    try:
        files, path = url_to_fs(folder)
        files.invalidate_cache()
        told = files.ls(path, detail=True) if files.isdir(path) else []
        found = {one["name"]: one["size"] for one in told if one["name"].endswith(SUFFIX)}
        return [
            (files.unstrip_protocol(name), int(files.size(name) if size is None else size))
            for name, size in sorted(found.items())
        ]
    except Exception as error:  # ValueError, ImportError, OSError and what each of its file systems raises
        reason = " ".join(str(error).split()) or type(error).__name__
        raise UserError(f"data.root={folder}: can't be read ({reason})") from error


def open_shards(folder: str | Path, wanted: Callable[[str], bool] = lambda name: True) -> Members:
    """List the members of all shards in a folder, sorted by name.

    Where a shard on this machine has no index, or one that isn't its own any more, that is made anew. Of a shard that
    was cut off later on, all members are listed: those that are lost can't be read, and are named as such.

    Args:
        folder: Path, or an address that fsspec knows: `s3://...`, `https://...`.
        wanted: Tells by their names which members are listed.

    Raises:
        UserError: A shard or its index can't be read.
    """
    clear_handles()
    shards = shards_in(str(folder))
    found = [
        (name.split("/"), number, line)
        for number, (shard, length) in enumerate(shards)
        for name, line in _index(shard, length)
        if wanted(name)
    ]
    found.sort(key=lambda one: one[:2])
    return Members([shard for shard, _ in shards], ((number, line) for _, number, line in found))


def _index(shard: str, length: int) -> list[tuple[str, bytes]]:
    """Read a shard's index, or make it: the name of each member, and its line."""
    try:
        with fsspec.open(index_of(shard), "rb") as file:
            head, *lines = file.read().splitlines(keepends=True)
        _check(shard, length, json.loads(head), lines)
        return [(str(json.loads(line)["name"]), line) for line in lines]
    except FileNotFoundError:
        reason = "has no index"
    except (ValueError, KeyError, TypeError):  # JSON's, or ours
        reason = "has an index that isn't its own"
    except Exception as error:  # whatever a file system of fsspec's raises
        raise UserError(f"{index_of(shard)}: can't be read ({' '.join(str(error).split())})") from error
    if is_url(shard):
        raise UserError(f"{shard}: {reason}; run `varitok shards FOLDER` where the shards are, and copy the index too")
    _log.info("%s %s; it is made", shard, reason)
    try:
        return [(json.loads(line)["name"], line) for line in index_shard(shard)]
    except OSError as error:
        raise UserError(f"{shard}: can't be read ({error.strerror or error})") from error


def _check(shard: str, length: int, head: Mapping[str, Any], lines: Sequence[bytes]) -> None:
    """Compare an index with its shard.

    Raises:
        ValueError: It isn't this shard's.
    """
    if head["format"] != FORMAT or head["members"] != len(lines) or length > head["bytes"]:
        raise ValueError
    lost = 0
    for line in reversed(lines):
        one = json.loads(line)
        if one["offset"] + one["size"] <= length:
            break
        lost += 1
    if lost:
        _log.warning("%s was cut off: %d of its %d members are lost", shard, lost, len(lines))
    # One header distinguishes shards of the same size. Over a network it would be a request for each shard.
    if lost < len(lines) and not is_url(shard):
        header, name = read_header(reader_of(shard)(one["offset"] - BLOCK, BLOCK)), one["name"]
        # A long name stands before its header, or only in part there.
        misnamed = header is not None and len(name) <= 100 and name.isascii() and header.name != name
        if header is None or header.size != one["size"] or misnamed:
            raise ValueError
