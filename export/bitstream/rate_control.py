"""How much of a signal's codes is kept: a number, the most that a size allows, or the least that a quality takes.

The search for a quality takes decoder passes, a few more than log2 of what can be kept (ElasticTok, arXiv 2410.08368,
section 3.3). Unequal shares for the blocks of clips: `varitok.codecs.allocation`.
"""

import io
from bisect import bisect_left, bisect_right
from collections.abc import Callable
from typing import NamedTuple, TypeAlias

import numpy as np
import numpy.typing as npt

from varitok import UserError

from ..runtime.bundle import Array, Bundle
from . import container
from .entropy_coding import codebooks_of, coding_of, prior_identity

__all__ = ["Encoded", "Quality", "Target", "Written", "encode_signal", "fit_to_target", "psnr"]

Signal: TypeAlias = npt.NDArray[np.float32]


class Encoded(NamedTuple):
    """A signal and all of its codes.

    Attributes:
        codes: int64 `(1, codebooks, steps, *inner)`.
        facts: The container's about the signal.
        units: How far into the signal each step reaches, `(steps,)` or more.
        original: What was encoded, float32 `(1, c, ...)` in [-1, 1].
        seconds: How long it lasts; None of an image, or where no rate is known.
        coding: How codes are written, one of `CODINGS`; None: by the bundle's prior, without one the smaller of what
            can do without.
    """

    codes: Array
    facts: tuple[int, ...]
    units: npt.NDArray[np.int64]
    original: Signal
    seconds: float | None
    coding: str | None = None

    def serialize(self, bundle: Bundle) -> "Written":
        """Write the container."""
        found = [self._write(bundle, name) for name in _codings(bundle, self.coding)]
        return min(found, key=lambda one: len(one.data))

    def _write(self, bundle: Bundle, name: str) -> "Written":
        file = io.BytesIO()
        coding = coding_of(name, codebooks_of(bundle)[: self.codes.shape[1]], bundle)
        header = container.header_of(bundle, self.codes, self.facts, coding)
        payload = container.write(file, header, self.codes, self.units, coding)
        return Written(file.getvalue(), payload, name)

    def cut(self, kept: int, ordered: bool) -> "Encoded":
        """Keep the first `kept` ordered tokens, or codebooks."""
        return self._replace(codes=self.codes[..., :kept] if ordered else self.codes[:, :kept])


def encode_signal(
    bundle: Bundle,
    signal: Signal,
    *,
    tokens: int | None = None,
    num_codebooks: int | None = None,
    frame_rate: float | None = None,
) -> Encoded:
    """Encode a signal `(1, c, ...)`, as a bundle's `values` gives it.

    Args:
        bundle: The bundle to encode with.
        signal: The signal.
        tokens: Number of ordered tokens to keep; all if None.
        num_codebooks: Number of codebooks to keep; all if None.
        frame_rate: Frame rate of a clip; None if unknown.

    Raises:
        UserError: A number is out of range.
    """
    codes = bundle.encode_values(signal, tokens=tokens, num_codebooks=num_codebooks)
    units = bundle.units_of(codes.shape[2], signal.shape[2])
    rate = bundle.sample_rate or frame_rate
    seconds = signal.shape[2] / rate if rate else None
    return Encoded(codes, bundle.facts(signal, frame_rate), units, signal, seconds)


class Written(NamedTuple):
    """A container.

    Attributes:
        data: The file.
        payload: Bytes of it that are codes.
        coding: How they are written.
    """

    data: bytes
    payload: int
    coding: str


class Quality(NamedTuple):
    """What a signal that comes back should be worth.

    Attributes:
        name: What the measure is called.
        wanted: The value that is enough.
        measure: Compares a decoded signal with the original, float32 `(1, c, ...)` both; NaN where it can't.
        lower: Whether less is better.
    """

    name: str
    wanted: float
    measure: Callable[[Signal, Signal], float]
    lower: bool = False


class Target(NamedTuple):
    """What is asked for; one of them.

    Attributes:
        bytes: Largest size of the whole file.
        kbps: Most kilobits of codes per second.
        quality: Least quality of the decoded signal.
    """

    bytes: int | None = None
    kbps: float | None = None
    quality: Quality | None = None


def fit_to_target(bundle: Bundle, encoded: Encoded, target: Target, decode: Callable[[Encoded], Signal]) -> Encoded:
    """Keep as many tokens, or codebooks where tokens are not ordered, as a target wants.

    Args:
        bundle: The bundle of the codes.
        encoded: All of them.
        target: The constraint.
        decode: Gives a signal as long as the original back.

    Raises:
        UserError: It can't be met; the message names the nearest value that can.
    """
    ordered = bool(bundle.tokens)
    cuts = [encoded.cut(kept, ordered) for kept in range(1, encoded.codes.shape[-1 if ordered else 1] + 1)]
    if target.bytes is not None:
        return _largest(cuts, lambda one: len(one.serialize(bundle).data), target.bytes, "--bytes", "bytes")
    if target.kbps is not None:
        if encoded.seconds is None:
            raise UserError(f"--kbps {target.kbps:g}: this signal has no duration; give --bytes")
        seconds = encoded.seconds
        rate = lambda one: one.serialize(bundle).payload * 8 / 1000 / seconds  # noqa: E731
        return _largest(cuts, rate, target.kbps, "--kbps", "kbit/s")
    if target.quality is not None:
        return _least(cuts, decode, target.quality)
    return encoded


def _codings(bundle: Bundle, asked: str | None) -> tuple[str, ...]:
    if not bundle.codebook_sizes:
        raise UserError("this codec's codes are continuous: there is nothing to write")
    if asked is not None:
        return (asked,)
    return ("learned",) if prior_identity(bundle.folder) else ("packed", "adaptive")


def _largest(cuts: list[Encoded], measure: Callable[[Encoded], float], most: float, option: str, unit: str) -> Encoded:
    """Return the largest that isn't beyond a bound."""
    found = bisect_right(cuts, most, key=measure)
    if not found:
        raise UserError(
            f"{option} {most:g}: the least that there is has {measure(cuts[0]):.4g} {unit}; give that or more"
        )
    return cuts[found - 1]


def _least(cuts: list[Encoded], decode: Callable[[Encoded], Signal], quality: Quality) -> Encoded:
    """Return the smallest that reaches a quality, assuming that quality rises with size."""
    sign = -1 if quality.lower else 1

    def worth(one: Encoded) -> float:
        found = sign * quality.measure(decode(one), one.original)
        return -np.inf if np.isnan(found) else found

    below, best = 0, -np.inf
    for rung in sorted({*(1 << power for power in range(len(cuts).bit_length())), len(cuts)}):
        found = worth(cuts[rung - 1])
        if found >= sign * quality.wanted:
            return cuts[bisect_left(cuts, sign * quality.wanted, below, rung - 1, key=worth)]
        below, best = rung, max(best, found)
    asked = f"{quality.name} {quality.wanted:g}"
    if np.isinf(best):
        raise UserError(f"{asked}: this signal has no {quality.name}")
    raise UserError(f"{asked}: what there is reaches {sign * best:.4g}; ask for no better than that")


def psnr(wanted: float) -> Quality:
    """Ask for decibels over the signal as the codec takes it, peak to peak 2; at most 100."""
    return Quality("PSNR", wanted, _psnr)


def _psnr(back: Signal, original: Signal) -> float:
    error = float(np.mean((original.astype(np.float64) - back) ** 2))
    return 100.0 if error < 4e-10 else float(10 * np.log10(4 / error))
