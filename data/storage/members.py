"""Members of shards: files within tar files, with the part of the `Path` interface that decoders use."""

import io
import json
import os
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from functools import lru_cache, partial
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO, NamedTuple, TypeAlias

from .folders import printable

__all__ = [
    "File", "InMemory", "Member", "Reader", "Source",
    "clear_handles", "is_url", "open_file", "parse_member", "read_ahead", "reader_of", "source_of", "to_source",
]  # fmt: skip

MOST_READ = 1 << 30  # bytes; larger members can't be read at once
CHUNK = 1 << 20  # bytes; read-ahead buffer of an open member
GAP, MOST_HELD = 1 << 16, 1 << 24  # bytes between members, and of all, that are read at once
WAITS = (0.5, 2.0)  # seconds between the attempts of a request


class Member(NamedTuple):
    """A file in a shard, usable in place of a `Path`: both have `suffix`, `open()` and `str()`.

    Attributes:
        shard: Path or URL of the tar file.
        name: Its name in the tar file: a path with slashes.
        offset: Offset of its first byte in the shard.
        size: Size in bytes.
        facts: Its metadata in the index: `width`, `height`, `samples`, `sample_rate`, `source` ...
    """

    shard: str
    name: str
    offset: int
    size: int
    facts: Mapping[str, Any] = {}

    def __str__(self) -> str:
        """Return "shard/name"; unprintable characters are escaped."""
        return f"{self.shard}/{printable(self.name)}"

    @property
    def source(self) -> str:
        """Path of the packed file relative to its folder; it differs from `name` if `varitok shards` renamed it."""
        return str(self.facts.get("source", self.name))

    @property
    def suffix(self) -> str:
        """Suffix of the name, with its dot."""
        return PurePosixPath(self.name).suffix

    def open(self, mode: str = "rb") -> BinaryIO:
        """Open the member as a seekable binary file; members above 1 MiB are read in parts, on demand.

        `mode` exists for compatibility with `Path` and is ignored.

        Raises:
            OSError: The shard is missing or ends within the member. At a URL, a large member raises it while reading.
        """
        read = reader_of(self.shard)
        # Checked here, because libsndfile prints exceptions that are raised while it reads.
        lost = OSError(f"its shard ends before the last of its {self.size} bytes")
        if self.size <= CHUNK:
            content = _held(self) or (read(self.offset, self.size) if self.size else b"")
            if len(content) < self.size:
                raise lost
            return _Whole(self, content)
        if not is_url(self.shard) and not read(self.offset + self.size - 1, 1):
            raise lost
        return _Stream(self, read)

    def read(self) -> bytes:
        """Return the whole content.

        Raises:
            OSError: The member can't be read, or is larger than 1 GiB.
        """
        if self.size > MOST_READ:
            raise OSError(f"{self.size} bytes are too many to be read at once")
        with self.open() as file:
            return file.read()


class InMemory(NamedTuple):
    """A file in memory, such as standard input, usable in place of a `Path`.

    Attributes:
        name: What errors call it; its suffix, if it has one, is the file's.
        content: Its bytes.
    """

    name: str
    content: bytes

    def __str__(self) -> str:
        return self.name

    @property
    def suffix(self) -> str:
        """Suffix of the name, with its dot."""
        return PurePosixPath(self.name).suffix

    @property
    def size(self) -> int:
        """Size in bytes."""
        return len(self.content)

    def open(self, mode: str = "rb") -> BinaryIO:
        """Open the file; `mode` exists for compatibility with `Path` and is ignored."""
        return io.BytesIO(self.content)


File: TypeAlias = Path | Member
"""A file of a dataset."""
Source: TypeAlias = File | InMemory
"""A file to decode."""


def to_source(path: str | Source) -> Source:
    """Return the path of a file as a `Path`, other sources unchanged."""
    return Path(path) if isinstance(path, str) else path


def open_file(file: str | Source) -> Any:
    """Return what decoding libraries accept: the path of a file, which they open faster themselves, or a stream."""
    return os.path.abspath(file) if isinstance(file, str | Path) else file.open()


class _Whole(io.BytesIO):
    """A small member, entirely in memory: libraries seek to the end to find the size, which would discard a buffer.

    `repr` returns its name, because libraries print it in their errors.
    """

    def __init__(self, member: Member, content: bytes) -> None:
        super().__init__(content)
        self.name = str(member)

    def __repr__(self) -> str:
        return repr(self.name)


class _Stream(io.BufferedReader):
    """A large member, buffered; `repr` returns its name."""

    def __init__(self, member: Member, read: "Reader") -> None:
        super().__init__(_Range(member, read), CHUNK)

    def __repr__(self) -> str:
        return repr(self.name)


