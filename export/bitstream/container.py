"""Read and write containers (`.vtk`), files of a signal's codes, with NumPy only; CONTAINER.md is the specification."""

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

__all__ = [
    "Chunk",
    "Container",
    "Header",
    "Writer",
    "check",
    "codes_together",
    "header_of",
    "identity",
    "read",
    "read_all",
    "write",
]

MAGIC = b"\x89VTK"
VERSION = 1
MODALITIES = tuple(name for name, kind in BUNDLES.items() if issubclass(kind, Bundle))
MOST_CODEBOOKS = 4096
MOST_ENTRIES = 1 << 62
MOST_STRIDE = 64
MOST_AXES = 4
MOST_CODES = 1 << 24  # codes of a chunk: 128 MiB as int64
MOST_ALL = 1 << 27  # codes of a signal
SUFFIX = ".vtk"
CHUNK = 1 << 16  # approximate number of codes per written chunk


class Header(NamedTuple):
    """The header of a container; it applies to all of a signal's codes.

    Attributes:
        modality: One of `MODALITIES`.
        bundle: The bundle's `identity`.
        coding: Name of the entropy coding, one of `CODINGS`.
        prior: Identity of the prior of the entropy coding; empty if it needs none.
        codebooks: The kept codebooks.
        inner: Sizes of the codes' axes after that of steps: height and width of a clip's grid, or tokens of a block.
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
        """Serialize the header to bytes, as CONTAINER.md specifies."""
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
        """Number of codes per step."""
        return len(self.codebooks) * math.prod(self.inner)


class Chunk(NamedTuple):
    """A chunk of consecutive code steps.

    Attributes:
        steps: Number of steps.
        units: Their length in the signal, in samples or frames; 1 for an image.
        payload: Their coded bytes, truncated if the file is.
        whole: Whether the payload is complete and its checksum is right.
    """

    steps: int
    units: int
    payload: bytes
    whole: bool


class Container(NamedTuple):
    """A signal's container as read, with its payloads still coded.

    Attributes:
        path: Path of the file.
        header: The header, common to all chunks.
        chunks: All chunks in order; only the last one may be truncated.
        complete: Whether the end marker was read.
        sizes: Bytes of the header, of the payload, and of the framing around the payload.
    """

    path: Path
    header: Header
    chunks: tuple[Chunk, ...]
    complete: bool
    sizes: dict[str, int]

    @property
    def steps(self) -> int:
        """Number of steps with a verified checksum: all except those of a truncated chunk."""
        return sum(chunk.steps for chunk in self.chunks if chunk.whole)

    @property
    def units(self) -> int:
        """Length of these steps in the signal, in samples or frames."""
        return sum(chunk.units for chunk in self.chunks if chunk.whole)

    def codes(self, bundle: Bundle | None = None, begin: int = 0, end: int | None = None) -> Codes:
        """Decode the codes of the steps [begin, end); only the chunks of these steps are decoded.

        Args:
            bundle: The bundle whose prior the coding needs; verify it with `check` first.
            begin: First step.
            end: End of the steps, exclusive; None: all, including the readable steps of a truncated chunk.

        Returns:
            int64 `(1, codebooks, steps, *inner)`.

        Raises:
            UserError: The codes are damaged, the file is truncated before the first code, or it lacks these steps.

        Example:
            >>> read(path).codes(begin=2, end=6).shape
            (1, 2, 4)
        """
        chosen, first = list[int](), 0
        last = sum(chunk.steps for chunk in self.chunks) if end is None else end
        skipped = 0
        for number, chunk in enumerate(self.chunks):
            if first < last and first + chunk.steps > begin:
                chosen.append(number)
            elif first + chunk.steps <= begin:
                skipped += chunk.steps
            first += chunk.steps
        (found,) = _decode_chunks([self], [chosen], bundle)
        if isinstance(found, UserError):
            raise found
        parts = [np.concatenate(found, axis=1)[:, max(0, begin - skipped) : last - skipped]] if found else []
        codes = np.concatenate(parts, axis=1) if parts else np.zeros((1, 0))
        if not codes.shape[1] or (end is not None and codes.shape[1] < end - begin):
            there = f"it has {self.steps} steps, not {begin} to {end}" if end is not None else ""
            raise UserError(f"{self.path}: {there or 'cut before the first code arrived'}")
        return np.asarray(codes[None])


def codes_together(containers: Sequence[Container], bundle: Bundle) -> list[Codes | UserError]:
    """Decode all codes of several containers, chunks of equal shape together; each is that of `Container.codes`.

    Returns:
        For each container its codes `(1, codebooks, steps, *inner)`, or the error that `Container.codes` raises.
    """
    every = [range(len(one.chunks)) for one in containers]
    results: list[Codes | UserError] = []
    for one, found in zip(containers, _decode_chunks(containers, every, bundle), strict=True):
        if isinstance(found, UserError):
            results.append(found)
        elif not sum(part.shape[1] for part in found):
            results.append(UserError(f"{one.path}: cut before the first code arrived"))
        else:
            results.append(np.concatenate(found, axis=1)[None])
    return results


def _decode_chunks(
    containers: Sequence[Container], chosen: Sequence[Sequence[int]], bundle: Bundle | None
) -> list[list[Codes] | UserError]:
    """Decode the chosen chunks of each container; those of one form are decoded together."""
    alike: dict[tuple[Header, int, bool], list[tuple[int, int]]] = {}
    for which, (one, numbers) in enumerate(zip(containers, chosen, strict=True)):
        for number in numbers:
            chunk, form = one.chunks[number], one.header._replace(signal=())
            alike.setdefault((form, chunk.steps, chunk.whole), []).append((which, number))
    found: dict[tuple[int, int], Codes] = {}
    errors: dict[int, UserError] = {}
    for (header, steps, whole), places in alike.items():
        coding = coding_of(header.coding, header.codebooks, bundle)
        payloads = [containers[which].chunks[number].payload for which, number in places]
        decoded = coding.decode_together(payloads, steps, header.inner, whole)
        for (which, number), codes in zip(places, decoded, strict=True):
            try:
                if isinstance(codes, Damage):
                    raise codes
                found[which, number] = _check_entries(codes, header, number)
            except (_Damage, Damage) as error:
                reason = str(error) or f"damaged: no encoder writes the payload of chunk {number}"
                errors.setdefault(which, UserError(f"{containers[which].path}: {reason}"))
    return [errors.get(which) or [found[which, number] for number in numbers] for which, numbers in enumerate(chosen)]


class Writer:
    """Incremental writer of a container, one chunk per call.

    Args:
        file: Binary file, opened for writing.
        header: Header of the container.
        coding: Entropy coding of the codes.

    Attributes:
        payload: Bytes of all payloads so far.

    Example:
        >>> codes = bundle.encoding(8000)(np.zeros(400))
        >>> coding = coding_of("packed", codebooks_of(bundle))
        >>> with open(path, "wb") as file:
        ...     writer = Writer(file, header_of(bundle, codes, [8000], coding), coding)
        ...     writer.write(codes[0], units=400)  # (codebooks, steps)
        ...     writer.close()
        >>> read(path).steps
        10
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
        """Write codes `(codebooks, steps, *inner)` as one chunk.

        Args:
            codes: The codes; except in the last chunk, all codebooks' strides divide the number of steps.
            units: Their length in the signal, in samples or frames.

        Raises:
            ValueError: The shape or a code doesn't match the header, or the previous chunk had to be the last.
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
        """Write the end marker; the file stays open."""
        self.file.write(_varint(0))


def identity(folder: Path) -> bytes:
    """Return 8 bytes that identify a bundle: a hash of the SHA-256 checksums of its config and graphs, except int8.

    Raises:
        UserError: export.json lacks the checksums.

    Example:
        >>> len(identity(bundle.folder))
        8
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
    """Build the header of a bundle's codes `(1, codebooks, steps, *inner)`, of all or the first codebooks."""
    known = identity(bundle.folder)
    inner, facts = tuple(codes.shape[3:]), tuple(signal)
    return Header(bundle.config["modality"], known, coding.name, coding.prior, coding.codebooks, inner, facts)


