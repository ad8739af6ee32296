"""Rate control: choose how many tokens or codebooks to keep for a given size, bitrate or quality.

The search for a quality needs a few more decoder passes than log2 of the number of choices (ElasticTok, arXiv
2410.08368, section 3.3). `varitok.codecs.allocation` distributes tokens unequally over the blocks of a clip.
"""

import io
import math
from bisect import bisect_left, bisect_right
from collections.abc import Callable, Sequence
from itertools import accumulate
from typing import NamedTuple, TypeAlias

import numpy as np
import numpy.typing as npt

from varitok import UserError

from ..runtime.bundle import Array, Bundle
from . import container
from .entropy_coding import codebooks_of, coding_of, prior_identity

__all__ = ["Encoded", "Quality", "Target", "Written", "codings_of", "encode_signal", "fit_to_target", "psnr"]

Signal: TypeAlias = npt.NDArray[np.float32]


class Encoded(NamedTuple):
    """A signal and its codes.

    Attributes:
        codes: int64 `(1, codebooks, steps, *inner)`.
        facts: Facts about the signal for the container's header.
        units: Where each step ends in the signal, in samples or frames, `(steps,)` or longer.
        seconds: Duration; None for an image, or if no rate is known.
        coding: Entropy coding, one of `CODINGS`; None: learned if the bundle has a prior, else the smaller of packed
            and adaptive.
    """

    codes: Array
    facts: tuple[int, ...]
    units: npt.NDArray[np.int64]
    seconds: float | None
    coding: str | None = None

    def serialize(self, bundle: Bundle) -> "Written":
        """Serialize the codes to a container."""
        found = [self._write(bundle, name) for name in codings_of(bundle, self.coding)]
        return min(found, key=lambda one: len(one.data))

    def _write(self, bundle: Bundle, name: str) -> "Written":
        file = io.BytesIO()
        coding = coding_of(name, codebooks_of(bundle)[: self.codes.shape[1]], bundle)
        header = container.header_of(bundle, self.codes, self.facts, coding)
        payload = container.write(file, header, self.codes, self.units, coding)
        return Written(file.getvalue(), payload, name)

    def cut(self, kept: int, ordered: bool) -> "Encoded":
        """Return the first `kept` ordered tokens, or codebooks if tokens are not ordered."""
        return self._replace(codes=self.codes[..., :kept] if ordered else self.codes[:, :kept])


def encode_signal(
    bundle: Bundle,
    signal: Signal,
    *,
    tokens: int | None = None,
    num_codebooks: int | None = None,
    frame_rate: float | None = None,
) -> Encoded:
    """Encode a signal with a bundle.

    Args:
        bundle: The bundle to encode with.
        signal: The signal `(1, c, ...)`, in the form of `bundle.values`.
        tokens: Number of ordered tokens to keep; all if None.
        num_codebooks: Number of codebooks to keep; all if None.
        frame_rate: Frame rate of a clip; None if unknown.

    Raises:
        UserError: A number is out of range.

    Example:
        >>> encoded = encode_signal(bundle, bundle.values(image), tokens=4)
        >>> encoded.codes.shape, encoded.serialize(bundle).payload
        ((1, 1, 4), 3)
    """
    codes = bundle.encode_values(signal, tokens=tokens, num_codebooks=num_codebooks)
    units = bundle.units_of(codes.shape[2], signal.shape[2])
    rate = bundle.sample_rate or frame_rate
    seconds = signal.shape[2] / rate if rate else None
    return Encoded(codes, bundle.facts(signal.shape[2:], frame_rate), units, seconds)


class Written(NamedTuple):
    """A serialized container.

    Attributes:
        data: Content of the file.
        payload: Bytes of all payloads, without headers and framing.
        coding: Name of the entropy coding.
    """

    data: bytes
    payload: int
    coding: str


class Quality(NamedTuple):
    """Target quality of the decoded signal.

    Attributes:
        name: Name of the metric.
        wanted: Value to reach.
        measure: Metric of the decoded signal and the original, both float32 `(1, c, ...)`; NaN if undefined.
        lower: Whether lower is better.
        combine: Function of the values and lengths of a signal's parts that returns the whole's value; None if it
            can't be computed from them.
    """

    name: str
    wanted: float
    measure: Callable[[Signal, Signal], float]
    lower: bool = False
    combine: Callable[[Sequence[float], Sequence[int]], float] | None = None


class Target(NamedTuple):
    """Target of the rate control; at most one is not None.

    Attributes:
        bytes: Maximum size of the whole file.
        kbps: Maximum bitrate of the payload, in kbit/s.
        quality: Minimum quality of the decoded signal.
    """

    bytes: int | None = None
    kbps: float | None = None
    quality: Quality | None = None


