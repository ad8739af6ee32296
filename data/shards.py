"""Shards: tar files that hold many small files in a row, in WebDataset's layout, and an index beside each.

Many small files are slow to list, to copy and to open, above all over a network. A shard `000000.tar` is an ordinary
tar file, whose members have the names that the files had below their folder. Beside it lies `000000.index.jsonl`: a
line about the shard, then one for each member, with its name, the place and number of its bytes, and what else is known
of it (pixels, samples, frames). So any member is read at once, in any order: a data set of shards resumes as exactly as
one of a folder, and nothing is unpacked or executed (WebDataset's reader runs pickles as it decodes).

To write:

    with ShardWriter(Path("shards")) as shards:
        shards.write("a/1.npy", content, {"frames": 25})  # bytes, or the path of a file

To read, from a folder or whatever fsspec has an address for:

    members = open_shards("shards")  # a sequence of `Member`s, sorted by name
    members[0].name, members[0].facts["frames"], members[0].read()
    with members[0].open() as file: ...  # sought and read like a file
"""

import hashlib
import io
import json
import logging
import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path, PurePosixPath
from types import TracebackType
from typing import Any, BinaryIO

import fsspec
from fsspec.core import url_to_fs

from varitok import UserError

from . import captions
from .archives import BLOCK, MOST_BYTES, Entry, end_of, entry_at, header_of, padding_of, scan
from .members import Member, Members, is_url, let_go, reader_of

__all__ = ["ShardWriter", "index_shard", "open_shards", "shards_in"]

_log = logging.getLogger(__name__)

SUFFIX, INDEX = ".tar", ".index.jsonl"
FORMAT = 1
CHUNK = 1 << 20  # bytes of a file that are held while it is written


def shards_in(folder: str) -> list[tuple[str, int]]:
    """List the shards that lie in a folder: the path or address of each and its bytes, by name.

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


def open_shards(
    folder: str | Path, wanted: Callable[[str], bool] = lambda name: True, *, remake: bool = True
) -> Members:
    """List the members of all shards in a folder, sorted by name.

    Where a shard on this machine has no index, or one that isn't its own any more, that is made anew. Of a shard that
    was cut off later on, all members are listed: those that are lost can't be read, and are named as such.

    Args:
        folder: Path, or an address that fsspec knows: `s3://...`, `https://...`.
        wanted: Tells by their names which members are listed.
        remake: Write an index that was missing.

    Raises:
        UserError: A shard or its index can't be read.
    """
    let_go()
    shards = shards_in(str(folder))
    found = [
        (name.split("/"), number, line)
        for number, (shard, length) in enumerate(shards)
        for name, line in _index(shard, length, remake)
        if wanted(name)
    ]
    found.sort(key=lambda one: one[:2])
    return Members([shard for shard, _ in shards], ((number, line) for _, number, line in found))


def index_of(shard: str) -> str:
    """Tell where a shard's index lies."""
    return shard.removesuffix(SUFFIX) + INDEX


def _index(shard: str, length: int, remake: bool) -> list[tuple[str, bytes]]:
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
        raise UserError(f"{shard}: {reason}; run `varitok shards FOLDER` where the shards lie, and bring it there")
    _log.info("%s %s; it is made", shard, reason)
    try:
        return [(json.loads(line)["name"], line) for line in index_shard(shard, write=remake)]
    except OSError as error:
        raise UserError(f"{shard}: can't be read ({error.strerror or error})") from error


def _check(shard: str, length: int, head: Mapping[str, Any], lines: Sequence[bytes]) -> None:
    """Hold an index against its shard.

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
    # One header tells shards of the same size apart. Over a network it would be a request for each shard.
    if lost < len(lines) and not is_url(shard):
        entry = entry_at(reader_of(shard)(one["offset"] - BLOCK, BLOCK), one["offset"])
        if entry is None or entry.size != one["size"] or _misnamed(entry.name, one["name"]):
            raise ValueError


def _misnamed(short: str, name: str) -> bool:
    """Tell whether a header's own name is another; a long one stands before it, or only in part there."""
    return len(name) <= 100 and name.isascii() and short != name


def index_shard(
    shard: str, facts: Callable[[Member], Mapping[str, Any]] = lambda member: {}, *, write: bool = True
) -> list[bytes]:
    """Make the index of a shard on this machine; give its lines, one for each member.

    Args:
        shard: Path of the tar file.
        facts: Tells what is to be known of a member; of its caption its own facts tell already.
        write: Lay it beside the shard; where that can't be written, it is only given.

    Raises:
        OSError: The shard can't be read.
    """
    length = os.stat(shard).st_size
    with open(shard, "rb") as file:
        entries = list(scan(file, length))
    members = _captioned([Member(shard, *entry) for entry in entries])
    lines = [_line(entry, {**member.facts, **facts(member)}) for entry, member in zip(entries, members, strict=True)]
    if entries and entries[-1].offset + entries[-1].size > length:
        _log.warning("%s ends within %s: what came behind is lost", shard, Member(shard, *entries[-1]))
    if write:
        try:
            _write_index(Path(index_of(shard)), Path(shard).name, length, lines)
        except OSError as error:
            _log.warning("%s can't be written (%s): it is made at each start", index_of(shard), error.strerror)
    return lines


