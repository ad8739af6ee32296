"""How many tokens to keep at use: a number, a budget of bytes, a share of one, a quality, or what a trained head says.

A selector is called with a codec in evaluation mode and signals, and gives a length for each: the first so many tokens
are kept. Where blocks of a clip have tokens of their own, a length is for each of its blocks, and a budget can be
shared out over them. A lower bound on quality takes decoder passes (ElasticTok's search, arXiv 2410.08368, section
3.3); the head (KARL, arXiv 2507.07995) takes none.
"""

import logging
from collections.abc import Callable
from typing import Literal, NamedTuple, Protocol

import torch
from torch import Tensor

from varitok import UserError

from .codec import Codec
from .lengths.distributions import ladder

__all__ = ["Allocation", "ByteBudget", "FixedLength", "Halting", "Quality", "Search", "Selector", "psnr"]

_log = logging.getLogger(__name__)

Comparison = Callable[[Tensor, Tensor], Tensor]
"""(decoded, original), both in [-1, 1], to one value `(b,)` for each signal."""


class Selector(Protocol):
    """Chooses how many tokens each signal keeps."""

    def __call__(self, codec: Codec, signals: Tensor) -> Tensor:
        """Choose int64 `(b,)`, or for each block `(b, blocks)`, in [1, N].

        Args:
            codec: In evaluation mode.
            signals: `(b, c, *grid)` in [-1, 1].
        """


def psnr(fake: Tensor, real: Tensor) -> Tensor:
    """Compute the peak signal-to-noise ratio of signals in [-1, 1], dB, `(b,)`, on unrounded values."""
    error = (fake.float() - real.float()).square().flatten(1).mean(1)
    return 10 * torch.log10(4 / error.clamp(min=4e-10))


class FixedLength:
    """The same number of tokens for each signal.

    Args:
        tokens: How many.

    Raises:
        UserError: When called: the codec doesn't have as many.
    """

    def __init__(self, tokens: int) -> None:
        self.tokens = tokens

    def __call__(self, codec: Codec, signals: Tensor) -> Tensor:
        """Give the number for each signal."""
        if not 1 <= self.tokens <= codec.tokens:
            raise UserError(f"{self.tokens} tokens: this codec has from 1 to {codec.tokens}")
        return torch.full((len(signals),), self.tokens, device=signals.device)


class ByteBudget:
    """The most tokens whose payload fits (all books, an ideal packing: `Codec.bits`; no header).

    Args:
        bytes: For each signal.

    Raises:
        UserError: When called: not even one token fits, or the codec is continuous and its codes are not bits.
    """

    def __init__(self, bytes: float) -> None:
        self.bytes = bytes

    def __call__(self, codec: Codec, signals: Tensor) -> Tensor:
        """Give the number for each signal."""
        if not codec.books:
            raise UserError("a byte budget: this codec is continuous, its codes have no size in bytes")
        fitting = [k for k in range(1, codec.tokens + 1) if codec.bits(k) <= 8 * self.bytes]
        if not fitting:
            raise UserError(f"{self.bytes:g} bytes: one token of this codec takes {codec.bits(1) / 8:.3g}")
        return torch.full((len(signals),), fitting[-1], device=signals.device)


class Allocation:
    """Shares a budget of tokens out over the blocks of clips, so that their errors' sum is least.

    AdapTok's integer program (arXiv 2505.17011, section 3.3), solved exactly, over the numbers 1, 2, 4, ... N. There a
    scorer foretells the errors; here the decoder tells them, in log2(N) passes, with all blocks cut alike.

    Args:
        tokens: The mean over blocks that is not to be exceeded.
        over: Share out over the blocks of each "signal", or of the whole "batch".

    Raises:
        UserError: When called: the codec has no blocks, or a block can't have so few tokens.
    """

    def __init__(self, tokens: float, over: Literal["signal", "batch"] = "signal") -> None:
        self.tokens = tokens
        self.over = over

    @torch.no_grad()
    def __call__(self, codec: Codec, signals: Tensor) -> Tensor:
        """Give the lengths, int64 `(b, blocks)`."""
        if not codec.blocked:
            raise UserError("an allocation over blocks: this codec has none; its tokens are about the whole signal")
        if not self.tokens >= 1:
            raise UserError(f"an allocation of {self.tokens:g} tokens: each block has one at least")
        choices, size = sorted({*ladder(codec.tokens), *ladder(codec.later_tokens)}), signals.shape[2:]
        codes, lead = codec.encode(signals), codec.lead
        errors = []
        for kept in choices:
            error = (codec.decode(codes[..., :kept], size) - signals).square().mean((1, 3, 4)).cpu()
            steps = torch.nn.functional.pad(error, (lead, codes.shape[2] * codec.hop[0] - lead - size[0]))
            errors.append(steps.reshape(len(signals), -1, codec.hop[0]).sum(2))
        costs = torch.stack(errors, dim=2).double()  # (b, blocks, choices)
        costs[:, 1:, torch.tensor(choices) > codec.later_tokens] = torch.inf  # later blocks don't have as many
        groups = costs.flatten(0, 1)[None] if self.over == "batch" else costs
        budget = int(self.tokens * groups.shape[1])
        chosen = torch.stack([_least(group, choices, budget) for group in groups])
        return chosen.reshape(costs.shape[:2]).to(signals.device)