def fit_to_target(
    bundle: Bundle, encoded: Encoded, target: Target, measure: Callable[[Encoded], float] = lambda _: math.nan
) -> Encoded:
    """Choose how many ordered tokens, or else codebooks, meet a target; return the shortened codes.

    A size or bitrate selects the most that fit, a quality the fewest that reach it. Codebooks are kept in whole layers
    (`Bundle.codebook_layers`).

    Args:
        bundle: The bundle of the codes.
        encoded: All codes.
        target: The constraint.
        measure: Returns the target's quality of codes, once they are decoded; NaN if undefined.

    Raises:
        UserError: The target can't be met; the message names the nearest value that can.

    Example:
        >>> encoded = encode_signal(bundle, bundle.values(image))
        >>> chosen = fit_to_target(bundle, encoded, Target(bytes=35))
        >>> encoded.codes.shape, chosen.codes.shape
        ((1, 1, 6), (1, 1, 3))
    """
    ordered = bool(bundle.tokens)
    most = encoded.codes.shape[-1 if ordered else 1]
    fewer = range(1, most) if ordered else (kept for kept in accumulate(bundle.codebook_layers) if kept < most)
    cuts = [encoded.cut(kept, ordered) for kept in (*fewer, most)]
    if target.bytes is not None:
        return _largest(cuts, lambda one: len(one.serialize(bundle).data), target.bytes, "--bytes", "bytes")
    if target.kbps is not None:
        if encoded.seconds is None:
            raise UserError(f"--kbps {target.kbps:g}: this signal has no duration; give --bytes")
        seconds = encoded.seconds
        rate = lambda one: one.serialize(bundle).payload * 8 / 1000 / seconds  # noqa: E731
        return _largest(cuts, rate, target.kbps, "--kbps", "kbit/s")
    if target.quality is not None:
        return _least(cuts, measure, target.quality)
    return encoded


def codings_of(bundle: Bundle, asked: str | None) -> tuple[str, ...]:
    """Return the names of the entropy codings to try: `asked`, or those of the bundle's default.

    Raises:
        UserError: The bundle's codes are continuous.
    """
    if not bundle.codebook_sizes:
        raise UserError("this codec's codes are continuous: a container holds only indices into codebooks")
    if asked is not None:
        return (asked,)
    return ("learned",) if prior_identity(bundle.folder) else ("packed", "adaptive")


def _largest(cuts: list[Encoded], measure: Callable[[Encoded], float], most: float, option: str, unit: str) -> Encoded:
    """Return the longest codes whose measure is at most `most`."""
    found = bisect_right(cuts, most, key=measure)
    if not found:
        raise UserError(f"{option} {most:g}: the shortest codes take {measure(cuts[0]):.4g} {unit}; give that or more")
    return cuts[found - 1]


def _least(cuts: list[Encoded], measure: Callable[[Encoded], float], quality: Quality) -> Encoded:
    """Return the shortest codes that reach a quality, assuming that quality increases with length."""
    sign = -1 if quality.lower else 1

    def worth(one: Encoded) -> float:
        found = sign * measure(one)
        return -np.inf if np.isnan(found) else found

    below, best = 0, -np.inf
    for rung in sorted({*(1 << power for power in range(len(cuts).bit_length())), len(cuts)}):
        found = worth(cuts[rung - 1])
        if found >= sign * quality.wanted:
            return cuts[bisect_left(cuts, sign * quality.wanted, below, rung - 1, key=worth)]
        below, best = rung, max(best, found)
    asked = f"{quality.name} {quality.wanted:g}"
    if np.isinf(best):
        raise UserError(f"{asked}: {quality.name} is undefined for this signal")
    raise UserError(f"{asked}: the codes reach at best {sign * best:.4g}; ask for no better than that")


def psnr(wanted: float) -> Quality:
    """Return a target PSNR in dB: 10 log10(4 / MSE), as signals in [-1, 1] have a range of 2; at most 100.

    Example:
        >>> psnr(30).measure(np.full((1, 1, 8), 0.2), np.zeros((1, 1, 8)))
        20.0
    """
    return Quality("PSNR", wanted, _psnr, combine=_psnr_of_parts)


def _psnr(back: Signal, original: Signal) -> float:
    error = float(np.mean((original.astype(np.float64) - back) ** 2))
    return 100.0 if error < 4e-10 else float(10 * np.log10(4 / error))


def _psnr_of_parts(values: Sequence[float], lengths: Sequence[int]) -> float:
    return float(-10 * np.log10(np.average(10 ** (-np.array(values) / 10), weights=lengths)))
