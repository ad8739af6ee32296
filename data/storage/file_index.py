"""The index of a dataset: names, offsets and facts of all files below a folder, or of all members of its shards.

It is one file, in safetensors' format, which all processes map into memory. So a start needs neither time nor memory
for each file, and a pickled `Files` is small. Entries are sorted by `source`, folder by folder.

| array | contents |
| --- | --- |
| lines | the entries: of members the lines of their shards' indices, of files their paths relative to the folder |
| ends | end of each entry in `lines` |
| hashes | first 8 bytes of the SHA-256 of each `source`, by which files are held out |
| kinds | why `find_files` would skip the file, as an index into the header's `kinds`: its suffix, or "hidden" |
| shards | index of a member's shard in the header's `shards` |
"""

import hashlib
import json
import os
import secrets
from array import array
from bisect import bisect_left
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, TypeVar, overload

import numpy as np

from varitok import UserError

from .folders import skip_reason
from .members import File, is_url, parse_member, source_of
from .split_names import shorten

__all__ = ["FORMAT", "Entry", "FileIndex", "Files", "build_index", "map_index", "write_index"]

FORMAT = 1
DTYPES = {"lines": "U8", "ends": "I64", "hashes": "U64", "kinds": "U16", "shards": "U32"}
NUMPY = {"U8": "u1", "U16": "<u2", "U32": "<u4", "I64": "<i8", "U64": "<u8"}
AnyFile = TypeVar("AnyFile", bound=File)
CHUNK = 1 << 20  # entries that are compared at once
BLOCK = 64  # bytes of a bitmap between two entries of its running count
ONES = np.array([bin(byte).count("1") for byte in range(256)], np.uint8)


class Entry(NamedTuple):
    """A file to be indexed: its `source`, the number of its shard, and its line."""

    source: str
    shard: int
    line: bytes


@dataclass(eq=False, repr=False)
class FileIndex:
    """An index, in memory or mapped.

    Attributes:
        root: Folder of the files, or path or URL of that of the shards.
        header: `format`; `digest`, a hash of all lines; `kinds`, the number of files of each; `folders` of the files of
            each kind, shortened (`shorten`); for members `shards`, and what else was given when it was built.
        arrays: See this module.
        path: Path of the mapped file; None in memory.
    """

    root: str
    header: Mapping[str, Any]
    arrays: Mapping[str, Any]
    path: str | None = None

    def __post_init__(self) -> None:
        self.shards = None
        if "shards" in self.header:
            names = [str(one["name"]) for one in self.header["shards"]]
            self.shards = [name if is_url(name) else str(Path(self.root, name)) for name in names]
        self.kinds = list(self.header["kinds"])

    def __len__(self) -> int:
        return len(self.arrays["ends"]) - 1

    def __reduce__(self) -> Any:
        """Pickle a mapped index as its path."""
        if self.path is None:
            return FileIndex, (self.root, self.header, dict(self.arrays))
        return _map_same, (self.path, self.root, self.header["digest"])

    def line(self, at: int) -> bytes:
        """Return an entry's line."""
        ends = self.arrays["ends"]
        return bytes(self.arrays["lines"][int(ends[at]) : int(ends[at + 1])])

    def file(self, at: int) -> Any:
        """Return a file."""
        if self.shards is None:
            return Path(self.root, os.fsdecode(self.line(at)))
        return parse_member(self.shards[int(self.arrays["shards"][at])], self.line(at))

    def source(self, at: int) -> str:
        """Return a file's path relative to the folder, or to the folder that was packed."""
        return os.fsdecode(self.line(at)) if self.shards is None else source_of(self.line(at))


