"""Codes as a file, `.vtk`: a signal's codes and what it takes to decode them; CONTAINER.md is its specification.

Numpy alone reads and writes it.
"""

import hashlib
import math
import sys
import zlib
from collections.abc import Iterator, Sequence
from itertools import groupby
from pathlib import Path
from typing import BinaryIO, NamedTuple

import numpy as np
import numpy.typing as npt

from varitok import UserError

from ..runtime.bundle import DECODER_INT8, Bundle, read_json
from ..runtime.files import STREAM
from ..runtime.load import BUNDLES
from .entropy_coding import CODINGS, WITH_PRIOR, Coding, codebooks_of, coding_of, fits, prior_identity
from .packing import Codebook, Codes
from .range_coder import Damage

__all__ = ["Chunk", "Container", "Header", "Writer", "check", "header_of", "identity", "read", "read_all", "write"]

MAGIC = b"\x89VTK"
VERSION = 1
MODALITIES = tuple(name for name, kind in BUNDLES.items() if issubclass(kind, Bundle))
MOST_CODEBOOKS = 256
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
        coding: How codes are written, one of `CODINGS`.
        prior: Identity of the prior that its codes are coded by, if any.
        codebooks: The kept codebooks.
        inner: Sizes of the codes' axes after that of steps: rows and columns of a clip's grid, tokens of its blocks.
        signal: Audio: the sample rate in Hz. Video: height, width and frames in 1,000 s (0: unknown).
    """

    modality: str
    bundle: bytes
    coding: str
    prior: bytes
    codebooks: tuple[Codebook, ...]
    inner: tuple[int, ...]
    signal: tuple[int, ...]

    def pack(self) -> bytes:
        """Write it; see CONTAINER.md."""
        runs = [(len(list(run)), *codebook) for codebook, run in groupby(self.codebooks)]
        numbers = [len(runs), *(number for run in runs for number in run)]
        for axes in (self.inner, self.signal):
            numbers += [len(axes), *axes]
        kinds = bytes([VERSION, MODALITIES.index(self.modality)])
        body = MAGIC + kinds + self.bundle + bytes([CODINGS.index(self.coding)]) + self.prior
        body += b"".join(map(_varint, numbers))
        return body + _checksum(body)

    @property
    def per_step(self) -> int:
        """Codes of a step."""
        return len(self.codebooks) * math.prod(self.inner)


class Chunk(NamedTuple):
    """Some of a signal's steps.

    Attributes:
        steps: How many.
        units: How much of the signal they stand for: samples, or frames; of an image 1.
        payload: Their codes, as far as they arrived.
        whole: Whether they did, and their checksum holds.
    """

    steps: int
    units: int
    payload: bytes
    whole: bool


class Container(NamedTuple):
    """A signal's codes as they are written.

    Attributes:
        path: Path of the file.
        header: The header, common to all chunks.
        chunks: In their order; all but the last are whole.
        complete: Whether the file ends where it should.
        sizes: Bytes of the header, of the payload, and of the framing around the payload.
    """

    path: Path
    header: Header
    chunks: tuple[Chunk, ...]
    complete: bool
    sizes: dict[str, int]

    @property
    def steps(self) -> int:
        """Steps whose checksum holds: all, but for those of a chunk that was cut."""
        return sum(chunk.steps for chunk in self.chunks if chunk.whole)

    @property
    def units(self) -> int:
        """How much of the signal these stand for."""
        return sum(chunk.units for chunk in self.chunks if chunk.whole)

    def codes(self, bundle: Bundle | None = None, begin: int = 0, end: int | None = None) -> Codes:
        """Read codes, of the steps from `begin` to before `end`; other chunks than those that have them stay unread.

        Args:
            bundle: Has the prior, where the codes need one; `check` should have held it against the header.
            begin: The first step.
            end: Behind the last; None: to the end, of a file that was cut with what arrived of the cut chunk.

        Returns:
            int64 `(1, codebooks, steps, *inner)`.

        Raises:
            UserError: The codes are damaged, none of them arrived, or these steps are not there.
        """
        header, parts, first = self.header, list[Codes](), 0
        coding = coding_of(header.coding, header.codebooks, bundle)
        last = sum(chunk.steps for chunk in self.chunks) if end is None else end
        for number, chunk in enumerate(self.chunks):
            if first < last and first + chunk.steps > begin:
                try:
                    found = coding.decode(chunk.payload, chunk.steps, header.inner, chunk.whole)
                    parts.append(_check_entries(found, header, number)[:, max(0, begin - first) : last - first])
                except (_Damage, Damage) as error:
                    raise UserError(f"{self.path}: {error or f'damaged: chunk {number} has no such codes'}") from None
            first += chunk.steps
        codes = np.concatenate(parts, axis=1) if parts else np.zeros((1, 0))
        if not codes.shape[1] or (end is not None and codes.shape[1] < end - begin):
            there = f"it has {self.steps} steps, not {begin} to {end}" if end is not None else ""
            raise UserError(f"{self.path}: {there or 'cut before the first code arrived'}")
        return np.asarray(codes[None])


class Writer:
    """Writes a signal's codes as they come.

    Args:
        file: Open for writing bytes.
        header: What holds for all of them.
        coding: How they are written.

    Attributes:
        payload: Bytes that codes took so far.
    """

    def __init__(self, file: BinaryIO, header: Header, coding: Coding) -> None:
        self.file = file
        self.header = header
        self.coding = coding
        self.whole = math.lcm(*(codebook.stride for codebook in header.codebooks))
        self.open = True
        self.payload = 0
        file.write(header.pack())

    def write(self, codes: npt.ArrayLike, units: int) -> None:
        """Write some steps' codes, `(codebooks, steps, *inner)`, as one chunk.

        Args:
            codes: As many steps as codebooks' strides divide, but in the last chunk.
            units: How much of the signal they stand for.

        Raises:
            ValueError: Shape or codes aren't the header's, or a chunk of other steps was the last one.
        """
        codes = np.asarray(codes, np.int64)
        codebooks, inner, steps = self.header.codebooks, self.header.inner, codes.shape[1]
        if codes.shape != (len(codebooks), steps, *inner) or not steps or not self.open:
            raise ValueError(f"codes {codes.shape} don't follow: ({len(codebooks)}, steps, *{inner}) do")
        sizes = np.array([codebook.size for codebook in codebooks]).reshape(-1, *(1 for _ in codes.shape[1:]))
        if (codes < 0).any() or (codes >= sizes).any():
            raise ValueError("a code is no entry of its codebook")
        self.open = steps % self.whole == 0
        payload = self.coding.encode(codes)
        self.payload += len(payload)
        body = _varint(steps) + _varint(units) + _varint(len(payload)) + payload
        self.file.write(body + _checksum(body))

    def close(self) -> None:
        """Write the end; the file stays open."""
        self.file.write(_varint(0))


def identity(folder: Path) -> bytes:
    """Return 8 bytes that identify a bundle: of the SHA-256 of its config's and exact graphs' checksums.

    Raises:
        UserError: The bundle has none.
    """
    files = read_json(folder / "export.json").get("files") or {}
    names = sorted(
        name for name in files if name == "config.json" or (name.startswith("onnx/") and name != DECODER_INT8)
    )
    if not names:
        raise UserError(f"{folder / 'export.json'}: lacks the checksums of the bundle's files")
    lines = "".join(f"{name} {files[name]['sha256']}\n" for name in names)
    return hashlib.sha256(lines.encode()).digest()[:8]


def header_of(bundle: Bundle, codes: npt.NDArray[np.integer], signal: Sequence[int], coding: Coding) -> Header:
    """Make the header of a bundle's codes `(1, codebooks, steps, *inner)`, all codebooks or the first of them."""
    known = identity(bundle.folder)
    inner, facts = tuple(codes.shape[3:]), tuple(signal)
    return Header(bundle.config["modality"], known, coding.name, coding.prior, coding.codebooks, inner, facts)


