"""How many codes are kept: masks over valid steps, and the length policy.

A policy has independent choices: a distribution of lengths and its share of full-length samples, a granularity (one
draw per sample or per batch), and a mechanism that hides the dropped tail from the decoder. One-D-Piece's Tail Token
Drop (arXiv 2501.10064, section 3.2) is uniform x batch x truncate; FlexTok's nested dropout (arXiv 2502.13967,
section 3.1) is powers of two x sample x mask token; TiTok (arXiv 2406.07550) keeps everything.
"""

import math
from abc import ABC, abstractmethod
from typing import Literal, Protocol

import torch
from torch import Tensor, nn

__all__ = [
    "Distribution",
    "Full",
    "LengthPolicy",
    "MaskToken",
    "Mechanism",
    "PowersOfTwo",
    "Truncate",
    "Uniform",
    "ladder",
    "masked_mean",
    "prefix_mask",
]


def prefix_mask(lengths: Tensor, total: int) -> Tensor:
    """Mark the valid steps: `(b,)` lengths to bool `(b, total)`, True before each length."""
    return torch.arange(total, device=lengths.device) < lengths[:, None]


def masked_mean(values: Tensor, mask: Tensor) -> Tensor:
    """Average over valid steps, sample by sample, then over the batch.

    Every sample counts the same whatever its length, so that the mean over processes with equal batches is the mean
    over the global batch.

    Args:
        values: `(b, n)`.
        mask: bool `(b, n)`; a sample without a valid step counts as 0.
    """
    per_sample = (values * mask).sum(1) / mask.sum(1).clamp(min=1)
    return per_sample.mean()


def ladder(total: int) -> list[int]:
    """List the kept lengths that are reported: 1, 2, 4, ... and `total` itself."""
    return [2**i for i in range(math.ceil(math.log2(total)))] + [total] if total > 1 else [1]


class Distribution(Protocol):
    """Draws lengths from 1 to a total."""

    def __call__(self, count: int, total: int, generator: torch.Generator | None) -> Tensor:
        """Draw int64 `(count,)` lengths in [1, total], on the CPU."""


class Full:
    """Keeps every token: a fixed-length tokenizer."""

    def __call__(self, count: int, total: int, generator: torch.Generator | None) -> Tensor:
        """Return `total` for each sample."""
        return torch.full((count,), total)


class Uniform:
    """Every length from 1 to the total is equally likely (One-D-Piece, section 3.2)."""

    def __call__(self, count: int, total: int, generator: torch.Generator | None) -> Tensor:
        """Draw integers from 1 to `total`."""
        return torch.randint(1, total + 1, (count,), generator=generator)


class PowersOfTwo:
    """The rungs 1, 2, 4, ... and the total are equally likely (FlexTok, section 3.1)."""

    def __call__(self, count: int, total: int, generator: torch.Generator | None) -> Tensor:
        """Draw rungs of `ladder(total)`."""
        rungs = torch.tensor(ladder(total))
        return rungs[torch.randint(len(rungs), (count,), generator=generator)]


class Mechanism(nn.Module, ABC):
    """Hides the tail of each sample's latents from the decoder."""

    @abstractmethod
    def forward(self, latents: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor | None]:
        """Hide the steps from `lengths` on.

        Args:
            latents: `(b, n, d)`, quantized.
            lengths: `(b,)`.

        Returns:
            Latents `(b, n', d)`, and bool `(b, n')` saying which the decoder may attend to, or None for all.
        """


class Truncate(Mechanism):
    """The decoder doesn't see the tail: its attention to it is masked, which equals cutting it off."""

    def forward(self, latents: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor | None]:
        """Return the latents as they are, with the mask of what is kept."""
        return latents, prefix_mask(lengths, latents.shape[1])


class MaskToken(Mechanism):
    """The decoder sees one learned vector in place of each dropped token (FlexTok, section 3.1).

    Args:
        dim: Width of the latents.
    """

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.token = nn.Parameter(torch.randn(dim) * 0.02)

    def forward(self, latents: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor | None]:
        """Replace the tail by the learned vector; everything may be attended to."""
        kept = prefix_mask(lengths, latents.shape[1])
        return torch.where(kept[..., None], latents, self.token.to(latents.dtype)), None


class LengthPolicy(nn.Module):
    """Decides how many tokens a training sample keeps and how the rest is hidden.

    Args:
        distribution: Draws the lengths.
        mechanism: Hides the tail.
        granularity: One draw for each "sample", or one for the whole "batch".
        full_share: Share of draws replaced by the full length, in [0, 1].
    """

    def __init__(
        self,
        distribution: Distribution,
        mechanism: Mechanism,
        granularity: Literal["sample", "batch"] = "sample",
        full_share: float = 0.0,
    ) -> None:
        super().__init__()
        self.distribution = distribution
        self.mechanism = mechanism
        self.granularity = granularity
        self.full_share = full_share

    def sample(self, batch: int, total: int, generator: torch.Generator | None = None) -> Tensor:
        """Draw the kept lengths of a training batch: int64 `(batch,)` in [1, total], on the CPU."""
        draws = batch if self.granularity == "sample" else 1
        lengths = self.distribution(draws, total, generator)
        full = torch.rand(draws, generator=generator) < self.full_share
        return torch.where(full, total, lengths).expand(batch)
