"""The length policy: how many tokens and codebooks a training sample keeps.

For each of two axes, tokens and codebooks, a policy has a distribution, a fraction of draws that keep all, and a
granularity (one draw per sample, per batch, or per batch of all ranks). A mechanism hides the dropped tokens from the
decoder.

    Tail Token Drop (One-D-Piece, arXiv 2501.10064, section 3.2)   uniform, per batch, truncate
    nested dropout (FlexTok, arXiv 2502.13967, section 3.1)        powers of two, per sample, mask token
    ElasticTok (arXiv 2410.08368)                                  zeros in place of dropped tokens
    quantizer dropout (DAC, arXiv 2306.06546)                      drops codebooks
    TiTok (arXiv 2406.07550)                                       keeps everything

At inference, `export/bitstream/rate_control.py` chooses the length, and `codecs/allocation.py` that of each block.
"""

from abc import ABC, abstractmethod
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn

from varitok import UserError

from ..masking import prefix_mask
from .distributions import Distribution, Full, Share, Uniform
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
    "VariableLength",
    "Zeros",
]

Granularity = Literal["sample", "batch", "step"]


class Mechanism(nn.Module, ABC):
    """Base of mechanisms that hide the tail of each sample's latents from the decoder.

    Attributes:
        name: Name in bundles.
    """

    name: str

    @abstractmethod
    def fill(self) -> Tensor | None:
        """Return the replacement of a dropped token, `(d,)` or `(1,)`; None if it is masked out instead."""

    def forward(self, latents: Tensor, lengths: Tensor, common: int | None = None) -> tuple[Tensor, Tensor | None]:
        """Hide the tokens from index `lengths` on.

        Args:
            latents: Quantized latents, `(b, n, d)`.
            lengths: Tokens kept, `(b,)`.
            common: The length of all samples if it is the same: tokens are then removed rather than masked. None: the
                lengths may differ.

        Returns:
            Latents `(b, n or fewer, d)`, and the attention mask of the decoder, bool `(b, n)`; None if it attends to
            all.
        """
        fill = self.fill()
        if fill is None and common is not None:
            return latents[:, :common], None
        kept = prefix_mask(lengths, latents.shape[1])
        if fill is None:
            return latents, kept
        return torch.where(kept[..., None], latents, fill.to(latents)), None


class Truncate(Mechanism):
    """Attention mask over dropped tokens, equivalent to removing them from the decoder's input."""

    name = "truncate"

    def fill(self) -> None:
        """Return None: dropped tokens are masked."""


class MaskToken(Mechanism):
    """One learned vector in place of each dropped token (FlexTok, arXiv 2502.13967, section 3.1).

    Args:
        dim: Width of the latents.
    """

    name = "mask_token"

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.token = nn.Parameter(torch.randn(dim) * 0.02)

    def fill(self) -> Tensor:
        """Return the learned vector, `(d,)`."""
        return self.token


class Zeros(Mechanism):
    """Zeros in place of each dropped token, to which the decoder attends (ElasticTok, arXiv 2410.08368)."""

    name = "zeros"
    zero: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("zero", torch.zeros(1), persistent=False)

    def fill(self) -> Tensor:
        """Return zero, `(1,)`."""
        return self.zero


class BatchShard(NamedTuple):
    """This rank's share of the global batch: sample i belongs to rank `i % processes`.

    Attributes:
        rank: This rank.
        processes: Number of ranks.
        blocks: Lengths per sample.
    """

    rank: int = 0
    processes: int = 1
    blocks: int = 1


class Axis:
    """Sampler of lengths along one axis, tokens or codebooks.

    Args:
        distribution: Distribution of the lengths.
        granularity: One draw per "sample", per "batch" of a rank, or per "step", the same on all ranks.
        full_share: Fraction of draws replaced by the total, in [0, 1].
    """

    def __init__(
        self, distribution: Distribution, granularity: Granularity = "sample", full_share: Share = 0.0
    ) -> None:
        self.distribution = distribution
        self.granularity = granularity
        self.full_share = full_share

    def sample(self, batch: int, total: int, key: tuple[int, ...], dealt: BatchShard, progress: float) -> Tensor:
        """Sample int64 `(batch,)` lengths in [1, total], on the CPU, determined by the key and the rank."""
        each = self.granularity == "sample"
        key = {"step": key, "batch": (*key, dealt.rank), "sample": (*key, 0)}[self.granularity]
        generator = torch.Generator().manual_seed(hash(key) & (2**63 - 1))
        # Sample for the batches of all ranks, so that a sample's length doesn't depend on its rank.
        draws = batch * dealt.processes if each else 1
        lengths = self.distribution(draws, total, generator, progress)
        full = torch.rand(draws, generator=generator) < self.full_share
        lengths = torch.where(full, total, lengths)
        return (
            lengths.view(-1, dealt.blocks)[dealt.rank :: dealt.processes].flatten() if each else lengths.expand(batch)
        )


