"""How much of a signal's codes is kept: the most that a size allows, or the least that a quality takes."""

import io
from bisect import bisect_left, bisect_right
from collections.abc import Callable
from typing import BinaryIO, NamedTuple

import numpy as np
import numpy.typing as npt

from varitok import UserError

from . import container
from .graphs import Array, Bundle
from .packing import Packing

__all__ = ["Encoded", "Target", "fitted"]


class Encoded(NamedTuple):
    """A signal and all of its codes.

    Attributes:
        codes: int64 `(1, books, steps, *inner)`.
        facts: The container's about the signal.
        units: How far into the signal each step reaches, `(steps,)` or more.
        original: What was encoded, float32 `(1, c, ...)` in [-1, 1].
        seconds: How long it lasts; None of an image, or where no rate is known.
    """

    codes: Array
    facts: tuple[int, ...]
    units: npt.NDArray[np.int64]
    original: npt.NDArray[np.float32]
    seconds: float | None

    def write(self, file: BinaryIO, bundle: Bundle) -> None:
        """Write the container."""
        container.write(file, container.header_of(bundle, self.codes, self.facts), self.codes, self.units)

    def size(self, bundle: Bundle) -> int:
        """Count the container's bytes."""
        file = io.BytesIO()
        self.write(file, bundle)
        return file.tell()

    def payload(self, bundle: Bundle) -> int:
        """Count the bytes of its codes, packed."""
        header = container.header_of(bundle, self.codes, self.facts)
        return Packing(header.books, header.inner).size(self.codes.shape[2])

    def cut(self, kept: int, ordered: bool) -> "Encoded":
        """Keep so many tokens of codes that are ordered, or so many books."""
        return self._replace(codes=self.codes[..., :kept] if ordered else self.codes[:, :kept])


class Target(NamedTuple):
    """What is asked for; one of them.

    Attributes:
        bytes: Of the whole file, at most.
        kbps: Kilobits of codes for each second, at most.
        psnr: dB over the signal as the codec takes it, peak to peak 2, at least.
    """

    bytes: int | None = None
    kbps: float | None = None
    psnr: float | None = None


def fitted(
    bundle: Bundle, encoded: Encoded, target: Target, decode: Callable[[Encoded], npt.NDArray[np.float32]]
) -> Encoded:
    """Keep as many tokens, or books where tokens are not ordered, as a target wants.

    Args:
        bundle: Of the codes.
        encoded: All of them.
        target: What is asked for.
        decode: Gives a signal as long as the original back.

    Raises:
        UserError: It can't be met; the nearest that can is told.
    """
    ordered = bool(bundle.tokens)
    cuts = [encoded.cut(kept, ordered) for kept in range(1, encoded.codes.shape[-1 if ordered else 1] + 1)]
    if target.bytes is not None:
        return _largest(cuts, lambda one: one.size(bundle), target.bytes, "--bytes", "bytes")
    if target.kbps is not None:
        if encoded.seconds is None:
            raise UserError(f"--kbps {target.kbps:g}: this signal has no duration; give --bytes")
        seconds = encoded.seconds
        rate = lambda one: one.payload(bundle) * 8 / 1000 / seconds  # noqa: E731
        return _largest(cuts, rate, target.kbps, "--kbps", "kbit/s")
    if target.psnr is not None:
        return _least(cuts, lambda one: _psnr(encoded.original, decode(one)), target.psnr)
    return encoded


def _largest(cuts: list[Encoded], measure: Callable[[Encoded], float], most: float, option: str, unit: str) -> Encoded:
    """Give the largest that isn't beyond a bound."""
    found = bisect_right(cuts, most, key=measure)
    if not found:
        raise UserError(
            f"{option} {most:g}: the least that there is has {measure(cuts[0]):.4g} {unit}; give that or more"
        )
    return cuts[found - 1]


def _least(cuts: list[Encoded], quality: Callable[[Encoded], float], wanted: float) -> Encoded:
    """Give one that reaches a quality: the least, where quality rises with what is kept."""
    below, best = 0, -np.inf
    for rung in sorted({*(1 << power for power in range(len(cuts).bit_length())), len(cuts)}):
        found = quality(cuts[rung - 1])
        if found >= wanted:
            return cuts[bisect_left(cuts, wanted, below, rung - 1, key=quality)]
        below, best = rung, max(best, found)
    raise UserError(f"--psnr {wanted:g}: what there is reaches {best:.2f} dB; ask for no more than that")


def _psnr(original: npt.NDArray[np.float32], back: npt.NDArray[np.float32]) -> float:
    error = float(np.mean((original.astype(np.float64) - back) ** 2))
    return 100.0 if error < 4e-10 else float(10 * np.log10(4 / error))