class _Range(io.RawIOBase):
    """The byte range of a member in its shard, as a raw file; owns no resource that must be closed."""

    def __init__(self, member: Member, read: "Reader") -> None:
        self.name = str(member)
        self._member = member
        self._read = read
        self._at = 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        at = offset + {os.SEEK_SET: 0, os.SEEK_CUR: self._at, os.SEEK_END: self._member.size}[whence]
        if at < 0:
            raise OSError(f"seek to {at}, before the beginning")
        self._at = at
        return at

    def readinto(self, buffer: Any) -> int:
        want = min(len(buffer), self._member.size - self._at)
        if want <= 0:
            return 0
        found = self._read(self._member.offset + self._at, want)
        if not found:
            raise OSError(f"its shard ends after {self._at} of its {self._member.size} bytes")
        buffer[: len(found)] = found
        self._at += len(found)
        return len(found)


Reader: TypeAlias = Callable[[int, int], bytes]
"""Function (offset, count) -> bytes; fewer than `count` at the end of the file."""


def is_url(path: str) -> bool:
    """Return whether a path is a URL, to be opened by fsspec."""
    return "://" in path


def reader_of(shard: str) -> Reader:
    """Return the reader of a shard, by its path or URL; create one per process.

    Raises:
        OSError: The shard can't be read; raised here, or by the reader.
    """
    if is_url(shard):
        from fsspec.core import url_to_fs  # noqa: PLC0415 (training brings it; decoding files doesn't need it)

        return partial(_fetch, *url_to_fs(shard))  # fsspec keeps one connection for each process
    return partial(_pread, _local(shard))


def _fetch(files: Any, path: str, offset: int, count: int) -> bytes:
    """Read a byte range from a remote file; retry after errors other than a missing file."""
    for wait in (*WAITS, None):
        try:
            return bytes(files.cat_file(path, start=offset, end=offset + count))
        except Exception as error:  # each of fsspec's file systems raises its own
            if wait is None or isinstance(error, FileNotFoundError):
                raise OSError(" ".join(str(error).split()) or type(error).__name__) from error
            time.sleep(wait)
    raise AssertionError


@lru_cache(maxsize=64)
def _local(shard: str) -> io.FileIO:
    """Return a cached open file of a local shard: on network drives, opening takes longer than reading."""
    return io.FileIO(shard)  # closed by the garbage collector


def clear_handles() -> None:
    """Drop cached file handles: the shards at these paths may have been replaced."""
    _local.cache_clear()


def _pread(file: io.FileIO, offset: int, count: int) -> bytes:
    if hasattr(os, "pread"):  # doesn't move the file position, which forked processes share
        return os.pread(file.fileno(), count, offset)
    file.seek(offset)
    return file.read(count) or b""


_ahead: list[tuple[str, int, bytes]] = []  # what `read_ahead` holds: shard, offset, content


@contextmanager
def read_ahead(members: Iterable[Member]) -> Iterator[None]:
    """Read the small members that are side by side in a shard at once; in this context opening them reads nothing.

    What can't be read is left to whoever opens it.
    """
    small = sorted((one.shard, one.offset, one.size) for one in members if one.size <= CHUNK)
    runs: list[tuple[str, int, int, int]] = []  # shard, begin, end, members
    for shard, offset, size in small:
        last = runs[-1] if runs else ("", 0, 0, 0)
        if last[0] == shard and offset - last[2] <= GAP and offset + size - last[1] <= MOST_HELD:
            runs[-1] = (shard, last[1], offset + size, last[3] + 1)
        else:
            runs.append((shard, offset, offset + size, 1))
    for shard, begin, end, count in runs:
        with suppress(OSError):
            if count > 1:
                _ahead.append((shard, begin, reader_of(shard)(begin, end - begin)))
    try:
        yield
    finally:
        _ahead.clear()


def _held(member: Member) -> bytes:
    """Return the content of a member that was read ahead; empty if it wasn't."""
    for shard, begin, content in _ahead:
        at = member.offset - begin
        if shard == member.shard and 0 <= at and at + member.size <= len(content):
            return content[at : at + member.size]
    return b""


def parse_member(shard: str, line: bytes) -> Member:
    """Return the member of a shard that a line of its index describes."""
    facts = json.loads(line)
    return Member(shard, facts.pop("name"), facts.pop("offset"), facts.pop("size"), facts)


def source_of(line: bytes) -> str:
    """Return the `Member.source` of a line of a shard's index."""
    one = json.loads(line)
    return str(one.get("source", one["name"]))
