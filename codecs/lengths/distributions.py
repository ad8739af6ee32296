"""Distributions of the number of tokens or codebooks that a training sample keeps, from 1 to a total."""

import math
from collections.abc import Sequence
from itertools import accumulate
from typing import Annotated, Protocol, TypeAlias

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

Share: TypeAlias = Annotated[float, "[0, 1]"]
Until: TypeAlias = Annotated[float, "(0, 1]"]
Power: TypeAlias = Annotated[float, "(0, inf)"]


def ladder(total: int, layers: Sequence[int] = ()) -> list[int]:
    """Return the lengths at which evaluations report: 1, 2, 4, ... and `total`; whole `layers` if one has several."""
    if max(layers, default=1) > 1:
        return list(accumulate(layers))
    return [2**i for i in range(math.ceil(math.log2(total)))] + [total] if total > 1 else [1]


class Distribution(Protocol):
    """Callable that samples lengths from 1 to a total."""

    def __call__(self, count: int, total: int, generator: torch.Generator | None, progress: float = 1.0) -> Tensor:
        """Sample int64 `(count,)` lengths in [1, total], on the CPU.

        Args:
            count: Number of lengths.
            total: The largest length.
            generator: Random number generator; torch's global one if None.
            progress: Fraction of the run's updates that are done, in [0, 1]; used by curricula only.
        """


class Full:
    """Always the total: a fixed-length tokenizer."""

    def __call__(self, count: int, total: int, generator: torch.Generator | None, progress: float = 1.0) -> Tensor:
        """Return `total` for each sample."""
        return torch.full((count,), total)


class Uniform:
    """Uniform from a fraction of the total to the total (One-D-Piece, arXiv 2501.10064, section 3.2: from 1).

    Args:
        low: Smallest fraction, in [0, 1] (ElasticTok: 1/16); a length is at least 1.
    """

    def __init__(self, low: Share = 0.0) -> None:
        self.low = low

    def __call__(self, count: int, total: int, generator: torch.Generator | None, progress: float = 1.0) -> Tensor:
        """Sample integers from `max(1, round(low * total))` to `total`."""
        return torch.randint(max(1, round(self.low * total)), total + 1, (count,), generator=generator)


class LogUniform:
    """Log-uniform: `P(k) = log((k + 1) / k) / log(total + 1)`."""

    def __call__(self, count: int, total: int, generator: torch.Generator | None, progress: float = 1.0) -> Tensor:
        """Sample integers from 1 to `total`."""
        drawn = torch.rand(count, generator=generator, dtype=torch.float64) * math.log(total + 1)
        return drawn.exp().long().clamp(1, total)


class PowersOfTwo:
    """Uniform over 1, 2, 4, ... and the total (FlexTok, arXiv 2502.13967, section 3.1)."""

    def __call__(self, count: int, total: int, generator: torch.Generator | None, progress: float = 1.0) -> Tensor:
        """Sample from `ladder(total)`."""
        return _pick(torch.tensor(ladder(total)), count, generator)


class RoundedUp:
    """Uniform lengths rounded up to the next of 1, 2, 4, ... and the total (FlexTok's `uniform_pow2`).

    The probability of the total is about one half.
    """

    def __call__(self, count: int, total: int, generator: torch.Generator | None, progress: float = 1.0) -> Tensor:
        """Sample from `ladder(total)`, with probabilities proportional to the gaps between its values."""
        rungs = torch.tensor(ladder(total))
        return rungs[torch.bucketize(Uniform()(count, total, generator), rungs)]


class FixedSet:
    """Uniform over a list, in which a length may be repeated for a higher probability (FunCodec, arXiv 2309.07405).

    Args:
        lengths: Lengths of at least 1.

    Raises:
        UserError: The list is empty, or, when sampling, a length above the total.
    """

    def __init__(self, lengths: Sequence[int]) -> None:
        if not lengths:
            raise UserError("length.lengths: the list is empty; give at least one")
        self.lengths = torch.tensor(list(lengths))

    def __call__(self, count: int, total: int, generator: torch.Generator | None, progress: float = 1.0) -> Tensor:
        """Sample from the list."""
        if self.lengths.max() > total:
            raise UserError(f"length: FixedSet holds {int(self.lengths.max())}, and there are only {total}")
        return _pick(self.lengths, count, generator)


class Range:
    """Uniform over `low`, `low + stride`, ... up to `high` (arXiv 2402.12208: 3 to 8 codebooks).

    Args:
        low: Smallest length.
        high: Largest length; the total if None.
        stride: Difference between consecutive lengths (KARL, arXiv 2507.07995: 16).

    Raises:
        UserError: `high` is below `low`, or, when sampling, a bound exceeds the total.
    """

    def __init__(self, low: int = 1, high: int | None = None, stride: int = 1) -> None:
        if high is not None and high < low:
            raise UserError(f"length: Range goes from low={low} to high={high}, which must not be below it")
        self.low = low
        self.high = high
        self.stride = stride

    def __call__(self, count: int, total: int, generator: torch.Generator | None, progress: float = 1.0) -> Tensor:
        """Sample from `low`, `low + stride`, ... up to `high`."""
        high = total if self.high is None else self.high
        if max(self.low, high) > total:
            raise UserError(f"length: Range goes to {max(self.low, high)}, and there are only {total}")
        return _pick(torch.arange(self.low, high + 1, self.stride), count, generator)


