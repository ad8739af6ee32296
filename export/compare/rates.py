"""The Bjontegaard rate (BD-rate): the mean difference in rate between two codecs at equal quality."""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

__all__ = ["bd_rate"]

Values = npt.NDArray[np.float64]
SAMPLES = 1000  # number of qualities to average over


def bd_rate(
    rates: Sequence[float], quality: Sequence[float], others: Sequence[float], theirs: Sequence[float]
) -> float:
    """Compute the Bjontegaard rate in percent of the other codec's; below 0, ours needs less.

    `bd_rate = 100 (exp(mean_q(log R_ours(q) - log R_other(q))) - 1)`, over the qualities q that both reach

    G. Bjontegaard, "Calculation of average PSNR differences between RD-curves", VCEG-M33 (2001), with log rates
    interpolated by monotone piecewise cubics (PCHIP: Fritsch and Carlson, 1980), as is usual since. Nothing is
    extrapolated. Only Pareto-optimal points count.

    Args:
        rates: Rates of our codec; points with rate 0 are ignored.
        quality: Quality of our codec at these rates, larger is better.
        others: Rates of the other codec.
        theirs: Quality of the other codec at these rates.

    Returns:
        Percent; NaN if both reach no common quality; the difference at a single quality if they share only one.
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
    """Return ascending qualities and log rates of the Pareto-optimal points."""
    found: list[tuple[float, float]] = []
    for rate, value in sorted(zip(rates, quality, strict=True), key=lambda point: (point[0], -point[1])):
        if rate > 0 and np.isfinite(value) and (not found or value > found[-1][0]):
            found.append((value, float(np.log(rate))))
    values = np.array(found).reshape(-1, 2)
    return values[:, 0], values[:, 1]


def _pchip(x: Values, y: Values, at: Values) -> Values:
    """Interpolate by cubics; slopes are weighted harmonic means of their neighbors', 0 if these change sign."""
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
    """Return the three-point slope at an end, limited to the sign of the first piece and to three times its slope."""
    if len(step) == 1:
        return float(slope[0])
    found = ((2 * step[0] + step[1]) * slope[0] - step[0] * slope[1]) / (step[0] + step[1])
    if found * slope[0] <= 0:
        return 0.0
    return float(3 * slope[0] if slope[0] * slope[1] < 0 and abs(found) > 3 * abs(slope[0]) else found)
