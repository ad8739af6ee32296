"""A head that predicts how many tokens a sample needs for a target error.

It follows KARL (arXiv 2507.07995), in a single pass. A training sample was truncated to k tokens and reconstructed with
error e: "error e needs k tokens" is then a training example, at no further cost. KARL runs its encoder twice, the
second time conditioned on the error of the first.

At inference, `codec.length.halting.lengths(codec.features(signals), errors)` predicts the lengths from one pass of the
encoder, without the decoder. The head is not exported.
"""

import math
from typing import Annotated

import torch
from torch import Tensor, nn
from torch.nn import functional

from ..networks.layers.attention import Transformer

__all__ = ["HaltingHead"]

LEAST = 1e-5  # errors are clamped to this: far below an 8-bit step in [-1, 1]


class HaltingHead(nn.Module):
    """Transformer that predicts, from all N tokens and a target error, before which token to halt.

    Args:
        dim: Width of the encoder's latents.
        tokens: Maximal number of tokens, N.
        width: Hidden size.
        depth: Number of transformer blocks.
        heads: Number of attention heads; divides `width`.
        waves: Number of sines, and of cosines, that embed the logarithm of the error.
        threshold: Halting probability from which a token is dropped, in (0, 1); KARL uses 0.75 at inference.
    """

    frequencies: Tensor

    def __init__(
        self,
        dim: int,
        tokens: int,
        width: int = 64,
        depth: Annotated[int, "[0, 1000]"] = 2,
        heads: int = 4,
        waves: int = 8,
        threshold: Annotated[float, "(0, 1)"] = 0.5,
    ) -> None:
        super().__init__()
        self.tokens = tokens
        self.threshold = threshold
        self.norm = nn.LayerNorm(dim)
        self.project = nn.Linear(dim, width)
        self.positions = nn.Parameter(torch.randn(tokens, width) * 0.02)
        # Periods from five decades, the relevant range of errors, to a twentieth of a decade.
        self.register_buffer("frequencies", torch.logspace(0, 2, waves) * 2 * math.pi / 5, persistent=False)
        self.embed = nn.Linear(2 * waves + 1, width)
        self.transformer = Transformer(width, depth, heads)
        self.out = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, 1))

    def forward(self, latents: Tensor, error: Tensor) -> Tensor:
        """Return the logits of halting before each token, float32 `(b, n)`.

        Args:
            latents: Latents of the encoder, `(b, n, dim)`, which get no gradient.
            error: Target mean absolute error of the signal in [-1, 1], `(b,)`.
        """
        scale = error.detach().float().clamp(min=LEAST).log10()[:, None]
        angles = scale * self.frequencies
        target = self.embed(torch.cat([scale, angles.sin(), angles.cos()], dim=1).to(self.embed.weight))
        tokens = self.project(self.norm(latents.detach())) + self.positions + target[:, None]
        logits: Tensor = self.out(self.transformer(tokens))[..., 0]
        return logits.float()

    def loss(self, latents: Tensor, error: Tensor, lengths: Tensor, counted: Tensor | None = None) -> Tensor:
        """Return the binary cross entropy with target 0 for the first `lengths` tokens and 1 for the rest.

        Args:
            latents: `(b, n, dim)`.
            error: `(b,)`, mean absolute error of the reconstruction from `lengths` tokens.
            lengths: int64 `(b,)`, tokens that were kept.
            counted: bool `(b,)`, samples that enter the loss; all if None.
        """
        logits = self(latents, error)
        halted = torch.arange(logits.shape[1], device=logits.device) >= lengths[:, None]
        each = functional.binary_cross_entropy_with_logits(logits, halted.float(), reduction="none").mean(1)
        return each.mean() if counted is None else (each * counted).mean()

    @torch.no_grad()
    def lengths(self, latents: Tensor, error: Tensor) -> Tensor:
        """Return the number of tokens before the first above the threshold, int64 `(b,)` in [1, n]."""
        goes_on = self(latents, error).sigmoid() < self.threshold
        count: Tensor = goes_on.long().cumprod(1).sum(1).clamp(min=1)
        return count