class TruncatedNormal:
    """Truncated normal distribution, parametrized in fractions of the total (AdapTok, arXiv 2505.17011).

    The defaults are AdapTok's: mean 256 and deviation 128, truncated to 32 to 512, of 512 tokens.

    Args:
        mean: Mean before truncation.
        deviation: Standard deviation before truncation, above 0.
        low: Smallest fraction, in [0, 1]; a length is at least 1.
        high: Largest fraction, in [low, 1].

    Raises:
        UserError: `high` is below `low`.
    """

    def __init__(
        self,
        mean: Annotated[float, "(-inf, inf)"] = 0.5,
        deviation: Annotated[float, "(0, inf)"] = 0.25,
        low: Share = 0.0625,
        high: Share = 1.0,
    ) -> None:
        if low > high:
            raise UserError(f"length: TruncatedNormal goes from low={low} to high={high}, which must not be below it")
        self.mean = mean
        self.deviation = deviation
        self.low = low
        self.high = high

    def __call__(self, count: int, total: int, generator: torch.Generator | None, progress: float = 1.0) -> Tensor:
        """Sample integers between the bounds, with probabilities proportional to the normal density."""
        low, high = (max(1, round(bound * total)) for bound in (self.low, self.high))
        lengths = torch.arange(low, high + 1)
        return lengths[
            _draw_index(-0.5 * ((lengths.double() / total - self.mean) / self.deviation) ** 2, count, generator)
        ]


class PowerLaw:
    """Power law `P(k) ~ (k / total) ** exponent`, whose exponent changes linearly (GigaTok's code, arXiv 2504.08736).

    Args:
        start: Exponent at the start of the run; 0 is uniform.
        end: Exponent at the end of the run; GigaTok's is its epochs over T.
    """

    def __init__(self, start: float = 0.0, end: float = 1.0) -> None:
        self.start = start
        self.end = end

    def __call__(self, count: int, total: int, generator: torch.Generator | None, progress: float = 1.0) -> Tensor:
        """Sample integers from 1 to `total`."""
        exponent = self.start + (self.end - self.start) * progress
        return 1 + _draw_index(exponent * torch.arange(1, total + 1, dtype=torch.float64).log(), count, generator)


class FallingMinimum:
    """Uniform from a minimum to the total; the minimum decreases from the total to 1 during training (ours).

    `minimum = total - (total - 1) * min(1, progress / until) ** power`. All tokens are trained before any are dropped.

    Args:
        until: Progress of the run at which the minimum reaches 1, in (0, 1].
        power: Above 1 the minimum decreases late, below 1 early.
    """

    def __init__(self, until: Until = 0.5, power: Power = 1.0) -> None:
        self.until, self.power = until, power

    def __call__(self, count: int, total: int, generator: torch.Generator | None, progress: float = 1.0) -> Tensor:
        """Sample integers from the minimum to `total`."""
        minimum = total - round((total - 1) * min(1.0, progress / self.until) ** self.power)
        return torch.randint(minimum, total + 1, (count,), generator=generator)


class Curriculum:
    """Mixture of two distributions whose weight shifts from the first to the second during training (ours).

    Args:
        start: Distribution at the start of the run.
        end: Distribution from `until` on.
        until: Progress of the run at which the second distribution has weight 1, in (0, 1].
        power: The weight of the second distribution is `(progress / until) ** power`.

    Raises:
        UserError: A value is out of range.
    """

    def __init__(self, start: Distribution, end: Distribution, until: Until = 0.5, power: Power = 1.0) -> None:
        self.start = start
        self.end = end
        self.until, self.power = until, power

    def __call__(self, count: int, total: int, generator: torch.Generator | None, progress: float = 1.0) -> Tensor:
        """Sample from both distributions, and choose one for each sample."""
        share = min(1.0, progress / self.until) ** self.power
        first, second = (made(count, total, generator, progress) for made in (self.start, self.end))
        return torch.where(torch.rand(count, generator=generator) < share, second, first)


def _pick(choices: Tensor, count: int, generator: torch.Generator | None) -> Tensor:
    """Sample uniformly from a tensor of choices."""
    return choices[torch.randint(len(choices), (count,), generator=generator)]


def _draw_index(weights: Tensor, count: int, generator: torch.Generator | None) -> Tensor:
    """Sample indices with probabilities `softmax(weights)`, of float64 log-weights."""
    # Subtract the maximum, because the weights may exceed the range of a float.
    steps = (weights - weights.max()).exp().cumsum(0)
    drawn = torch.rand(count, generator=generator, dtype=torch.float64) * steps[-1]
    return torch.searchsorted(steps, drawn, right=True).clamp(max=len(weights) - 1)
