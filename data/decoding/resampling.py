"""Resample sound by windowed-sinc interpolation, with NumPy; the live page (`signals.js`) uses the same formula."""

import math
from fractions import Fraction
from functools import lru_cache
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

__all__ = ["Resampler", "resampled_length", "resampler"]

Floats = npt.NDArray[np.float32]
FINEST_RATIO = 512  # largest denominator of a ratio; 44,101 to 16,000 Hz would need 16,000 kernels
# Kaiser-windowed sinc, with the parameters of resampy's "kaiser_best".
ZEROS = 64  # zero crossings of the sinc on either side
ROLLOFF = 0.9475937167399596  # cutoff, as a share of the lower Nyquist frequency
BETA = 14.769656459379492
LEAST_STRIDE = 256  # samples; shorter steps are computed several at a time, as matrix products


class Resampler(NamedTuple):
    """A resampler between two rates, whose ratio is `up` / `down`.

    Output sample j is the sum over i of x[i] h(i / down - j / up), where h(t) = scale sinc(c t) kaiser(c t / ZEROS) and
    c = ROLLOFF min(down, up). Outputs j and j + up have the same weights, `down` samples apart.

    Attributes:
        down: Input samples of a period.
        up: Output samples of a period.
        width: Input samples before a period's first that its outputs depend on, and after its last.
        kernels: Weights of the outputs of `periods` periods: float32 `(2 width + periods * down, periods * up)`.
        periods: Periods computed at once.
    """

    down: int
    up: int
    width: int
    kernels: Floats
    periods: int

    def __call__(self, sound: Floats) -> Floats:
        """Resample `(channels, n)` to `(channels, ceil(n up / down))`; zeros surround the input."""
        stride, length = self.down * self.periods, sound.shape[1]
        steps = max(1, -(-length // stride))
        padded = np.pad(sound, ((0, 0), (self.width, self.width + steps * stride - length)))
        windows = np.lib.stride_tricks.sliding_window_view(padded, len(self.kernels), axis=1)[:, ::stride]
        made = np.ascontiguousarray(windows) @ self.kernels  # (channels, steps, periods * up)
        return made.reshape(len(sound), -1)[:, : -(-length * self.up // self.down)]


@lru_cache(maxsize=8)
def resampler(rate: int, wanted: int) -> Resampler | None:
    """Return a cached resampler from a sample rate in Hz to another; None if they are equal, or nearly."""
    ratio = _ratio(rate, wanted)
    if ratio == 1:
        return None
    down, up = ratio.denominator, ratio.numerator
    cutoff = ROLLOFF * min(down, up)
    width, periods = math.ceil(ZEROS * down / cutoff), -(-LEAST_STRIDE // down)
    inputs = np.arange(-width, width + periods * down)[:, None] / down
    times = cutoff * (inputs - np.arange(periods * up) / up)
    window = np.i0(BETA * np.sqrt(np.maximum(1 - (times / ZEROS) ** 2, 0))) * (np.abs(times) < ZEROS) / np.i0(BETA)
    kernels = np.sinc(times) * window * cutoff / down
    return Resampler(down, up, width, kernels.astype(np.float32), periods)


def resampled_length(samples: int, rate: int, wanted: int) -> int:
    """Return the length of `samples` samples at `rate` after resampling to `wanted`, ceil(samples * wanted / rate)."""
    ratio = _ratio(rate, wanted)
    return -(-samples * ratio.numerator // ratio.denominator)


def _ratio(rate: int, wanted: int) -> Fraction:
    return Fraction(wanted, rate).limit_denominator(FINEST_RATIO)
