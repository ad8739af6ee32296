"""Codes as a file, `.vtk`: a signal's codes and what it takes to decode them; CONTAINER.md is its specification.

Numpy alone reads and writes it.
"""

import hashlib
import math
import zlib
from collections.abc import Iterator, Sequence
from itertools import groupby
from pathlib import Path
from typing import BinaryIO, NamedTuple

import numpy as np
import numpy.typing as npt

from varitok import UserError

from .graphs import Bundle, read_json
from .packing import Book, Codes, Packing

__all__ = ["Container", "Header", "Writer", "check", "header_of", "identity", "read", "read_all", "write"]

MAGIC = b"\x89VTK"
VERSION = 1
MODALITIES = ("image", "audio", "video", "features")
MOST_BOOKS = 256
MOST_ENTRIES = 1 << 62
MOST_STRIDE = 64
MOST_AXES = 4
MOST_CODES = 1 << 24  # of a chunk: 128 MiB as they are read
MOST_ALL = 1 << 27  # of a signal
SUFFIX = ".vtk"
CHUNK = 1 << 16  # codes of a chunk that is written, about


class Header(NamedTuple):
    """What holds for all of a signal's codes.

    Attributes:
        modality: One of `MODALITIES`.
        bundle: The bundle's `identity`.
        books: Those that are kept.
        inner: Sizes of the codes' axes behind that of steps: rows and columns of a clip's grid, tokens of its blocks.
        signal: Of sounds the rate in Hz; of clips height, width and frames in 1,000 s (0: not known).
    """

    modality: str
    bundle: bytes
    books: tuple[Book, ...]
    inner: tuple[int, ...]
    signal: tuple[int, ...]

    def pack(self) -> bytes:
        """Write it; see CONTAINER.md."""
        runs = [(len(list(run)), *book) for book, run in groupby(self.books)]
        numbers = [len(runs), *(number for run in runs for number in run)]
        for axes in (self.inner, self.signal):
            numbers += [len(axes), *axes]
        head = MAGIC + bytes([VERSION, MODALITIES.index(self.modality)]) + self.bundle
        body = head + b"".join(map(_varint, numbers))
        return body + _checksum(body)


class Container(NamedTuple):
    """A signal's codes, read.

    Attributes:
        header: What holds for all of them.
        codes: int64 `(1, books, steps, *inner)`.
        units: How long the signal is: samples, or frames; of an image 1. Of a file that was cut, of its whole chunks.
        complete: Whether the file goes on to its end; otherwise there are as many steps as arrived.
        checked: Steps whose checksum holds: all, but for those of a chunk that was cut.
        sizes: Bytes of the header, of the payload, and of what is around the payload.
    """

    header: Header
    codes: Codes
    units: int
    complete: bool
    checked: int
    sizes: dict[str, int]


class Writer:
    """Writes a signal's codes as they come.

    Args:
        file: Open for writing bytes.
        header: What holds for all of them.
    """

    def __init__(self, file: BinaryIO, header: Header) -> None:
        self.file = file
        self.packing = Packing(header.books, header.inner)
        self.whole = math.lcm(*(book.stride for book in header.books))
        self.open = True
        file.write(header.pack())

    def write(self, codes: npt.ArrayLike, units: int) -> None:
        """Write some steps' codes, `(books, steps, *inner)`, as one chunk.

        Args:
            codes: As many steps as books' strides divide, but in the last chunk.
            units: How much of the signal they stand for.

        Raises:
            ValueError: Shape or codes aren't the header's, or a chunk of other steps was the last one.
        """
        codes = np.asarray(codes, np.int64)
        books, steps = self.packing.books, codes.shape[1]
        if codes.shape != (len(books), steps, *self.packing.inner) or not steps or not self.open:
            raise ValueError(f"codes {codes.shape} don't follow: ({len(books)}, steps, *{self.packing.inner}) do")
        sizes = np.array([book.size for book in books]).reshape(-1, *(1 for _ in codes.shape[1:]))
        if (codes < 0).any() or (codes >= sizes).any():
            raise ValueError("a code is no entry of its book")
        self.open = steps % self.whole == 0
        payload = self.packing.pack(codes)
        body = _varint(steps) + _varint(units) + _varint(len(payload)) + payload
        self.file.write(body + _checksum(body))

    def close(self) -> None:
        """Write the end; the file stays open."""
        self.file.write(_varint(0))


