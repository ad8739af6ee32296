"""Distributions that lengths are drawn from, from 1 to a total: tokens or codebooks."""

import math
from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from varitok import UserError

__all__ = [
    "Curriculum",
    "Distribution",
    "FallingMinimum",
    "FixedSet",
    "Full",
    "LogUniform",
    "PowerLaw",
    "PowersOfTwo",
    "Range",
    "RoundedUp",
    "TruncatedNormal",
    "Uniform",
    "ladder",
]


def ladder(total: int) -> list[int]:
    """List the kept lengths that are reported: 1, 2, 4, ... and `total` itself."""
    return [2**i for i in range(math.ceil(math.log2(total)))] + [total] if total > 1 else [1]


class Distribution(Protocol):
    """Draws lengths from 1 to a total."""

    def __call__(self, count: int, total: int, generator: torch.Generator | None, progress: float = 1.0) -> Tensor:
        """Draw int64 `(count,)` lengths in [1, total], on the CPU.

        Args:
            count: How many.
            total: The most.
            generator: Source of chance.
            progress: Share of the run's updates that are done, in [0, 1]; only a curriculum looks at it.
        """


class Full:
    """Keeps every token: a fixed-length tokenizer."""

    def __call__(self, count: int, total: int, generator: torch.Generator | None, progress: float = 1.0) -> Tensor:
        """Return `total` for each sample."""
        return torch.full((count,), total)


class Uniform:
    """Every length from a share of the total on is equally likely (One-D-Piece, section 3.2: from 1).

    Args:
        low: The least share, in [0, 1] (ElasticTok: a sixteenth); a length is never below 1.

    Raises:
        UserError: The share is out of its range.
    """

    def __init__(self, low: float = 0.0) -> None:
        if not 0 <= low <= 1:
            raise UserError(f"length: Uniform needs a share from 0 to 1, got low={low}")
        self.low = low

    def __call__(self, count: int, total: int, generator: torch.Generator | None, progress: float = 1.0) -> Tensor:
        """Draw integers up to `total`."""
        return torch.randint(max(1, round(self.low * total)), total + 1, (count,), generator=generator)


class LogUniform:
    """Every octave of lengths is equally likely: P(k) = log((k + 1) / k) / log(total + 1)."""

    def __call__(self, count: int, total: int, generator: torch.Generator | None, progress: float = 1.0) -> Tensor:
        """Draw integers from 1 to `total`, short ones more often."""
        drawn = torch.rand(count, generator=generator, dtype=torch.float64) * math.log(total + 1)
        return drawn.exp().long().clamp(1, total)


class PowersOfTwo:
    """The rungs 1, 2, 4, ... and the total are equally likely (FlexTok, section 3.1)."""

    def __call__(self, count: int, total: int, generator: torch.Generator | None, progress: float = 1.0) -> Tensor:
        """Draw rungs of `ladder(total)`."""
        return _pick(torch.tensor(ladder(total)), count, generator)


class RoundedUp:
    """Uniform lengths rounded up to the next rung of 1, 2, 4, ... and the total (FlexTok's `uniform_pow2`).

    The total is drawn about half of the time.
    """

    def __call__(self, count: int, total: int, generator: torch.Generator | None, progress: float = 1.0) -> Tensor:
        """Draw rungs of `ladder(total)`, each as often as the lengths since the rung below it."""
        rungs = torch.tensor(ladder(total))
        return rungs[torch.bucketize(Uniform()(count, total, generator), rungs)]


class FixedSet:
    """The lengths of a list are equally likely, one that is in it twice twice as much (FunCodec, arXiv 2309.07405).

    Args:
        lengths: From 1 on.

    Raises:
        UserError: There is none, or one is below 1 or, when drawn from, above the total.
    """

    def __init__(self, lengths: Sequence[int]) -> None:
        if not lengths or min(lengths) < 1:
            raise UserError(f"length: FixedSet needs lengths of 1 or more, got {list(lengths)}")
        self.lengths = torch.tensor(list(lengths))

    def __call__(self, count: int, total: int, generator: torch.Generator | None, progress: float = 1.0) -> Tensor:
        """Draw from the list."""
        if self.lengths.max() > total:
            raise UserError(f"length: FixedSet holds {int(self.lengths.max())}, and there are only {total}")
        return _pick(self.lengths, count, generator)


class Range:
    """Every length from `low` to `high` is equally likely, in strides (arXiv 2402.12208: 3 to 8 codebooks).

    Args:
        low: The least.
        high: The most; the total if None.
        stride: Between two neighbors, counted from `low` (KARL, arXiv 2507.07995: 16).

    Raises:
        UserError: `low` is not from 1 to `high`, the stride below 1, or, when drawn from, the total below a bound.
    """

    def __init__(self, low: int = 1, high: int | None = None, stride: int = 1) -> None:
        if low < 1 or stride < 1 or (high is not None and high < low):
            raise UserError(f"length: Range needs 1 <= low <= high and stride >= 1, got {low}, {high}, {stride}")
        self.low = low
        self.high = high
        self.stride = stride

    def __call__(self, count: int, total: int, generator: torch.Generator | None, progress: float = 1.0) -> Tensor:
        """Draw `low`, `low + stride`, ... up to `high`."""
        high = total if self.high is None else self.high
        if max(self.low, high) > total:
            raise UserError(f"length: Range goes to {max(self.low, high)}, and there are only {total}")
        return _pick(torch.arange(self.low, high + 1, self.stride), count, generator)