class Files(Sequence[AnyFile]):
    """The files of an index, or some of them, in its order.

    Args:
        index: The index.
        chosen: Which of its files; None for all.
    """

    def __init__(self, index: FileIndex, chosen: "_Bitmap | None" = None) -> None:
        self.file_index = index
        self.chosen = chosen

    def __len__(self) -> int:
        return len(self.file_index) if self.chosen is None else len(self.chosen)

    @overload
    def __getitem__(self, index: int) -> AnyFile: ...

    @overload
    def __getitem__(self, index: slice) -> list[AnyFile]: ...

    def __getitem__(self, index: int | slice) -> AnyFile | list[AnyFile]:
        """Return a file, or a list of several."""
        if isinstance(index, slice):
            return [self[at] for at in range(*index.indices(len(self)))]
        found: AnyFile = self.file_index.file(self._entry(range(len(self))[index]))
        return found

    def __iter__(self) -> Iterator[AnyFile]:
        return map(self.file_index.file, self._entries())

    def _entry(self, at: int) -> int:
        return at if self.chosen is None else self.chosen[at]

    def _entries(self) -> Iterator[int]:
        for part in _parts(len(self.file_index)):
            yield from (part.start + np.flatnonzero(self._mask(part))).tolist()

    def sources(self) -> Iterator[str]:
        """Yield the path of each file relative to the folder, or to the folder that was packed."""
        return map(self.file_index.source, self._entries())

    def find(self, source: str, guess: int = -1) -> int:
        """Return the index of a file by its `source`, which is looked for at `guess` first; -1 if there is none."""
        if 0 <= guess < len(self) and self._source(guess) == source:
            return guess
        at = bisect_left(range(len(self)), _sort_key(source), key=lambda one: _sort_key(self._source(one)))
        return at if at < len(self) and self._source(at) == source else -1

    def _source(self, at: int) -> str:
        name: str = self.file_index.source(self._entry(at))
        return name

    @property
    def identity(self) -> str:
        """Hash that is another whenever the files have changed."""
        chosen = b"" if self.chosen is None else self.chosen.bits.tobytes()
        return hashlib.sha256(self.file_index.header["digest"].encode() + chosen).hexdigest()[:16]

    def folders(self) -> set[str]:
        """Return the folders of the files of all kinds that it has, shortened (`shorten`)."""
        return {folder for kind in self.kinds for folder in self.file_index.header["folders"][kind]}

    @property
    def kinds(self) -> list[str]:
        """The kinds of the files."""
        return self.file_index.kinds if self.chosen is None else [self.file_index.kinds[at] for at in self.chosen.kinds]

    def of_kinds(self, suffixes: Collection[str]) -> tuple["Files[AnyFile]", Counter[str]]:
        """Return the files of the index with given suffixes that aren't hidden, and the numbers of others by kind."""
        counts: Mapping[str, int] = self.file_index.header["kinds"]
        skipped = Counter({kind: count for kind, count in counts.items() if kind not in suffixes})
        if not skipped:
            return self, skipped
        wanted = np.array([kind in suffixes for kind in counts])
        kinds = self.file_index.arrays["kinds"]
        chosen = _Bitmap(len(self.file_index), lambda part: wanted[kinds[part]], np.flatnonzero(wanted))
        return Files(self.file_index, chosen), skipped

    def hold_out(self, count: int) -> tuple["Files[AnyFile]", "Files[AnyFile]"]:
        """Split the files: all but those with the `count` smallest hashes, and these."""
        hashes, whole = self.file_index.arrays["hashes"], self.chosen
        last, ties = _threshold(self._hashes, count)

        def held(part: slice) -> Any:
            nonlocal ties
            values = hashes[part]
            equal = np.flatnonzero((values == last) & self._mask(part))
            found = (values < last) & self._mask(part)
            found[equal[:ties]] = True
            ties -= len(equal[:ties])
            return found

        kinds = range(len(self.file_index.kinds)) if whole is None else whole.kinds
        val = _Bitmap(len(self.file_index), held, kinds)
        train = _Bitmap(len(self.file_index), lambda part: self._mask(part) & ~val.mask(part), kinds)
        return Files(self.file_index, train), Files(self.file_index, val)

    def _mask(self, part: slice) -> Any:
        return np.ones(part.stop - part.start, bool) if self.chosen is None else self.chosen.mask(part)

    def _hashes(self) -> Iterator[Any]:
        """Yield the hashes of the files, in parts."""
        for part in _parts(len(self.file_index)):
            yield self.file_index.arrays["hashes"][part][self._mask(part)]