def check(header: Header, bundle: Bundle, path: Path, force: bool = False) -> None:
    """Check that a bundle can decode a container.

    Args:
        header: The container's header.
        bundle: The bundle to decode with.
        path: The container's path, for messages.
        force: Accept another bundle's container, if its codes have the same form.

    Raises:
        UserError: The container was written with another bundle, or its codes don't have this bundle's form.

    Example:
        >>> found = read(path)
        >>> check(found.header, bundle, path)
    """
    if header.modality != bundle.config["modality"]:
        raise UserError(f"{path}: codes of {header.modality}, but {bundle.folder} is of {bundle.config['modality']}")
    if list(header.codebooks) != codebooks_of(bundle)[: len(header.codebooks)] or len(header.inner) != bundle.axes - 1:
        raise UserError(f"{path}: its codebooks are not those of {bundle.folder}; decode it with its own bundle")
    if header.bundle != identity(bundle.folder) and not force:
        raise UserError(
            f"{path}: was written with another bundle than {bundle.folder}; decode it with its own, or give --force if"
            " both are exports of the same codec"
        )
    # Not even with force: other probabilities decode to other codes.
    if header.prior and header.prior != prior_identity(bundle.folder):
        raise UserError(
            f"{path}: its codes need a prior that {bundle.folder} doesn't have; decode it with its own bundle"
        )