class TruncatedNormal:
    """A normal distribution between two bounds, all in shares of the total (AdapTok, arXiv 2505.17011).

    AdapTok's own values, mean 256 and deviation 128 between 32 and 512 of 512 tokens, are the defaults.

    Args:
        mean: Mean of the distribution before truncation.
        deviation: Its standard deviation, above 0.
        low: The least share, in [0, 1]; a length is never below 1.
        high: The most, in [low, 1].

    Raises:
        UserError: A value is out of its range.
    """

    def __init__(self, mean: float = 0.5, deviation: float = 0.25, low: float = 0.0625, high: float = 1.0) -> None:
        if not (deviation > 0 and 0 <= low <= high <= 1):
            raise UserError(
                f"length: TruncatedNormal needs deviation > 0, 0 <= low <= high <= 1: {deviation, low, high}"
            )
        self.mean = mean
        self.deviation = deviation
        self.low = low
        self.high = high

    def __call__(self, count: int, total: int, generator: torch.Generator | None, progress: float = 1.0) -> Tensor:
        """Draw integers between the bounds, each as likely as the normal density at it."""
        low, high = (max(1, round(bound * total)) for bound in (self.low, self.high))
        lengths = torch.arange(low, high + 1)
        return lengths[
            _draw_index(-0.5 * ((lengths.double() / total - self.mean) / self.deviation) ** 2, count, generator)
        ]


class PowerLaw:
    """Longer ones grow likelier as training goes on: p(k) ~ (k / total) ** exponent (GigaTok's code, arXiv 2504.08736).

    Args:
        start: Exponent at the start; 0 is uniform.
        end: Exponent at the end, reached evenly; GigaTok's is its epochs over T.
    """

    def __init__(self, start: float = 0.0, end: float = 1.0) -> None:
        self.start = start
        self.end = end

    def __call__(self, count: int, total: int, generator: torch.Generator | None, progress: float = 1.0) -> Tensor:
        """Draw integers from 1 to `total`."""
        exponent = self.start + (self.end - self.start) * progress
        return 1 + _draw_index(exponent * torch.arange(1, total + 1, dtype=torch.float64).log(), count, generator)


class FallingMinimum:
    """Every length from a minimum on is equally likely, and the minimum falls from the total to 1 (ours).

    The tail is learnt before it is dropped.

    Args:
        until: Share of the run at whose end the minimum is 1, in (0, 1].
        power: Above 1 the minimum falls late, below 1 early.

    Raises:
        UserError: A value is out of its range.
    """

    def __init__(self, until: float = 0.5, power: float = 1.0) -> None:
        self.until, self.power = _pace(until, power, "FallingMinimum")

    def __call__(self, count: int, total: int, generator: torch.Generator | None, progress: float = 1.0) -> Tensor:
        """Draw integers from the minimum to `total`."""
        minimum = total - round((total - 1) * min(1.0, progress / self.until) ** self.power)
        return torch.randint(minimum, total + 1, (count,), generator=generator)


class Curriculum:
    """Goes over from one distribution to another: draws of the second take the place of the first's (ours).

    Args:
        start: What is drawn from at the start.
        end: What is drawn from at the end.
        until: Share of the run at whose end only the second is left, in (0, 1].
        power: The second's share is `(progress / until) ** power`.

    Raises:
        UserError: A value is out of its range.
    """

    def __init__(self, start: Distribution, end: Distribution, until: float = 0.5, power: float = 1.0) -> None:
        self.start = start
        self.end = end
        self.until, self.power = _pace(until, power, "Curriculum")

    def __call__(self, count: int, total: int, generator: torch.Generator | None, progress: float = 1.0) -> Tensor:
        """Draw from both, and choose for each sample."""
        share = min(1.0, progress / self.until) ** self.power
        first, second = (made(count, total, generator, progress) for made in (self.start, self.end))
        return torch.where(torch.rand(count, generator=generator) < share, second, first)


def _pick(choices: Tensor, count: int, generator: torch.Generator | None) -> Tensor:
    """Draw from a list, each entry equally likely."""
    return choices[torch.randint(len(choices), (count,), generator=generator)]


def _draw_index(weights: Tensor, count: int, generator: torch.Generator | None) -> Tensor:
    """Draw places of a list of logarithmic weights, float64."""
    # Against the greatest weight: they may span more than a float does.
    steps = (weights - weights.max()).exp().cumsum(0)
    drawn = torch.rand(count, generator=generator, dtype=torch.float64) * steps[-1]
    return torch.searchsorted(steps, drawn, right=True).clamp(max=len(weights) - 1)


def _pace(until: float, power: float, name: str) -> tuple[float, float]:
    """Check how a curriculum moves."""
    if not (0 < until <= 1 and power > 0):
        raise UserError(f"length: {name} needs 0 < until <= 1 and power > 0, got {until} and {power}")
    return until, power
