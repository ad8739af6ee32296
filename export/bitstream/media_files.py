"""Encode media files into containers, and decode containers into media files, in bounded memory."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from varitok import UserError

from ..runtime.bundle import Bundle
from ..runtime.files import SignalFile, open_output
from ..runtime.memory import MEMORY, Coded, decode_within, encode_within, passage
from ..runtime.tiling import Floats
from . import container
from .container import Container
from .entropy_coding import TOGETHER
from .packing import Codes
from .rate_control import Encoded, Quality, Target, fit_to_target

__all__ = ["decode_file", "decode_files", "encode_file"]

MOST_WAITING = 1 << 20  # codes of the files that are decoded together, about


def encode_file(
    bundle: Bundle,
    path: Path,
    out: Path,
    *,
    tokens: int | None = None,
    num_codebooks: int | None = None,
    target: Target = Target(),  # noqa: B008 (immutable)
    coding: str | None = None,
    memory: float = MEMORY,
) -> dict[str, Any]:
    """Encode a media file into a container; return its size, the kept tokens or codebooks, and changes to its signal.

    Args:
        bundle: The bundle to encode with.
        path: An image, audio or video file that the bundle supports; `STREAM` for standard input.
        out: The container; `STREAM` for standard output.
        tokens: Number of ordered tokens to keep; all if None.
        num_codebooks: Number of codebooks to keep; all if None.
        target: Size or quality that limits the kept tokens or codebooks further.
        coding: Entropy coding, one of `CODINGS`; None: learned if the bundle has a prior, else the smaller of packed
            and adaptive.
        memory: Peak memory of the process in GB; signals that need more are encoded in parts (`runtime/memory.py`).

    Raises:
        UserError: The file can't be read or is not supported, a number is out of range, the target can't be met, or the
            bundle needs more memory.

    Example:
        >>> encode_file(bundle, Path("photo.png"), Path("photo.vtk"), tokens=4, coding="packed")
        {'tokens': 4, 'bytes': 36, 'payload bytes': 3, 'coding': 'packed'}
    """
    bundle.check_kept(tokens, num_codebooks)
    with bundle.open_file(path) as file:
        try:
            coded = encode_within(bundle, file, memory, tokens=tokens, num_codebooks=num_codebooks)
            rate = bundle.sample_rate or file.frame_rate
            whole = Encoded(
                coded.codes,
                bundle.facts(coded.size, file.frame_rate),
                bundle.units_of(coded.codes.shape[2], coded.size[0]),
                coded.size[0] / rate if rate else None,
                coding,
            )

            def measure(one: Encoded) -> float:
                assert target.quality is not None
                return _measure(bundle, file, coded._replace(codes=one.codes), target.quality, memory)

            chosen = fit_to_target(bundle, whole, target, measure)
            written = chosen.serialize(bundle)
        except UserError as error:
            raise error if str(path) in str(error) else UserError(f"{path}: {error}") from error
    with open_output(out) as output:
        output.write(written.data)
    kept = {"tokens": chosen.codes.shape[-1]} if bundle.tokens else {"codebooks": chosen.codes.shape[1]}
    about = {"bytes": len(written.data), "payload bytes": written.payload, "coding": written.coding}
    return kept | about | ({"changes": file.changes} if file.changes else {})


def _measure(bundle: Bundle, file: SignalFile, coded: Coded, quality: Quality, memory: float) -> float:
    """Measure the quality of a file's codes.

    Raises:
        UserError: The metric needs the whole signal, which takes more memory.
    """
    parts = decode_within(bundle, coded.codes, coded.size, memory)
    original, values, lengths, end = passage(bundle, file), list[float](), list[int](), 0
    if coded.whole:
        return quality.measure(np.concatenate(list(parts), axis=2), original.take(0, coded.size[0]))
    if quality.combine is None:
        reason = f"needs the whole signal, which doesn't fit in {memory:g} GB"
        raise UserError(f"{quality.name} {reason}; give more --memory, or another target")
    for part in parts:
        begin, end = end, end + part.shape[2]
        values.append(quality.measure(part, original.take(begin, end)))
        lengths.append(part.shape[2])
    return quality.combine(values, lengths)


def decode_file(
    bundle: Bundle, path: Path, out: Path, *, to: str | None = None, force: bool = False, memory: float = MEMORY
) -> dict[str, Any]:
    """Decode a container's signals, concatenated, into a media file; return a summary.

    Args:
        bundle: The bundle that encoded them.
        path: The container; `STREAM` for standard input.
        out: The media file; `STREAM` for standard output.
        to: File format, one of `Bundle.written`; None: the suffix of `out` if that is one, else the first.
        force: Decode another bundle's container too; the result is noise unless both bundles export the same codec.
        memory: Peak memory of the process in GB; signals that need more are decoded in parts (`runtime/memory.py`).

    Raises:
        UserError: The container is damaged or another bundle's, the file can't be written, or the bundle needs more
            memory.

    Example:
        >>> decode_file(bundle, Path("photo.vtk"), Path("decoded.png"))
        {'tokens': 4, 'whole': True}
    """
    (found,) = decode_files(bundle, [(path, out)], to=to, force=force, memory=memory)
    if isinstance(found, UserError):
        raise found
    return found


def decode_files(
    bundle: Bundle,
    pairs: Sequence[tuple[Path, Path]],
    *,
    to: str | None = None,
    force: bool = False,
    memory: float = MEMORY,
) -> Iterator[dict[str, Any] | UserError]:
    """Decode containers as `decode_file` does; yield the summary of each in order, or its error.

    Equally long codes of neighboring files are decoded together, by fewer calls of a learned prior.

    Args:
        bundle: The bundle that encoded them.
        pairs: Each container and its media file.
        to: See `decode_file`.
        force: See `decode_file`.
        memory: See `decode_file`.
    """
    waiting: list[tuple[Path, Path, list[Container] | UserError]] = []
    count = 0
    for number, (path, out) in enumerate(pairs, 1):
        try:
            found = list(container.read_all(path))
            for one in found:
                container.check(one.header, bundle, path, force)
            count += sum(chunk.steps for one in found for chunk in one.chunks) * found[0].header.per_step
            waiting.append((path, out, found))
        except UserError as error:
            waiting.append((path, out, error))
        if number == len(pairs) or len(waiting) == TOGETHER or count >= MOST_WAITING:
            yield from _decode_waiting(bundle, waiting, to, memory)
            waiting, count = [], 0


def _decode_waiting(
    bundle: Bundle, waiting: Sequence[tuple[Path, Path, list[Container] | UserError]], to: str | None, memory: float
) -> Iterator[dict[str, Any] | UserError]:
    """Decode the codes of all files together, then write file by file."""
    every = [one for _, _, found in waiting if not isinstance(found, UserError) for one in found]
    decoded = iter(container.codes_together(every, bundle))
    for path, out, found in waiting:
        if isinstance(found, UserError):
            yield found
            continue
        codes = [next(decoded) for _ in found]
        try:
            yield _write_decoded(bundle, found, [_require(each) for each in codes], out, to, memory)
        except UserError as error:
            yield error if str(path) in str(error) else UserError(f"{path}: {error}")


def _require(codes: Codes | UserError) -> Codes:
    if isinstance(codes, UserError):
        raise codes
    return codes


def _write_decoded(
    bundle: Bundle, found: Sequence[Container], codes: Sequence[Codes], out: Path, to: str | None, memory: float
) -> dict[str, Any]:
    """Decode the signals of a file's codes, concatenated, into a media file; return a summary."""
    suffix = out.suffix[1:].lower()
    to = to or (suffix if suffix in bundle.written else bundle.written[0])
    arrived: dict[str, Any] = {}
    if not bundle.splits:
        arrived = {"tokens": codes[0].shape[2]} if bundle.tokens else {"codebooks": codes[0].shape[1]}
    arrived["whole"] = all(one.complete for one in found)
    if unchecked := sum(each.shape[2] - one.steps for each, one in zip(codes, found, strict=True)):
        arrived["steps unchecked"] = unchecked

    def chunks() -> Iterator[Floats]:
        for one, each in zip(found, codes, strict=True):
            size = bundle.signal_size(each, one.units if one.complete else None, one.header.signal)
            yield from decode_within(bundle, each, size, memory)

    with open_output(out) as file:
        return bundle.write_file(chunks(), found[0].header.signal, to, file) | arrived
