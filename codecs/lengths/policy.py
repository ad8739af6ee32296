"""The length policy: how many tokens and codebooks are kept while training.

A policy has independent choices for each of two axes, steps and codebooks: a distribution and its share of draws that
keep all, and a granularity (one draw per sample, per batch, or per batch of all processes). To these comes a mechanism
that hides the dropped steps from the decoder. One-D-Piece's Tail Token Drop (arXiv 2501.10064, section 3.2) is uniform
x batch x truncate; FlexTok's nested dropout (arXiv 2502.13967, section 3.1) is powers of two x sample x mask token;
ElasticTok (arXiv 2410.08368) puts zeros; DAC (arXiv 2306.06546) drops codebooks; TiTok (arXiv 2406.07550) keeps
everything. How many to keep at use: `export/bitstream/rate_control.py`; for each block of a clip,
`codecs/allocation.py`.
"""

from abc import ABC, abstractmethod
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn

from varitok import UserError

from ..masking import prefix_mask
from .distributions import Distribution
from .halting import HaltingHead

__all__ = [
    "Axis",
    "BatchShard",
    "Granularity",
    "LengthPolicy",
    "MaskToken",
    "Mechanism",
    "SampledLengths",
    "Truncate",
    "Zeros",
]

Granularity = Literal["sample", "batch", "step"]


class Mechanism(nn.Module, ABC):
    """Hides the tail of each sample's latents from the decoder.

    Attributes:
        name: As bundles have it.
    """

    name: str

    @abstractmethod
    def fill(self) -> Tensor | None:
        """Return the replacement of a dropped token, `(d,)` or `(1,)`; None if there is none."""

    def forward(self, latents: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor | None]:
        """Hide the steps from `lengths` on.

        Args:
            latents: `(b, n, d)`, quantized.
            lengths: `(b,)`.

        Returns:
            Latents `(b, n, d)`, and bool `(b, n)` saying which the decoder may attend to, or None for all.
        """
        kept, fill = prefix_mask(lengths, latents.shape[1]), self.fill()
        if fill is None:
            return latents, kept
        return torch.where(kept[..., None], latents, fill.to(latents)), None


class Truncate(Mechanism):
    """The decoder doesn't see the tail: its attention to it is masked, which equals cutting it off."""

    name = "truncate"

    def fill(self) -> None:
        """Put nothing."""


class MaskToken(Mechanism):
    """The decoder sees one learned vector in place of each dropped token (FlexTok, section 3.1).

    Args:
        dim: Width of the latents.
    """

    name = "mask_token"

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.token = nn.Parameter(torch.randn(dim) * 0.02)

    def fill(self) -> Tensor:
        """Put the learned vector."""
        return self.token


class Zeros(Mechanism):
    """The decoder sees zeros in place of each dropped token, and may attend to them (ElasticTok, arXiv 2410.08368)."""

    name = "zeros"
    zero: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("zero", torch.zeros(1), persistent=False)

    def fill(self) -> Tensor:
        """Put zeros."""
        return self.zero


class BatchShard(NamedTuple):
    """How a batch of all processes is dealt to them: like cards, one sample each in turn.

    Attributes:
        rank: Number of the process.
        processes: How many there are.
        blocks: Lengths of each sample.
    """

    rank: int = 0
    processes: int = 1
    blocks: int = 1


class Axis:
    """How much of one axis is kept while training.

    Args:
        distribution: Draws the lengths.
        granularity: One draw for each "sample", one for the whole "batch" of a process, or one for each "step", the
            same on all processes.
        full_share: Share of draws replaced by the total, in [0, 1].

    Raises:
        UserError: The share is out of its range.
    """

    def __init__(
        self, distribution: Distribution, granularity: Granularity = "sample", full_share: float = 0.0
    ) -> None:
        if not 0 <= full_share <= 1:
            raise UserError(f"length: full_share={full_share} is not from 0 to 1")
        self.distribution = distribution
        self.granularity = granularity
        self.full_share = full_share

    def sample(self, batch: int, total: int, key: tuple[int, ...], dealt: BatchShard, progress: float) -> Tensor:
        """Draw int64 `(batch,)` lengths in [1, total], on the CPU, the same for the same key and process."""
        each = self.granularity == "sample"
        key = {"step": key, "batch": (*key, dealt.rank), "sample": (*key, 0)}[self.granularity]
        generator = torch.Generator().manual_seed(hash(key) & (2**63 - 1))
        # Those of the batches of all processes: a sample's length is its own, whichever process has it.
        draws = batch * dealt.processes if each else 1
        lengths = self.distribution(draws, total, generator, progress)
        full = torch.rand(draws, generator=generator) < self.full_share
        lengths = torch.where(full, total, lengths)
        return (
            lengths.view(-1, dealt.blocks)[dealt.rank :: dealt.processes].flatten() if each else lengths.expand(batch)
        )


class SampledLengths(NamedTuple):
    """What a training batch keeps, on the CPU.

    Attributes:
        lengths: int64 `(b,)`, steps, in [1, total].
        n_codebooks: int64 `(b,)`, codebooks kept, from 1 to all; 0 if there are none.
    """

    lengths: Tensor
    n_codebooks: Tensor


class LengthPolicy(nn.Module):
    """Decides how many tokens and codebooks a training sample keeps and how the rest is hidden.

    Args:
        distribution: Draws the lengths.
        mechanism: Hides the tail. Codebooks need none: those that are dropped add nothing to the latents.
        granularity: One draw for each "sample", one for the whole "batch" of a process, or one for each "step", the
            same on all processes.
        full_share: Share of draws replaced by the full length, in [0, 1].
        codebooks: The same for the codebooks; all are kept if None.
        halting: Learns beside the codec how many tokens a target error takes; none if None.
    """

    def __init__(
        self,
        distribution: Distribution,
        mechanism: Mechanism,
        granularity: Granularity = "sample",
        full_share: float = 0.0,
        codebooks: Axis | None = None,
        halting: HaltingHead | None = None,
    ) -> None:
        super().__init__()
        self.distribution = distribution
        self.steps = Axis(distribution, granularity, full_share)
        self.mechanism = mechanism
        self.codebooks = codebooks
        self.halting = halting

    def sample(
        self,
        batch: int,
        total: int,
        num_codebooks: int = 1,
        *,
        seed: tuple[int, ...] = (0,),
        dealt: BatchShard = BatchShard(),  # noqa: B008 (a tuple)
        progress: float = 1.0,
    ) -> SampledLengths:
        """Draw what a training batch keeps.

        Args:
            batch: Samples of this process, or their blocks.
            total: The most tokens.
            num_codebooks: The most codebooks; 0 for a continuous bottleneck.
            seed: Numbers that name the batch, the same on all processes.
            dealt: Which of all processes' samples these are.
            progress: Share of the run's updates that are done, in [0, 1].

        Raises:
            UserError: Codebooks are to be dropped, and there are none; or a length is above the total.
        """
        lengths = self.steps.sample(batch, total, (*seed, 0), dealt, progress)
        if self.codebooks is None:
            return SampledLengths(lengths, torch.full((batch,), num_codebooks))
        if num_codebooks < 1:
            raise UserError("length.codebooks: a continuous bottleneck has no codebooks to drop")
        return SampledLengths(lengths, self.codebooks.sample(batch, num_codebooks, (*seed, 1), dealt, progress))