def write(
    file: BinaryIO, header: Header, codes: npt.NDArray[np.integer], units: npt.NDArray[np.integer], coding: Coding
) -> int:
    """Write all of a signal's codes in chunks; return the bytes of their payloads.

    Args:
        file: Binary file, opened for writing.
        header: Header of the container.
        codes: int64 `(1, codebooks, steps, *inner)`.
        units: Where each step ends in the signal, in samples or frames, `(steps,)`; all 1 for an image.
        coding: Entropy coding of the codes.

    Example:
        >>> codes = bundle.encode(np.zeros(400), 8000)
        >>> units = bundle.units_of(codes.shape[2], 400)  # 40, 80, ..., 400 samples
        >>> coding = coding_of("packed", codebooks_of(bundle))
        >>> with open(path, "wb") as file:
        ...     payload = write(file, header_of(bundle, codes, [8000], coding), codes, units, coding)
        >>> payload  # 10 tokens of 2 codes of 4 bits
        10
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
    """Read a file of one signal; see `read_all`.

    Raises:
        UserError: The file is empty or damaged, or holds several signals.

    Example:
        >>> found = read(path)
        >>> found.codes().shape, found.units, found.header.signal  # (1, codebooks, steps), samples, Hz
        ((1, 2, 10), 400, (8000,))
    """
    found = list(read_all(path))
    if len(found) > 1:
        raise UserError(f"{path}: holds {len(found)} signals, one after the other")
    return found[0]


def read_all(path: Path) -> Iterator[Container]:
    """Read each signal of a file; concatenated containers are one file of several signals.

    Args:
        path: The file; `STREAM` for standard input.

    Raises:
        UserError: The file can't be read, is not a container, or is damaged.

    Example:
        >>> with open(path, "rb") as file:
        ...     data = file.read()
        >>> size = path.write_bytes(data + data)
        >>> [found.steps for found in read_all(path)]
        [10, 10]
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
    """The file is damaged; the message is the reason."""


class _Cut(Exception):
    """The file is truncated."""


class _Reader:
    """A cursor over `data` that reads varints and bytes; raises `_Cut` at the end of the data."""

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
    """Read one signal; return it and the position of its end."""
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
                raise _Damage(f"has more than {MOST_ALL} codes, the maximum")
        sizes["framing"] += reader.at - start - (len(chunk.payload) if chunk else 0)
    if not chunks:
        raise _Damage("holds no codes" if complete else "cut before the first code arrived")
    return Container(path, header, tuple(chunks), complete, sizes), reader.at


def _chunk(reader: _Reader, header: Header, number: int) -> Chunk | None:
    """Read a chunk; return None at the end marker."""
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
        raise _Damage(f"coding {coding} is not known; update varitok")
    prior = reader.take(8) if CODINGS[coding] in WITH_PRIOR else b""
    for _ in range(reader.number(MOST_CODEBOOKS)):
        count, size, stride = reader.number(MOST_CODEBOOKS), reader.number(MOST_ENTRIES), reader.number(MOST_STRIDE)
        codebooks += [Codebook(size, stride)] * count
        if not count or size < 2 or not stride or len(codebooks) > MOST_CODEBOOKS:
            raise _Damage("damaged: its codebooks are invalid")
    inner, signal = ([reader.number(1 << 24) for _ in range(reader.number(MOST_AXES))] for _ in range(2))
    reader.check(begin, "the header")
    if modality >= len(MODALITIES) or not codebooks or math.prod(inner) * len(codebooks) > MOST_CODES or 0 in inner:
        raise _Damage("damaged: the shape of its codes is invalid")
    return Header(MODALITIES[modality], bundle, CODINGS[coding], prior, tuple(codebooks), tuple(inner), tuple(signal))


def _check_entries(codes: Codes, header: Header, chunk: int) -> Codes:
    """Check that codes are less than their codebook's size, which packed codes of whole bits may exceed."""
    for number, codebook in enumerate(header.codebooks):
        if (found := codes[number].max(initial=0)) >= codebook.size:
            raise _Damage(
                f"damaged: chunk {chunk}, codebook {number} has entries 0 to {codebook.size - 1}, got {found}"
            )
    return codes


def _varint(number: int) -> bytes:
    """Encode an unsigned integer in LEB128: 7 bits per byte, the lowest first; the highest bit marks continuation."""
    out = bytearray()
    while number > 0x7F:
        out.append(number & 0x7F | 0x80)
        number >>= 7
    return bytes([*out, number])


def _checksum(body: bytes) -> bytes:
    return zlib.crc32(body).to_bytes(4, "little")