class SampledLengths(NamedTuple):
    """Numbers of tokens and codebooks that the samples of a batch keep, on the CPU.

    Attributes:
        lengths: int64 `(b,)`, tokens kept, in [1, total].
        n_codebooks: int64 `(b,)`, codebooks kept, from 1 to all; 0 if the bottleneck is continuous.
        common: The length of all samples if it is the same, which the device need not be asked for; else None.
    """

    lengths: Tensor
    n_codebooks: Tensor
    common: int | None = None


class LengthPolicy(nn.Module):
    """Sampler of the tokens and codebooks that a training sample keeps, with the mechanism that hides the rest.

    >>> from varitok.codecs.lengths.distributions import LogUniform
    >>> policy = LengthPolicy(LogUniform(), Zeros())
    >>> lengths = policy.sample(3, 16).lengths  # of 3 samples, from 1 to 16 tokens
    >>> policy.mechanism(torch.ones(3, 16, 4), lengths)[0].any(-1).sum(-1).equal(lengths)
    True

    Args:
        distribution: Distribution of the number of tokens.
        mechanism: Hides dropped tokens. Dropped codebooks need no mechanism: they add nothing to the latents.
        granularity: One draw per "sample", per "batch" of a rank, or per "step", the same on all ranks.
        full_share: Fraction of draws replaced by the full length, in [0, 1].
        codebooks: Sampler of the number of codebooks; all are kept if None.
        halting: Head trained beside the codec to predict the tokens that a target error needs; none if None.
    """

    def __init__(
        self,
        distribution: Distribution,
        mechanism: Mechanism,
        granularity: Granularity = "sample",
        full_share: Share = 0.0,
        codebooks: Axis | None = None,
        halting: HaltingHead | None = None,
    ) -> None:
        super().__init__()
        self.distribution = distribution
        self.steps = Axis(distribution, granularity, full_share)
        self.mechanism = mechanism
        self.codebooks = codebooks
        self.halting = halting

    def fit(self, ordered: bool, num_codebooks: int) -> None:
        """Check that the policy suits a codec.

        Args:
            ordered: Whether tokens are ordered; otherwise they are on a grid.
            num_codebooks: Number of codebooks; 0 for a continuous bottleneck.

        Raises:
            UserError: The policy drops tokens that are on a grid.
        """
        if not ordered and not isinstance(self.distribution, Full):
            raise UserError("length: tokens on a grid can't be dropped; choose full or quantizer_dropout")

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
        """Sample the numbers of tokens and codebooks that a training batch keeps.

        Args:
            batch: Samples of this rank, times their blocks.
            total: Maximal number of tokens.
            num_codebooks: Number of codebooks; 0 for a continuous bottleneck.
            seed: Integers that identify the batch, the same on all ranks.
            dealt: This rank's share of the global batch.
            progress: Fraction of the run's updates that are done, in [0, 1].

        Raises:
            UserError: `codebooks` is given for a continuous bottleneck, or a length exceeds the total.
        """
        lengths = self.steps.sample(batch, total, (*seed, 0), dealt, progress)
        distinct = set(lengths.tolist())
        common = distinct.pop() if len(distinct) == 1 else None
        if self.codebooks is None:
            return SampledLengths(lengths, torch.full((batch,), num_codebooks), common)
        if num_codebooks < 1:
            raise UserError("length.codebooks: a continuous bottleneck has no codebooks to drop")
        n_codebooks = self.codebooks.sample(batch, num_codebooks, (*seed, 1), dealt, progress)
        return SampledLengths(lengths, n_codebooks, common)


class VariableLength(LengthPolicy):
    """A policy whose codec becomes variable, if it was of a fixed length (ours; `finetune=length`).

    Ordered tokens get One-D-Piece's Tail Token Drop, codebooks on a grid DAC's quantizer dropout. An axis that the
    arguments, those of `LengthPolicy`, vary already stays as it is.
    """

    def fit(self, ordered: bool, num_codebooks: int) -> None:
        """Vary the length of a codec; see `LengthPolicy.fit`.

        Raises:
            UserError: The codec has no such axis.
        """
        super().fit(ordered, num_codebooks)
        if ordered and isinstance(self.distribution, Full):
            self.distribution = self.steps.distribution = Uniform()
        elif not ordered and num_codebooks < 2:
            has = "one codebook" if num_codebooks else "no codebooks"
            raise UserError(f"length: tokens on a grid and {has} leave nothing to vary; choose finetune=all")
        elif not ordered and self.codebooks is None:
            self.codebooks = Axis(Uniform(), full_share=0.5)
