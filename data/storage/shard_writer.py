"""Write shards: tar files in WebDataset's layout, with an index beside each."""

import hashlib
import io
import os
import secrets
import shutil
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO

from varitok import UserError

from .index_cache import is_large
from .shard_index import CHUNK, SUFFIX, _line, _write_index, index_of
from .shard_reader import index_shards
from .tar import MOST_BYTES, end_of, header_of, padding_of

__all__ = ["ShardFile", "ShardWriter", "member_names"]


def member_names(sources: Iterable[str]) -> Iterator[str]:
    """Return the names of members for files of these paths, each with a unique key.

    In WebDataset's layout, a sample's key is the name up to its first dot, and members of the same key are one sample.
    So other dots become underscores, and of two files `a.jpg` and `a.png` the second is named `a_2.png`.
    """
    taken = set[str]()
    for source in sources:
        path = PurePosixPath(source)
        stem, number = path.stem.replace(".", "_"), 1
        key = stem
        while str(path.with_name(key)) in taken:
            number += 1
            key = f"{stem}_{number}"
        taken.add(str(path.with_name(key)))
        yield str(path.with_name(key + path.suffix))


class ShardFile:
    """A context manager that writes one shard; `finish` puts it and its index in place, whole.

    Without `finish`, nothing is left.

    Args:
        path: Path of the shard, in an existing folder.

    Attributes:
        length: Bytes of the shard so far.
        members: Number of members written.

    Raises:
        OSError: The shard can't be written.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.length = self.members = 0
        self._partial = path.with_name(f".{path.name}.{secrets.token_hex(4)}.partial")
        self._lines: list[bytes] = []
        self._hash = hashlib.sha256()
        self._file: BinaryIO = self._partial.open("wb")

    def __enter__(self) -> "ShardFile":
        return self

    def __exit__(self, *_: object) -> None:
        try:
            self._file.close()
        finally:  # closing writes the rest of the file, which a full disk fails
            self._partial.unlink(missing_ok=True)

    def add(self, name: str, source: BinaryIO, size: int, facts: Mapping[str, Any]) -> None:
        """Write a member of `size` bytes; see `ShardWriter.write`.

        Raises:
            OSError: The shard can't be written, or the source can't be read.
            ValueError: The name or size isn't possible in a tar file, or the source has another size.
        """
        if size > MOST_BYTES:
            raise ValueError(f"{size} bytes are more than {MOST_BYTES}")
        self._put(header_of(name, size))
        offset = self.length
        source.seek(0)
        while chunk := source.read(CHUNK):
            self._put(chunk)
        if self.length - offset != size:
            raise ValueError("the file changed while it was read")
        self._put(padding_of(size))
        self._lines.append(_line(name, offset, size, facts))
        self.members += 1

    def finish(self, **about: Any) -> None:
        """Close the shard and write its index, whose first line also has `about`.

        The index is put in place first: a shard is never without one.
        """
        self._put(end_of(self.length))
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()
        about = {"sha256": self._hash.hexdigest(), **about}
        _write_index(Path(index_of(str(self.path))), self.path.name, self.length, self._lines, **about)
        self._partial.replace(self.path)

    def _put(self, content: bytes) -> None:
        self._file.write(content)
        self._hash.update(content)
        self.length += len(content)


class ShardWriter:
    """A context manager that writes shards and their indices into a new folder, atomically.

    The same members in the same order produce the same bytes on any machine.

    Args:
        folder: Output folder; it must be new or empty.
        size: Approximate bytes per shard; a larger member has a shard of its own.

    Attributes:
        members: Number of members written.
        bytes: Total bytes of their content.
        shards: Number of shards.

    Raises:
        UserError: The folder isn't empty, or can't be written.
    """

    def __init__(self, folder: Path, size: int = 256 << 20) -> None:
        self.folder = folder.resolve()
        if self.folder.exists() and (not self.folder.is_dir() or any(self.folder.iterdir())):
            raise UserError(f"{folder}: is not empty; name a new folder for the shards")
        self.size = size
        self.members = self.bytes = self.shards = 0
        self._partial = self.folder.with_name(f".{self.folder.name}.{os.getpid()}.partial")
        self._file: ShardFile | None = None
        self._part = PurePosixPath()
        self._numbers: dict[PurePosixPath, int] = {}

    def __enter__(self) -> "ShardWriter":
        try:
            self.folder.parent.mkdir(parents=True, exist_ok=True)
            self._partial.mkdir()
        except OSError as error:
            raise UserError(f"{self.folder}: can't be written ({error.strerror}); name another folder") from error
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        try:
            if kind is None:
                self._finish()
                for part in self._numbers if is_large(self.members) else ():
                    index_shards(self._partial / part)
                if self.folder.exists():
                    self.folder.rmdir()  # fails unless it is empty
                self._partial.rename(self.folder)
            elif self._file is not None:
                self._file.__exit__()
        except OSError as failure:
            if kind is None:
                raise UserError(f"{self.folder}: can't be written ({failure.strerror or failure})") from failure
        finally:
            shutil.rmtree(self._partial, ignore_errors=True)

    def write(self, name: str, content: bytes | Path, facts: Mapping[str, Any] | None = None, part: str = "") -> None:
        """Write a member.

        Args:
            name: Name of the member; in WebDataset's layout its type is all after the first dot of the file name.
            content: Its bytes, or the path of a file, which is copied in chunks.
            facts: Its metadata for the index; JSON types.
            part: Subfolder of its shard, such as "train"; the members of a part must be written consecutively.

        Raises:
            UserError: The content can't be read, or the member can't be written.
        """
        try:
            source = io.BytesIO(content) if isinstance(content, bytes) else content.open("rb")
            with source:
                self._add(name, source, source.seek(0, os.SEEK_END), facts or {}, PurePosixPath(part))
        except (OSError, ValueError) as error:
            raise UserError(f"{name}: can't be written as a member of a shard ({error})") from error

    def _add(self, name: str, source: BinaryIO, size: int, facts: Mapping[str, Any], part: PurePosixPath) -> None:
        full = self._file is not None and self._file.length + len(header_of(name, size)) + size > self.size
        if self._file is None or full or part != self._part:
            self._finish()
            self._file = self._begin(part)
        self._file.add(name, source, size, facts)
        self.members += 1
        self.bytes += size

    def _begin(self, part: PurePosixPath) -> ShardFile:
        """Open a new shard."""
        number = self._numbers.get(part, 0)
        self._numbers[part] = number + 1
        self._part = part
        folder = self._partial / part
        folder.mkdir(parents=True, exist_ok=True)
        return ShardFile(folder / f"{number:06}{SUFFIX}")

    def _finish(self) -> None:
        """Close the open shard, if any, and write its index."""
        if self._file is None:
            return
        with self._file as shard:
            shard.finish()
        self._file = None
        self.shards += 1
