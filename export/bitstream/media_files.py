"""Media files to containers and back."""

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
    target: Target = Target(),  # noqa: B008 (it can't be changed)
    coding: str | None = None,
) -> dict[str, Any]:
    """Encode a file into a container; give how large it became.

    Args:
        bundle: The bundle to encode with.
        path: An image, sound or clip, as the bundle takes them; `STREAM` for standard input.
        out: The container; `STREAM` for standard output.
        tokens: Number of ordered tokens to keep; all if None.
        num_codebooks: Number of codebooks to keep; all if None.
        target: Keep as much of these as a size or quality requires.
        coding: How codes are written, one of `CODINGS`; None: by the bundle's prior, without one the smaller of what
            can do without.

    Raises:
        UserError: The file can't be read, or isn't the bundle's; a number is out of range, a target can't be met.
    """
    signal, rate = bundle.read_file(path)
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
    return kept | {"bytes": len(written.data), "payload bytes": written.payload, "coding": written.coding}


def decode_file(bundle: Bundle, path: Path, out: Path, *, to: str | None = None, force: bool = False) -> dict[str, Any]:
    """Decode a container's signals, one after the other, into a picture, a sound or a clip; give what arrived.

    Args:
        bundle: That which encoded them.
        path: The container; `STREAM` for standard input.
        out: The file; `STREAM` for standard output.
        to: One of `Bundle.written`; None for the suffix of `out`, or for the first if that is none of them.
        force: Decode what another bundle wrote too: noise, unless it is a copy that was exported anew.

    Raises:
        UserError: The container is damaged or another bundle's, or the file can't be written.
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