def _least(costs: Tensor, choices: list[int], budget: int) -> Tensor:
    """Choose a number for each row so that all are `budget` at most and the costs' sum is least.

    A multiple-choice knapsack, row by row over all budgets.

    Args:
        costs: float64 `(rows, choices)`.
        choices: Upwards, the first being 1.
        budget: At least the number of rows.

    Returns:
        int64 `(rows,)`.
    """
    best = torch.zeros(budget + 1, dtype=torch.float64)  # of the rows so far, by what they may take
    picks = []
    for row in costs:
        tries = torch.full((len(choices), budget + 1), torch.inf, dtype=torch.float64)
        for index, number in enumerate(choices):
            if number <= budget:
                tries[index, number:] = best[: budget + 1 - number] + row[index]
        best, pick = tries.min(0)
        picks.append(pick)
    chosen, left = [], budget
    for pick in reversed(picks):
        chosen.append(choices[int(pick[left])])
        left -= chosen[-1]
    return torch.tensor(chosen[::-1])


class Search(NamedTuple):
    """What a search for a quality found.

    Attributes:
        lengths: int64 `(b,)`.
        quality: float32 `(b,)`, the metric's values at these lengths.
        met: bool `(b,)`, whether the target was met; elsewhere it's the best of what was tried.
    """

    lengths: Tensor
    quality: Tensor
    met: Tensor


class Quality:
    """The fewest tokens that meet a target, by a binary search with the decoder, all signals at once.

    The search takes log2(N) decoder passes and believes that more tokens are no worse. Where that isn't so, what it
    gives still meets the target, but may not be the shortest that does.

    Args:
        target: Of the metric.
        metric: Compares (decoded, original) in [-1, 1], one value for each signal.
        higher_is_better: Whether the target is a lower bound.
        among: Choose among "all" numbers of tokens, or those of the "ladder" 1, 2, 4, ... N.
    """

    def __init__(
        self,
        target: float,
        metric: Comparison = psnr,
        higher_is_better: bool = True,
        among: Literal["all", "ladder"] = "all",
    ) -> None:
        self.target = target
        self.metric = metric
        self.higher_is_better = higher_is_better
        self.among = among

    def __call__(self, codec: Codec, signals: Tensor) -> Tensor:
        """Give the lengths; says in the log which signals can't have the target."""
        lengths, _, met = self.search(codec, signals)
        if missed := (~met).nonzero().flatten().tolist():
            shown = ", ".join(map(str, missed[:8])) + (", ..." if len(missed) > 8 else "")
            _log.warning(
                "%d of %d signals can't have a quality of %g, they get the best there is: number %s",
                len(missed), len(met), self.target, shown,
            )  # fmt: skip
        return lengths

    @torch.no_grad()
    def search(self, codec: Codec, signals: Tensor) -> Search:
        """Find the lengths, and say what each signal has with it."""
        numbers = range(1, codec.tokens + 1) if self.among == "all" else ladder(codec.tokens)
        choices = torch.tensor(list(numbers), device=signals.device)
        size = signals.shape[2:]
        codes = codec.encode(signals)
        sign = 1.0 if self.higher_is_better else -1.0
        low = torch.zeros(len(signals), dtype=torch.int64, device=signals.device)
        high = torch.full_like(low, len(choices))  # which stands for "none meets it"
        best = choices[low]
        reached = torch.full(low.shape, -torch.inf, device=signals.device)
        met = torch.zeros_like(low, dtype=torch.bool)
        for _ in range(len(choices).bit_length()):  # as many halvings empty every interval
            middle = ((low + high) // 2).clamp(max=len(choices) - 1)
            lengths = choices[middle]
            value = sign * self.metric(codec.decode(codes, size, lengths).clamp(-1, 1), signals).float()
            open_, enough = low < high, value >= sign * self.target
            # The last one that meets it is the shortest; as long as none does, the best is kept.
            better = open_ & (enough | (value > reached) | ((value == reached) & (lengths < best)))
            best, reached = torch.where(better, lengths, best), torch.where(better, value, reached)
            met = met | (open_ & enough)
            low = torch.where(open_ & ~enough, middle + 1, low)
            high = torch.where(open_ & enough, middle, high)
        return Search(best, sign * reached, met)


class Halting:
    """What the codec's halting head says; the encoder runs once and the decoder not at all.

    Args:
        error: To be reached, mean absolute error of the signal in [-1, 1].

    Raises:
        UserError: The error isn't above 0; when called: the codec was trained without a head.
    """

    def __init__(self, error: float) -> None:
        if error <= 0:
            raise UserError(f"a target error of {error:g}: it must be above 0")
        self.error = error

    @torch.no_grad()
    def __call__(self, codec: Codec, signals: Tensor) -> Tensor:
        """Give the lengths."""
        head = codec.length.halting
        if head is None:
            raise UserError("this codec has no halting head; train one with length=halting")
        features = codec.features(signals)
        return head.lengths(features, features.new_full((len(signals),), self.error, dtype=torch.float32))