def identity(folder: Path) -> bytes:
    """Give 8 bytes that tell a bundle from others: of the SHA-256 of its config's and graphs' checksums.

    Raises:
        UserError: The bundle has none.
    """
    files = read_json(folder / "export.json").get("files") or {}
    names = sorted(name for name in files if name == "config.json" or name.startswith("onnx/"))
    if not names:
        raise UserError(f"{folder / 'export.json'}: lacks the checksums of the bundle's files")
    lines = "".join(f"{name} {files[name]['sha256']}\n" for name in names)
    return hashlib.sha256(lines.encode()).digest()[:8]


def header_of(bundle: Bundle, codes: npt.NDArray[np.integer], signal: Sequence[int]) -> Header:
    """Make the header of a bundle's codes `(1, books, steps, *inner)`, all books or the first of them.

    Raises:
        UserError: They are continuous.
    """
    if not bundle.book_sizes:
        raise UserError("this codec's codes are continuous: there is nothing to pack")
    pairs = zip(bundle.book_sizes, bundle.book_strides, strict=True)
    books = tuple(Book(size, stride) for size, stride in pairs)[: codes.shape[1]]
    return Header(bundle.config["modality"], identity(bundle.folder), books, tuple(codes.shape[3:]), tuple(signal))


def check(header: Header, bundle: Bundle, path: Path, force: bool = False) -> None:
    """Hold a container's header against the bundle that is to decode it.

    Args:
        header: The container's.
        bundle: Decodes.
        path: The container's, for what is told.
        force: Take what another bundle wrote, where it has the same kind of codes.

    Raises:
        UserError: It is another bundle's, or of codes that this bundle doesn't have.
    """
    if header.modality != bundle.config["modality"]:
        raise UserError(f"{path}: codes of {header.modality}, and {bundle.folder} is of {bundle.config['modality']}")
    known = [Book(*pair) for pair in zip(bundle.book_sizes, bundle.book_strides, strict=True)]
    if list(header.books) != known[: len(header.books)] or len(header.inner) != bundle.axes - 1:
        raise UserError(f"{path}: codes of other books than those of {bundle.folder}; decode it by its own bundle")
    if header.bundle != identity(bundle.folder) and not force:
        raise UserError(
            f"{path}: was written by another bundle than {bundle.folder}, whose books mean something else; decode it by"
            " its own, or give --force if this is the same codec, exported anew"
        )


