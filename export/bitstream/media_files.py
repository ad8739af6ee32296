"""Encode media files into containers, and decode containers into media files."""

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from varitok import UserError

from ..runtime.bundle import Bundle
from ..runtime.files import Part, write_output
from . import container
from .rate_control import Encoded, Target, encode_signal, fit_to_target

__all__ = ["decode_file", "encode_file"]


def encode_file(
    bundle: Bundle,
    path: Path,
    out: Path,
    *,
    tokens: int | None = None,
    num_codebooks: int | None = None,
    target: Target = Target(),  # noqa: B008 (immutable)
    coding: str | None = None,
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

    Raises:
        UserError: The file can't be read or is not supported, a number is out of range, or the target can't be met.

    Example:
        >>> encode_file(bundle, Path("photo.png"), Path("photo.vtk"), tokens=4, coding="packed")
        {'tokens': 4, 'bytes': 36, 'payload bytes': 3, 'coding': 'packed'}
    """
    with bundle.open_file(path) as file:
        signal, rate, changes = file.read(), file.frame_rate, file.changes
    whole = encode_signal(bundle, signal, tokens=tokens, num_codebooks=num_codebooks, frame_rate=rate)._replace(
        coding=coding
    )
    shape = whole.original.shape

    def decoded(part: Encoded) -> npt.NDArray[np.float32]:
        back = bundle.decode(part.codes)
        return back[tuple(slice(side) for side in shape)]

    try:
        chosen = fit_to_target(bundle, whole, target, decoded)
        written = chosen.serialize(bundle)
    except UserError as error:
        raise UserError(f"{path}: {error}") from error
    write_output(out, written.data)
    kept = {"tokens": chosen.codes.shape[-1]} if bundle.tokens else {"codebooks": chosen.codes.shape[1]}
    about = {"bytes": len(written.data), "payload bytes": written.payload, "coding": written.coding}
    return kept | about | ({"changes": changes} if changes else {})


def decode_file(bundle: Bundle, path: Path, out: Path, *, to: str | None = None, force: bool = False) -> dict[str, Any]:
    """Decode a container's signals, concatenated, into a media file; return a summary.

    Args:
        bundle: The bundle that encoded them.
        path: The container; `STREAM` for standard input.
        out: The media file; `STREAM` for standard output.
        to: File format, one of `Bundle.written`; None: the suffix of `out` if that is one, else the first.
        force: Decode another bundle's container too; the result is noise unless both bundles export the same codec.

    Raises:
        UserError: The container is damaged or another bundle's, or the file can't be written.

    Example:
        >>> decode_file(bundle, Path("photo.vtk"), Path("decoded.png"))
        {'tokens': 4, 'whole': True}
    """
    suffix = out.suffix[1:].lower()
    to = to or (suffix if suffix in bundle.written else bundle.written[0])
    found = list(container.read_all(path))
    for one in found:
        container.check(one.header, bundle, path, force)
    codes = [one.codes(bundle) for one in found]
    arrived: dict[str, Any] = {"whole": all(one.complete for one in found)}
    if unchecked := sum(each.shape[2] - one.steps for each, one in zip(codes, found, strict=True)):
        arrived["steps unchecked"] = unchecked
    parts = [
        Part(each, one.units if one.complete else None, one.header.signal)
        for each, one in zip(codes, found, strict=True)
    ]
    data, kept = bundle.write_file(parts, to, path)
    write_output(out, data)
    return kept | arrived