def check(header: Header, bundle: Bundle, path: Path, force: bool = False) -> None:
    """Check that a bundle can decode a container.

    Args:
        header: The container's header.
        bundle: The bundle to decode with.
        path: The container's path, for messages.
        force: Accept a container of another bundle that has the same kind of codes.

    Raises:
        UserError: It is another bundle's, or of codes that this bundle doesn't have.
    """
    if header.modality != bundle.config["modality"]:
        raise UserError(f"{path}: codes of {header.modality}, and {bundle.folder} is of {bundle.config['modality']}")
    if list(header.codebooks) != codebooks_of(bundle)[: len(header.codebooks)] or len(header.inner) != bundle.axes - 1:
        raise UserError(f"{path}: codes of other codebooks than those of {bundle.folder}; decode it by its own bundle")
    if header.bundle != identity(bundle.folder) and not force:
        raise UserError(
            f"{path}: was written by another bundle than {bundle.folder}, whose codes mean something else; decode by"
            " its own, or give --force if this is the same codec, exported anew"
        )
    if header.prior and header.prior != prior_identity(bundle.folder):  # no force helps: other chances, other codes
        raise UserError(
            f"{path}: its codes need a prior that {bundle.folder} doesn't have; decode it by its own bundle"
        )


def write(
    file: BinaryIO, header: Header, codes: npt.NDArray[np.integer], units: npt.NDArray[np.integer], coding: Coding
) -> int:
    """Write all of a signal's codes, in chunks; give the bytes of their payloads.

    Args:
        file: Open for writing bytes.
        header: What holds for all of them.
        codes: int64 `(1, codebooks, steps, *inner)`.
        units: How far into the signal each step reaches, `(steps,)`: of an image all 1.
        coding: How they are written.
    """
    writer = Writer(file, header, coding)
    each = max(1, CHUNK // max(1, header.per_step) // writer.whole) * writer.whole
    done = 0
    for begin in range(0, codes.shape[2], each):
        part = codes[0, :, begin : begin + each]
        reached = int(units[begin + part.shape[1] - 1])
        writer.write(part, reached - done)
        done = reached
    writer.close()
    return writer.payload


def read(path: Path) -> Container:
    """Read a file with one signal; see `read_all`.

    Raises:
        UserError: It holds none or several, or is damaged.
    """
    found = list(read_all(path))
    if len(found) > 1:
        raise UserError(f"{path}: holds {len(found)} signals, one after the other")
    return found[0]


def read_all(path: Path) -> Iterator[Container]:
    """Read each signal of a file: concatenated files are one file of several signals.

    Args:
        path: The file; `STREAM` for standard input.

    Raises:
        UserError: It can't be read, is none of varitok's, or is damaged.
    """
    try:
        data = sys.stdin.buffer.read() if path == STREAM else path.read_bytes()
    except OSError as error:
        raise UserError(f"{path}: can't be read ({error.strerror})") from error
    at = 0
    while at < len(data) or not at:
        try:
            found, at = _signal(_Reader(data, at), path)
        except _Damage as error:
            raise UserError(f"{path}: {error}") from None
        yield found


class _Damage(Exception):
    """What is wrong with a file, in a few words."""


class _Cut(Exception):
    """The file ends before its end."""


class _Reader:
    """Reads numbers and bytes, and never beyond the end."""

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


def _signal(reader: _Reader, path: Path) -> tuple[Container, int]:
    """Read a signal; give where it ends."""
    begin = reader.at
    try:
        header = _header(reader)
    except _Cut:
        raise _Damage("cut before the first code arrived") from None
    sizes = {"header": reader.at - begin, "payload": 0, "framing": 0}
    chunks, complete, left = list[Chunk](), False, MOST_ALL
    while not complete and (not chunks or chunks[-1].whole):
        start = reader.at
        try:
            chunk = _chunk(reader, header, len(chunks))
        except _Cut:
            sizes["framing"] += len(reader.data) - start
            reader.at = len(reader.data)
            break
        complete = chunk is None
        if chunk is not None:
            chunks.append(chunk)
            sizes["payload"] += len(chunk.payload)
            left -= chunk.steps * header.per_step
            if left < 0:
                raise _Damage(f"more than {MOST_ALL} codes are refused")
        sizes["framing"] += reader.at - start - (len(chunk.payload) if chunk else 0)
    if not chunks:
        raise _Damage("holds no codes" if complete else "cut before the first code arrived")
    return Container(path, header, tuple(chunks), complete, sizes), reader.at


def _chunk(reader: _Reader, header: Header, number: int) -> Chunk | None:
    """Read a chunk; None at the end of the signal."""
    start = reader.at
    steps = reader.number(MOST_CODES // max(1, header.per_step))
    if not steps:
        return None
    units, size = reader.number(1 << 40), reader.number(1 << 40)
    if not fits(header.coding, header.codebooks, size, steps, header.inner):
        raise _Damage(f"damaged: chunk {number} of {steps} steps can't have {size} bytes")
    whole = len(reader.data) - reader.at >= size + len(_checksum(b""))
    payload = reader.take(min(size, len(reader.data) - reader.at))
    if whole:
        reader.check(start, f"chunk {number}")
    else:
        reader.at = len(reader.data)
    return Chunk(steps, units, payload, whole)


def _header(reader: _Reader) -> Header:
    begin = reader.at
    if (found := reader.data[begin : begin + 4]) != MAGIC:
        raise _Cut if found and MAGIC.startswith(found) else _Damage("not a container of varitok's (.vtk)")
    reader.take(4)
    version, modality = reader.take(2)
    if version != VERSION:
        raise _Damage(f"version {version} of the format, this varitok reads {VERSION}; update varitok")
    bundle, (coding,), codebooks = reader.take(8), reader.take(1), list[Codebook]()
    if coding >= len(CODINGS):
        raise _Damage(f"codes of kind {coding} are not known; update varitok")
    prior = reader.take(8) if CODINGS[coding] in WITH_PRIOR else b""
    for _ in range(reader.number(MOST_CODEBOOKS)):
        count, size, stride = reader.number(MOST_CODEBOOKS), reader.number(MOST_ENTRIES), reader.number(MOST_STRIDE)
        codebooks += [Codebook(size, stride)] * count
        if not count or size < 2 or not stride or len(codebooks) > MOST_CODEBOOKS:
            raise _Damage("damaged: its codebooks can't be")
    inner, signal = ([reader.number(1 << 24) for _ in range(reader.number(MOST_AXES))] for _ in range(2))
    reader.check(begin, "the header")
    if modality >= len(MODALITIES) or not codebooks or math.prod(inner) * len(codebooks) > MOST_CODES or 0 in inner:
        raise _Damage("damaged: its codes' shape can't be")
    return Header(MODALITIES[modality], bundle, CODINGS[coding], prior, tuple(codebooks), tuple(inner), tuple(signal))


def _check_entries(codes: Codes, header: Header, chunk: int) -> Codes:
    """Refuse codes that are no entries: widths are whole bits."""
    for number, codebook in enumerate(header.codebooks):
        if (found := codes[number].max(initial=0)) >= codebook.size:
            raise _Damage(
                f"damaged: chunk {chunk}, codebook {number} has entries 0 to {codebook.size - 1}, got {found}"
            )
    return codes


def _varint(number: int) -> bytes:
    """Write a number in groups of 7 bits, the lowest first; the highest bit of a byte is set if another follows."""
    out = bytearray()
    while number > 0x7F:
        out.append(number & 0x7F | 0x80)
        number >>= 7
    return bytes([*out, number])


def _checksum(body: bytes) -> bytes:
    return zlib.crc32(body).to_bytes(4, "little")