def write(file: BinaryIO, header: Header, codes: npt.NDArray[np.integer], units: npt.NDArray[np.integer]) -> None:
    """Write all of a signal's codes, in chunks.

    Args:
        file: Open for writing bytes.
        header: What holds for all of them.
        codes: int64 `(1, books, steps, *inner)`.
        units: How far into the signal each step reaches, `(steps,)`: of an image all 1.
    """
    writer = Writer(file, header)
    each = max(1, CHUNK // max(1, len(header.books) * writer.packing.places) // writer.whole) * writer.whole
    done = 0
    for begin in range(0, codes.shape[2], each):
        part = codes[0, :, begin : begin + each]
        reached = int(units[begin + part.shape[1] - 1])
        writer.write(part, reached - done)
        done = reached
    writer.close()


def read(path: Path) -> Container:
    """Read the codes of a file with one signal; see `read_all`.

    Raises:
        UserError: It holds none or several, or is damaged.
    """
    found = list(read_all(path))
    if len(found) > 1:
        raise UserError(f"{path}: holds {len(found)} signals, one after the other")
    return found[0]


def read_all(path: Path) -> Iterator[Container]:
    """Read the codes of each signal of a file: files that are laid one behind the other are one file of several.

    Raises:
        UserError: It can't be read, is none of varitok's, or is damaged.
    """
    try:
        data = path.read_bytes()
    except OSError as error:
        raise UserError(f"{path}: can't be read ({error.strerror})") from error
    at = 0
    while at < len(data) or not at:
        try:
            found, at = _signal(_Reader(data, at))
        except _Damage as error:
            raise UserError(f"{path}: {error}") from None
        yield found


class _Damage(Exception):
    """What is wrong with a file, in a few words."""


class _Cut(Exception):
    """The file ends before its end."""


class _Reader:
    """Reads numbers and bytes, and never beyond what is there."""

    def __init__(self, data: bytes, at: int) -> None:
        self.data = data
        self.at = at

    def take(self, count: int) -> bytes:
        if count > len(self.data) - self.at:
            raise _Cut
        self.at += count
        return self.data[self.at - count : self.at]

    def number(self, most: int) -> int:
        found = shift = 0
        while True:
            (byte,) = self.take(1)
            found |= (byte & 0x7F) << shift
            if found > most or shift > 63:
                raise _Damage(f"damaged: a number beyond {most} at byte {self.at - 1}")
            if not byte & 0x80:
                return found
            shift += 7

    def check(self, begin: int, what: str) -> None:
        body = self.data[begin : self.at]
        if self.take(4) != _checksum(body):
            raise _Damage(f"damaged: the checksum of {what} differs; get the file anew")


def _signal(reader: _Reader) -> tuple[Container, int]:
    """Read a signal; give where it ends."""
    begin = reader.at
    try:
        header = _header(reader)
    except _Cut:
        raise _Damage("cut before the first code arrived") from None
    sizes = {"header": reader.at - begin, "payload": 0, "framing": 0}
    packing = Packing(header.books, header.inner)
    parts: list[Codes] = []
    units, complete, count, checked = 0, False, 0, 0
    per_step = len(header.books) * packing.places
    while not complete:
        start = reader.at
        try:
            steps = reader.number(MOST_CODES // max(1, per_step))
            if not steps:
                complete = True
                sizes["framing"] += 1
                continue
            length, size = reader.number(1 << 40), reader.number(1 << 40)
            if size != packing.size(steps):
                raise _Damage(f"damaged: chunk {len(parts)} has {size} bytes, {packing.size(steps)} are expected")
            count += steps * per_step
            if count > MOST_ALL:
                raise _Damage(f"more than {MOST_ALL} codes are refused")
            there = len(reader.data) - reader.at
            whole = there >= size + len(_checksum(b""))
            arrived = steps if whole else packing.steps(min(there, size), steps)
            payload = reader.take(packing.size(arrived))
            if whole:
                reader.check(start, f"chunk {len(parts)}")
                units += length
                checked += steps
            else:
                reader.at = len(reader.data)
        except _Cut:
            reader.at = len(reader.data)
            break
        sizes["payload"] += len(payload)
        sizes["framing"] += reader.at - start - len(payload)
        if arrived:
            parts.append(_known(packing.unpack(payload, arrived), header, len(parts)))
        if not whole:
            break
    if not parts:
        raise _Damage("holds no codes" if complete else "cut before the first code arrived")
    return Container(header, np.concatenate(parts, axis=1)[None], units, complete, checked, sizes), reader.at


def _header(reader: _Reader) -> Header:
    begin = reader.at
    if (found := reader.data[begin : begin + 4]) != MAGIC:
        raise _Cut if found and MAGIC.startswith(found) else _Damage("not a container of varitok's (.vtk)")
    reader.take(4)
    version, modality = reader.take(2)
    if version != VERSION:
        raise _Damage(f"version {version} of the format, this varitok reads {VERSION}; update varitok")
    bundle, books = reader.take(8), list[Book]()
    for _ in range(reader.number(MOST_BOOKS)):
        count, size, stride = reader.number(MOST_BOOKS), reader.number(MOST_ENTRIES), reader.number(MOST_STRIDE)
        books += [Book(size, stride)] * count
        if not count or size < 2 or not stride or len(books) > MOST_BOOKS:
            raise _Damage("damaged: its books can't be")
    inner, signal = ([reader.number(1 << 24) for _ in range(reader.number(MOST_AXES))] for _ in range(2))
    reader.check(begin, "the header")
    if modality >= len(MODALITIES) or not books or math.prod(inner) * len(books) > MOST_CODES or 0 in inner:
        raise _Damage("damaged: its codes' shape can't be")
    return Header(MODALITIES[modality], bundle, tuple(books), tuple(inner), tuple(signal))


def _known(codes: Codes, header: Header, chunk: int) -> Codes:
    """Refuse codes that are no entries: widths are whole bits."""
    for number, book in enumerate(header.books):
        if (found := codes[number].max(initial=0)) >= book.size:
            raise _Damage(f"damaged: chunk {chunk}, book {number} has entries 0 to {book.size - 1}, got {found}")
    return codes


def _varint(number: int) -> bytes:
    """Write a number 7 bits at a time, the lowest first; the highest bit of a byte tells that another follows."""
    out = bytearray()
    while number > 0x7F:
        out.append(number & 0x7F | 0x80)
        number >>= 7
    return bytes([*out, number])


def _checksum(body: bytes) -> bytes:
    return zlib.crc32(body).to_bytes(4, "little")
