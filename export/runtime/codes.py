"""Read the codes of a corpus, shards that `varitok tokenize` wrote, with NumPy only.

A shard is a tar file of arrays in NumPy's format, `.npy`. The first line of its index describes the codes: the bundle,
its codebooks, the numbers of files and shards. Each further line has the facts about one file.
"""

import io
import json
import math
import os
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from functools import lru_cache
from itertools import accumulate
from os import PathLike
from typing import Any, NamedTuple, overload

import numpy as np
import numpy.typing as npt

from varitok import UserError
from varitok.data.storage.members import is_url, parse_member
from varitok.data.storage.shard_index import index_of
from varitok.data.storage.shard_reader import open_index, shards_in, subfolders

from .bundle import product_of

__all__ = ["ABOUT", "FILE", "Codes", "Record", "Shard", "read_codes", "read_head"]

ABOUT = "codes"  # key of the description in the first line of an index
FILE = "file"  # key of a file's path in its line; by `source` the codes would be listed as images or sounds
CACHED = 64  # indices of shards that a process keeps in memory


class Record(NamedTuple):
    """The codes of one file.

    Attributes:
        name: Path of the file relative to the corpus.
        codes: `(codebooks, *grid)`, of the smallest unsigned type; float32 channels if the codec is continuous.
        facts: `signal_size`, the signal's samples, or frames, height and width, to which decoding crops; `shape` of
            the codes; `seconds` and `caption`, if the file has them.
    """

    name: str
    codes: npt.NDArray[Any]
    facts: Mapping[str, Any]


class Shard(NamedTuple):
    """A shard: its path or URL, and the number of its records."""

    path: str
    records: int


class Codes(Sequence[Record]):
    """The codes of a corpus, in the order of its files' names; read on access.

    It can be pickled, and holds a path and a number for each shard. Access in order, or shard by shard, is fastest:
    the first access to a shard reads its index.

    Args:
        shards: The shards.
        about: The description in their indices.

    Attributes:
        modality: Modality of the bundle.
        bundle: Identity of the bundle, 16 hexadecimal digits, as in containers.
        codebook_sizes: Entries of each kept codebook; empty if codes are continuous.
        tokens: Number of tokens kept of each signal or block; None if it follows from the signal's length.

    Example:
        >>> found = varitok.codes("image_codes")
        >>> names = []
        >>> for shard in found.shards():  # in random order, to shuffle a large corpus
        ...     names += [record.name for record in shard]
        >>> names
        ['photo.png']
    """

    def __init__(self, shards: Sequence[Shard], about: Mapping[str, Any]) -> None:
        self._shards = list(shards)
        self._ends = list(accumulate(shard.records for shard in shards))
        self._about = dict(about)
        self.modality: str = about["modality"]
        self.bundle: str = about["bundle"]
        self.codebook_sizes: tuple[int, ...] = tuple(about["codebook_sizes"])
        self.tokens: int | None = about["tokens"]

    def __repr__(self) -> str:
        sizes = product_of(self.codebook_sizes) or "continuous"
        return f"Codes({len(self)} of {self.modality}, {sizes}, in {len(self._shards)} shards)"

    def __len__(self) -> int:
        return self._ends[-1] if self._ends else 0

    @overload
    def __getitem__(self, index: int) -> Record: ...

    @overload
    def __getitem__(self, index: slice) -> list[Record]: ...

    def __getitem__(self, index: int | slice) -> Record | list[Record]:
        """Return a record, or a list of several.

        Raises:
            UserError: Its shard can't be read.
        """
        if isinstance(index, slice):
            return [self[at] for at in range(*index.indices(len(self)))]
        at = range(len(self))[index]
        number = bisect_right(self._ends, at)
        shard = self._shards[number]
        return _record(shard.path, at - (self._ends[number] - shard.records))

    def shards(self) -> list["Codes"]:
        """Return the codes of each shard; nothing is read.

        Example:
            >>> worker, workers = 0, 2  # each worker of a loader takes its own
            >>> [len(shard) for shard in varitok.codes("image_codes").shards()[worker::workers]]
            [1]
        """
        return [Codes([shard], self._about) for shard in self._shards]


def read_codes(path: str | PathLike[str], *, partial: bool = False) -> Codes:
    """Open the codes of a corpus; see `varitok.codes`."""
    folder = os.fspath(path)
    if not is_url(folder) and not os.path.isdir(folder):
        raise UserError(f"{folder}: no such folder")
    found = shards_in(folder)
    if not found:
        parts = [name for name in subfolders(folder) if shards_in(f"{folder}/{name}")]
        hint = f"; give one of its folders, {', '.join(parts)}" if parts else ""
        raise UserError(f"{folder}: no shards of codes in this folder{hint}")
    shards, about = [], None
    for shard, length in found:
        head = read_head(shard)
        if head is None:
            raise UserError(f"{shard}: no codes of varitok tokenize; give a folder that it wrote")
        if length != head["bytes"]:
            raise UserError(f"{shard}: {length} bytes instead of {head['bytes']}; copy it again, or run tokenize again")
        about = about or head[ABOUT]
        if head[ABOUT] != about:
            raise UserError(f"{shard}: has other codes than {found[0][0]}; keep them in folders of their own")
        shards.append(Shard(shard, head["members"]))
    assert about is not None
    missing = math.ceil(about["files"] / about["shard_files"]) - len(shards)
    if missing and not partial:
        raise UserError(
            f"{folder}: {missing} of {missing + len(shards)} shards are missing; run varitok tokenize to its end, or"
            " read what there is by partial=True"
        )
    return Codes(shards, about)


def read_head(shard: str) -> dict[str, Any] | None:
    """Return the first line of a shard's index; None if there is no index, or if the shard isn't one of codes."""
    try:
        with open_index(shard) as file:
            head = json.loads(file.readline())
    except (FileNotFoundError, ValueError):
        return None
    return head if isinstance(head, dict) and isinstance(head.get(ABOUT), dict) else None


@lru_cache(maxsize=CACHED)
def _lines(shard: str) -> list[bytes]:
    """Return the lines of a shard's index, one for each record."""
    with open_index(shard) as file:
        return file.read().splitlines()[1:]


def _record(shard: str, at: int) -> Record:
    """Read a record of a shard."""
    try:
        member = parse_member(shard, _lines(shard)[at])
        facts = dict(member.facts)
        name = facts.pop(FILE)
        codes = np.load(io.BytesIO(member.read()), allow_pickle=False)
    except (OSError, ValueError, KeyError) as error:
        raise UserError(f"{shard}: can't be read ({error}); copy it and {index_of(shard)} again") from error
    return Record(name, codes, facts)