class _Bitmap:
    """A subset of `range(length)`, of one bit for each number.

    Args:
        length: Length of the range.
        choose: Function (slice of the range) -> mask.
        kinds: Indices of the kinds of the chosen files.
    """

    def __init__(self, length: int, choose: Callable[[slice], Any], kinds: Iterable[int]) -> None:
        self.kinds = [int(kind) for kind in kinds]
        self.bits = np.concatenate([np.packbits(choose(part)) for part in _parts(length)] or [np.zeros(0, np.uint8)])
        padded = np.pad(self.bits, (0, -len(self.bits) % BLOCK)).reshape(-1, BLOCK)
        counts = ONES[padded].sum(1, dtype=np.int64)
        self.starts = np.concatenate([[0], np.cumsum(counts)])

    def __len__(self) -> int:
        return int(self.starts[-1])

    def __getitem__(self, at: int) -> int:
        """Return the `at`-th number of the subset."""
        block = int(np.searchsorted(self.starts, at, side="right")) - 1
        inside = np.unpackbits(self.bits[block * BLOCK : (block + 1) * BLOCK])
        return block * BLOCK * 8 + int(np.flatnonzero(inside)[at - self.starts[block]])

    def mask(self, part: slice) -> Any:
        """Return the mask of a part of the range; it begins at a multiple of 8."""
        return np.unpackbits(self.bits[part.start // 8 : -(-part.stop // 8)])[: part.stop - part.start].astype(bool)


def _parts(length: int) -> Iterator[slice]:
    return (slice(at, min(at + CHUNK, length)) for at in range(0, length, CHUNK))


def _threshold(values: Callable[[], Iterator[Any]], count: int) -> tuple[int, int]:
    """Return the largest of the `count` smallest values, 64 bits each, and how many of those are equal to it."""
    seen = np.zeros(1 << 16, np.int64)
    for part in values():
        seen += np.bincount(part >> np.uint64(48), minlength=1 << 16)
    before = np.cumsum(seen)
    top = int(np.searchsorted(before, count))
    fewer = int(before[top] - seen[top])
    alike = np.sort(np.concatenate([part[part >> np.uint64(48) == top] for part in values()]))
    last = alike[count - fewer - 1]
    return last, count - fewer - int(np.searchsorted(alike, last))


def _sort_key(source: str) -> str:
    """Return what sorts as the parts of a path do: no name has a character before NUL, or NUL."""
    return source.replace("/", "\0")


def build_index(root: str, entries: Iterable[Entry], shards: Any = None, **more: Any) -> FileIndex:
    """Build an index in memory.

    Args:
        root: See `FileIndex`.
        entries: The files, in any order.
        shards: For members: a list of what the header says of each shard, among it the `name`, relative to `root` or a
            URL. It may be filled while `entries` are read.
        more: What the header stores besides; JSON types.
    """
    builder = _Builder()
    for entry in entries:
        builder.add(entry)
    return builder.finish(root, more if shards is None else {"shards": shards, **more})


@dataclass
class _Builder:
    """What an index is built of: arrays of numbers, not objects."""

    lines: bytearray = field(default_factory=bytearray)
    ends: "array[int]" = field(default_factory=lambda: array("q", [0]))
    hashes: "array[int]" = field(default_factory=lambda: array("Q"))
    kinds: "array[int]" = field(default_factory=lambda: array("H"))
    shards: "array[int]" = field(default_factory=lambda: array("I"))
    known: dict[str, int] = field(default_factory=dict)
    folders: dict[str, dict[str, None]] = field(default_factory=dict)
    digest: Any = field(default_factory=hashlib.sha256)
    last: str = ""
    is_sorted: bool = True

    def add(self, entry: Entry) -> None:
        source, shard, line = entry
        kind = skip_reason(source, ())
        if kind not in self.known and len(self.known) == 1 << 15:
            kind = "others"
        self.kinds.append(self.known.setdefault(kind, len(self.known)))
        self.folders.setdefault(kind, {})[shorten(source.rpartition("/")[0])] = None
        self.hashes.append(hash_of(source))
        self.shards.append(shard)
        self.lines += line
        self.digest.update(line)
        self.ends.append(len(self.lines))
        key = _sort_key(source)
        self.is_sorted = self.is_sorted and self.last <= key
        self.last = key

    def finish(self, root: str, more: dict[str, Any]) -> FileIndex:
        names = ("hashes", "kinds", *(("shards",) if "shards" in more else ()))
        arrays: dict[str, Any] = {name: np.array(getattr(self, name), NUMPY[DTYPES[name]]) for name in names}
        arrays |= {"lines": np.frombuffer(self.lines, np.uint8), "ends": np.array(self.ends, np.int64)}
        counts = np.bincount(arrays["kinds"], minlength=len(self.known)).tolist()
        header = {
            "format": FORMAT,
            "digest": self.digest.hexdigest()[:16],
            "kinds": dict(zip(self.known, counts, strict=True)),
            "folders": {kind: list(folders) for kind, folders in self.folders.items()},
            **more,
        }
        index = FileIndex(root, header, arrays)
        return index if self.is_sorted else _sort(index, names)


def hash_of(source: str) -> int:
    """Return the first 8 bytes of the SHA-256 of a name."""
    return int.from_bytes(hashlib.sha256(source.encode(errors="surrogateescape")).digest()[:8], "big")


def _sort(index: FileIndex, names: Iterable[str]) -> FileIndex:
    """Sort the entries by `source`; equal ones stay in the order of their shards."""
    keys = [_sort_key(index.source(at)) for at in range(len(index))]
    order = sorted(range(len(keys)), key=keys.__getitem__)
    lines = bytearray().join(index.line(at) for at in order)
    ends = np.concatenate([[0], np.cumsum(np.diff(index.arrays["ends"])[order])])
    moved = {name: index.arrays[name][order] for name in names}
    return FileIndex(index.root, index.header, {**moved, "lines": np.frombuffer(lines, np.uint8), "ends": ends})


def write_index(index: FileIndex, path: Path) -> None:
    """Write an index atomically, in safetensors' format, whose own writer would copy it in memory.

    Raises:
        OSError: It can't be written.
    """
    order = sorted(index.arrays, key=lambda name: -index.arrays[name].itemsize)  # so that all are aligned
    about: dict[str, Any] = {"__metadata__": {"varitok": json.dumps(index.header)}}
    at = 0
    for name in order:
        part = index.arrays[name]
        about[name] = {"dtype": DTYPES[name], "shape": [len(part)], "data_offsets": [at, at + part.nbytes]}
        at += part.nbytes
    head = json.dumps(about).encode()
    head += b" " * (-len(head) % 8)
    partial = path.with_name(f".{path.name.lstrip('.')}.{secrets.token_hex(4)}.partial")
    try:
        with partial.open("wb") as file:
            file.write(len(head).to_bytes(8, "little") + head)
            for name in order:
                index.arrays[name].astype(NUMPY[DTYPES[name]], copy=False).tofile(file)
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def map_index(path: str | Path, root: str) -> FileIndex:
    """Map an index into memory.

    Raises:
        OSError: It can't be read.
        ValueError: It isn't an index, is incomplete, or has another format.
    """
    with open(path, "rb") as file:
        size = int.from_bytes(file.read(8), "little")
        if not 0 < size <= os.fstat(file.fileno()).st_size:
            raise ValueError
        about = json.loads(file.read(size))
    mapped = np.memmap(path, np.uint8, "r")
    try:
        header = json.loads(about.pop("__metadata__")["varitok"])
        arrays = {}
        for name, one in about.items():
            begin, end = (8 + size + offset for offset in one["data_offsets"])
            # As plain arrays: each slice of a memmap is an object that costs microseconds.
            arrays[name] = np.asarray(mapped[begin:end]).view(np.ndarray).view(NUMPY[DTYPES[name]])
            if len(arrays[name]) != one["shape"][0]:
                raise ValueError
        if header["format"] != FORMAT or int(arrays["ends"][-1]) != len(arrays["lines"]):
            raise ValueError
    except (KeyError, TypeError, IndexError, AttributeError) as error:
        raise ValueError from error
    return FileIndex(root, header, arrays, str(path))


def _map_same(path: str, root: str, digest: str) -> FileIndex:
    """Map the index that another process has mapped.

    Raises:
        UserError: It is another one by now.
    """
    try:
        index = map_index(path, root)
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: the index can't be read any more ({error}); start again") from error
    if index.header["digest"] != digest:
        raise UserError(f"{path}: the index was written anew while it was in use; start again")
    return index
