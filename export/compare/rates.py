"""The Bjontegaard rate: how much more or less one codec needs than another for the same quality."""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

__all__ = ["bd_rate"]

Values = npt.NDArray[np.float64]
SAMPLES = 1000  # of the common qualities


def bd_rate(
    rates: Sequence[float], quality: Sequence[float], others: Sequence[float], theirs: Sequence[float]
) -> float:
    """Compute the mean difference of rates at equal quality, in percent of the others': below 0, ours are smaller.

    G. Bjontegaard, "Calculation of average PSNR differences between RD-curves", VCEG-M33 (2001), with log rates
    interpolated by piecewise cubics that don't overshoot (PCHIP: Fritsch and Carlson, 1980), as is usual since. Only
    the qualities that both reach count; nothing is extrapolated. Points that a cheaper one beats are left out.

    Args:
        rates: Ours, above 0.
        quality: Ours at these, larger is better.
        others: Rates of the other codec.
        theirs: Its quality.

    Returns:
        Percent; NaN where no quality is common to both. Where that is one alone, the difference there.
    """
    (ours, x), (other, y) = _curve(rates, quality), _curve(others, theirs)
    if not len(ours) or not len(other):
        return float("nan")
    low, high = max(ours[0], other[0]), min(ours[-1], other[-1])
    if low > high:
        return float("nan")
    at = np.linspace(low, high, SAMPLES)
    return float(100 * np.expm1(np.mean(_pchip(ours, x, at) - _pchip(other, y, at))))


def _curve(rates: Sequence[float], quality: Sequence[float]) -> tuple[Values, Values]:
    """Return qualities, rising, and log rates, of the points that no cheaper one equals."""
    found: list[tuple[float, float]] = []
    for rate, value in sorted(zip(rates, quality, strict=True), key=lambda point: (point[0], -point[1])):
        if rate > 0 and np.isfinite(value) and (not found or value > found[-1][0]):
            found.append((value, float(np.log(rate))))
    values = np.array(found).reshape(-1, 2)
    return values[:, 0], values[:, 1]


def _pchip(x: Values, y: Values, at: Values) -> Values:
    """Interpolate by cubics whose slopes are weighted harmonic means of those around, 0 if these change sign."""
    if len(x) == 1:
        return np.full_like(at, y[0])
    step, slope = np.diff(x), np.diff(y) / np.diff(x)
    inner = np.zeros(len(x) - 2)
    same = slope[:-1] * slope[1:] > 0
    first, second = 2 * step[1:] + step[:-1], step[1:] + 2 * step[:-1]
    inner[same] = ((first + second)[same]) / (first[same] / slope[:-1][same] + second[same] / slope[1:][same])
    slopes = np.concatenate([[_end(step, slope)], inner, [_end(step[::-1], slope[::-1])]])
    left = np.clip(np.searchsorted(x, at, side="right") - 1, 0, len(step) - 1)
    h, t = step[left], (at - x[left]) / step[left]
    return np.asarray(
        (1 + 2 * t) * (1 - t) ** 2 * y[left]
        + t * (1 - t) ** 2 * h * slopes[left]
        + t**2 * (3 - 2 * t) * y[left + 1]
        + t**2 * (t - 1) * h * slopes[left + 1]
    )


def _end(step: Values, slope: Values) -> float:
    """Return the slope at an end, from three points: of the first piece's sign, and at most three times as steep."""
    if len(step) == 1:
        return float(slope[0])
    found = ((2 * step[0] + step[1]) * slope[0] - step[0] * slope[1]) / (step[0] + step[1])
    if found * slope[0] <= 0:
        return 0.0
    return float(3 * slope[0] if slope[0] * slope[1] < 0 and abs(found) > 3 * abs(slope[0]) else found)
