"""Members of shards: files within tar files, usable in place of a `Path`."""

import io
import json
import os
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import lru_cache, partial
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO, NamedTuple, TypeAlias, overload

import numpy as np
from fsspec.core import url_to_fs

__all__ = ["File", "Member", "Members", "Reader", "clear_handles", "is_url", "open_file", "reader_of"]

MOST_READ = 1 << 30  # bytes of a member that is read as a whole
CHUNK = 1 << 20  # bytes of an open member that are read at once, and so held
WAITS = (0.5, 2.0)  # seconds between the tries of a request


class Member(NamedTuple):
    """A file in a shard. It stands where a `Path` stands: both have `suffix`, `open()` and a text that names them.

    Attributes:
        shard: Path or address of the tar file.
        name: Path of the file below the folder that was packed.
        offset: Position of its first byte in the shard.
        size: Bytes.
        facts: Its entries in the index: `width`, `height`, `samples`, `sample_rate` ...
    """

    shard: str
    name: str
    offset: int
    size: int
    facts: Mapping[str, Any] = {}

    def __str__(self) -> str:
        """Name it in one line, whatever its name is made of."""
        name = "".join(letter if letter.isprintable() else ascii(letter)[1:-1] for letter in self.name)
        return f"{self.shard}/{name}"

    @property
    def suffix(self) -> str:
        """What follows the last dot of its name, with the dot."""
        return PurePosixPath(self.name).suffix

    def open(self, mode: str = "rb") -> BinaryIO:
        """Open it to read and seek; a range of the shard is read, up to 1 MiB now and what follows when it is needed.

        `mode` is as of a `Path`; there is no other.

        Raises:
            OSError: The shard isn't there, or ends within the member; of a larger one at an address, while reading.
        """
        read = reader_of(self.shard)
        # Checked here, because libsndfile prints exceptions that are raised while it reads.
        lost = OSError(f"its shard ends before the last of its {self.size} bytes")
        if self.size <= CHUNK:
            content = read(self.offset, self.size) if self.size else b""
            if len(content) < self.size:
                raise lost
            return _Whole(self, content)
        if not is_url(self.shard) and not read(self.offset + self.size - 1, 1):
            raise lost
        return _Stream(self, read)

    def read(self) -> bytes:
        """Read all of it.

        Raises:
            OSError: It can't be read, or is larger than 1 GiB.
        """
        if self.size > MOST_READ:
            raise OSError(f"{self.size} bytes are too many to be read at once")
        with self.open() as file:
            return file.read()


File: TypeAlias = Path | Member
"""What a data set is made of."""


def open_file(file: str | File) -> Any:
    """Return an argument for libraries: the path of a file, which they open faster themselves, or a member's stream."""
    return file.open() if isinstance(file, Member) else os.path.abspath(file)


class _Whole(io.BytesIO):
    """A member in memory: to learn a file's size, libraries go to its end, where a buffer would forget what it has.

    Its text is its name, as libraries put it into their errors.
    """

    def __init__(self, member: Member, content: bytes) -> None:
        super().__init__(content)
        self.name = str(member)

    def __repr__(self) -> str:
        return repr(self.name)


class _Stream(io.BufferedReader):
    """A member with a part in memory; `str` gives its name."""

    def __init__(self, member: Member, read: "Reader") -> None:
        super().__init__(_Range(member, read), CHUNK)

    def __repr__(self) -> str:
        return repr(self.name)


class _Range(io.RawIOBase):
    """A range of bytes as a file; it holds nothing that would have to be closed."""

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
"""Reads bytes, given an offset and a count; fewer at the end of the file."""


def is_url(path: str) -> bool:
    """Return whether a path is an address that fsspec knows."""
    return "://" in path


def reader_of(shard: str) -> Reader:
    """Return the reader of a shard, by its path or address; made anew in each process.

    Raises:
        OSError: While reading, if not here: it can't be read.
    """
    if is_url(shard):
        return partial(_fetch, *url_to_fs(shard))  # fsspec keeps one connection for each process
    return partial(_pread, _local(shard))


def _fetch(files: Any, path: str, offset: int, count: int) -> bytes:
    """Ask for a range, and again where the network had a bad moment."""
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
    """Keep shards open: over a network, opening takes longer than reading."""
    return io.FileIO(shard)  # which closes when nobody has it any more


def clear_handles() -> None:
    """Drop cached file handles: the shards at these paths may have been replaced."""
    _local.cache_clear()


def _pread(file: io.FileIO, offset: int, count: int) -> bytes:
    if hasattr(os, "pread"):  # which leaves the file's position, common to forked processes, alone
        return os.pread(file.fileno(), count, offset)
    file.seek(offset)
    return file.read(count) or b""


class Members(Sequence[Member]):
    """The members of shards, packed: what each is is read when it is asked for.

    A million of them take about 150 MB, which processes share after a fork; as objects they would take some times as
    much, and be copied by each worker as it counts references.

    Args:
        shards: Paths or addresses of the shards.
        lines: Number of each member's shard, and its JSON line in the index.
    """

    def __init__(self, shards: Sequence[str], lines: Iterable[tuple[int, bytes]]) -> None:
        self.shards = list(shards)
        blob = bytearray()
        numbers, ends = [], [0]
        for number, line in lines:
            blob += line
            numbers.append(number)
            ends.append(len(blob))
        self._lines = bytes(blob)
        self._numbers = np.array(numbers, np.int32)
        self._ends = np.array(ends, np.int64)

    def __len__(self) -> int:
        return len(self._numbers)

    @overload
    def __getitem__(self, index: int) -> Member: ...

    @overload
    def __getitem__(self, index: slice) -> "Members": ...

    def __getitem__(self, index: int | slice) -> "Member | Members":
        """Return a member, or a slice of them."""
        if isinstance(index, slice):
            return self.select(range(*index.indices(len(self))))
        at = range(len(self))[index]
        facts = json.loads(self._line(at))
        return Member(self.shards[self._numbers[at]], facts.pop("name"), facts.pop("offset"), facts.pop("size"), facts)

    def _line(self, at: int) -> bytes:
        return self._lines[self._ends[at] : self._ends[at + 1]]

    def select(self, indices: Iterable[int]) -> "Members":
        """Return the members at some indices, in their order."""
        return Members(self.shards, ((int(self._numbers[at]), self._line(at)) for at in indices))
