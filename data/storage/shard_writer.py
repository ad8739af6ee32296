"""Write shards: tar files in WebDataset's layout, with an index beside each."""

import hashlib
import io
import os
import shutil
from collections.abc import Mapping
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO

from varitok import UserError

from .shard_index import CHUNK, SUFFIX, _line, _write_index, index_of
from .tar import MOST_BYTES, end_of, header_of, padding_of

__all__ = ["ShardWriter"]


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
        self._file: Any = None
        self._lines: list[bytes] = []
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
            self._finish()
            if kind is None:
                if self.folder.exists():
                    self.folder.rmdir()  # fails unless it is empty
                self._partial.rename(self.folder)
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
        header = header_of(name, size)
        if size > MOST_BYTES:
            raise ValueError(f"{size} bytes are more than {MOST_BYTES}")
        full = self._file is not None and self._file.tell() + len(header) + size > self.size
        if self._file is None or full or part != self._part:
            self._finish()
            self._begin(part)
        self._put(header)
        offset = self._file.tell()
        source.seek(0)
        while chunk := source.read(CHUNK):
            self._put(chunk)
        if self._file.tell() - offset != size:
            raise ValueError("the file changed while it was read")
        self._put(padding_of(size))
        self._lines.append(_line(name, offset, size, facts))
        self.members += 1
        self.bytes += size

    def _put(self, content: bytes) -> None:
        self._file.write(content)
        self._hash.update(content)

    def _begin(self, part: PurePosixPath) -> None:
        """Open a new shard."""
        number = self._numbers.get(part, 0)
        self._numbers[part] = number + 1
        self._part = part
        self._lines = []
        self._hash = hashlib.sha256()
        folder = self._partial / part
        folder.mkdir(parents=True, exist_ok=True)
        self._file = (folder / f"{number:06}{SUFFIX}").open("wb")

    def _finish(self) -> None:
        """Close the open shard, if any, and write its index."""
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