def _captioned(members: Sequence[Member]) -> list[Member]:
    """Let each member know what is said by the text that has its key."""
    texts = {_key(member.name): member for member in members if member.suffix == captions.SUFFIX}
    found = []
    for member in members:
        text = texts.get(_key(member.name))
        about = {}
        if text is not None and text is not member:
            with suppress(OSError):  # of a shard that was cut off
                about = {"caption": captions.read_caption(text)}
        found.append(member._replace(facts=about))
    return found


def _key(name: str) -> str:
    """Give what a sample's members share: all up to the first dot of the name's last part (WebDataset's layout)."""
    place = PurePosixPath(name)
    return str(place.with_name(place.name.partition(".")[0] or place.name))


def _line(entry: Entry, facts: Mapping[str, Any]) -> bytes:
    return json.dumps({**entry._asdict(), **facts}, separators=(",", ":")).encode() + b"\n"


def _write_index(path: Path, shard: str, length: int, lines: Sequence[bytes], **more: Any) -> None:
    """Write an index whole, or not at all."""
    head = {"format": FORMAT, "shard": shard, "bytes": length, "members": len(lines), **more}
    partial_path = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        partial_path.write_bytes(b"".join([json.dumps(head).encode() + b"\n", *lines]))
        partial_path.replace(path)
    finally:
        partial_path.unlink(missing_ok=True)


class ShardWriter:
    """Writes shards and their indices into a new folder, which is there as a whole or not at all; a context manager.

    The same members in the same order give the same bytes, on any machine.

    Args:
        folder: Where they are to lie; it must not be there yet, or be empty.
        size: Bytes of a shard, about; a larger member has one of its own.

    Attributes:
        members: Number of those written.
        bytes: Of their content.
        shards: Number of shards.

    Raises:
        UserError: The folder has something in it, or can't be written.
    """

    def __init__(self, folder: Path, size: int = 256 << 20) -> None:
        self.folder = folder.resolve()
        if self.folder.exists() and (not self.folder.is_dir() or any(self.folder.iterdir())):
            raise UserError(f"{folder}: is not empty; name a new folder for the shards")
        self.size = size
        self.members = self.bytes = self.shards = 0
        self._partial = self.folder.with_name(f".{self.folder.name}.{os.getpid()}.partial")
        self._file: BinaryIO | None = None
        self._lines: list[bytes] = []
        self._place = PurePosixPath()
        self._numbers: dict[PurePosixPath, int] = {}

    def __enter__(self) -> "ShardWriter":
        try:
            self.folder.parent.mkdir(parents=True, exist_ok=True)
            self._partial.mkdir()
        except OSError as error:
            raise UserError(f"{self.folder}: can't be written ({error.strerror}); name another folder") from error
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        try:
            self._finish()
            if kind is None:
                if self.folder.exists():
                    self.folder.rmdir()  # empty, or this fails
                self._partial.rename(self.folder)
        except OSError as failure:
            if kind is None:
                raise UserError(f"{self.folder}: can't be written ({failure.strerror or failure})") from failure
        finally:
            shutil.rmtree(self._partial, ignore_errors=True)

    def write(self, name: str, content: bytes | Path, facts: Mapping[str, Any] | None = None, part: str = "") -> None:
        """Write a member.

        Args:
            name: Of the member; what follows the first dot of its last part is its kind, in WebDataset's layout.
            content: Its bytes, or a file, of which little is held in memory.
            facts: What its index is to tell; JSON's types.
            part: A subfolder whose shards have it, such as "train"; each part's members must follow one another.

        Raises:
            UserError: It can't be read or written.
        """
        try:
            source = io.BytesIO(content) if isinstance(content, bytes) else content.open("rb")
            with source:
                self._add(name, source, source.seek(0, os.SEEK_END), facts or {}, PurePosixPath(part))
        except (OSError, ValueError) as error:
            raise UserError(f"{name}: can't be written as a member of a shard ({error})") from error

    def _add(self, name: str, source: BinaryIO, size: int, facts: Mapping[str, Any], place: PurePosixPath) -> None:
        header = header_of(name, size)
        if size > MOST_BYTES:
            raise ValueError(f"{size} bytes are more than {MOST_BYTES}")
        full = self._file is not None and self._file.tell() + len(header) + size > self.size
        if self._file is None or full or place != self._place:
            self._finish()
            self._begin(place)
        assert self._file is not None
        self._put(header)
        offset = self._file.tell()
        source.seek(0)
        while chunk := source.read(CHUNK):
            self._put(chunk)
        if self._file.tell() - offset != size:
            raise ValueError("it changed while it was read")
        self._put(padding_of(size))
        self._lines.append(_line(Entry(name, offset, size), facts))
        self.members += 1
        self.bytes += size

    def _put(self, content: bytes) -> None:
        assert self._file is not None
        self._file.write(content)
        self._hash.update(content)

    def _begin(self, place: PurePosixPath) -> None:
        """Begin a shard."""
        number = self._numbers.get(place, 0)
        self._numbers[place] = number + 1
        self._place = place
        self._lines = []
        self._hash = hashlib.sha256()
        folder = self._partial / place
        folder.mkdir(parents=True, exist_ok=True)
        self._file = (folder / f"{number:06}{SUFFIX}").open("wb")

    def _finish(self) -> None:
        """End a shard and write its index."""
        if self._file is None:
            return
        self._put(end_of(self._file.tell()))
        length, path = self._file.tell(), Path(self._file.name)
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()
        self._file = None
        _write_index(Path(index_of(str(path))), path.name, length, self._lines, sha256=self._hash.hexdigest())
        self.shards += 1
