"""A head that predicts how many tokens a sample needs for a given error.

KARL (arXiv 2507.07995) in one pass: whatever length k a training sample was cut to, and whatever error e its
reconstruction then had, "to reach e this sample needs k" is a true example, and it costs nothing beside the codec's own
step. KARL itself runs its encoder twice, the second time conditioned on the first one's error.

At use, `codec.length.halting.lengths(codec.features(signals), errors)` chooses the lengths: the encoder runs once, the
decoder not at all. The head is not exported.
"""

import math

import torch
from torch import Tensor, nn
from torch.nn import functional

from varitok import UserError

from ..networks.attention import Transformer

__all__ = ["HaltingHead"]

LEAST = 1e-5  # error that counts as none: a hundredth of an 8-bit step


class HaltingHead(nn.Module):
    """Reads all N tokens of a sample and an error, and says at which token to halt.

    Args:
        dim: Width of the encoder's latents.
        tokens: The most tokens, N.
        width: Width of the head.
        depth: Its blocks.
        heads: Its heads; divides `width`.
        waves: Sines, and as many cosines, that stand for the logarithm of the error.
        threshold: Probability of halting from which on a token isn't kept, in (0, 1); KARL's own use takes 0.75.

    Raises:
        UserError: The threshold is out of its range.
    """

    frequencies: Tensor

    def __init__(
        self,
        dim: int,
        tokens: int,
        width: int = 64,
        depth: int = 2,
        heads: int = 4,
        waves: int = 8,
        threshold: float = 0.5,
    ) -> None:
        super().__init__()
        if not 0 < threshold < 1:
            raise UserError(f"length.halting.threshold={threshold}: not between 0 and 1")
        self.tokens = tokens
        self.threshold = threshold
        self.norm = nn.LayerNorm(dim)
        self.project = nn.Linear(dim, width)
        self.positions = nn.Parameter(torch.randn(tokens, width) * 0.02)
        # From one wave over the range of errors that matter (five decades) to one over a twentieth of a decade.
        self.register_buffer("frequencies", torch.logspace(0, 2, waves) * 2 * math.pi / 5, persistent=False)
        self.embed = nn.Linear(2 * waves + 1, width)
        self.transformer = Transformer(width, depth, heads)
        self.out = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, 1))

    def forward(self, latents: Tensor, error: Tensor) -> Tensor:
        """Compute the logits of halting before each token, float32 `(b, n)`.

        Args:
            latents: `(b, n, dim)`, the encoder's; no gradient goes to them.
            error: `(b,)`, mean absolute error of the signal in [-1, 1].
        """
        scale = error.detach().float().clamp(min=LEAST).log10()[:, None]
        angles = scale * self.frequencies
        told = self.embed(torch.cat([scale, angles.sin(), angles.cos()], dim=1).to(self.embed.weight))
        tokens = self.project(self.norm(latents.detach())) + self.positions + told[:, None]
        logits: Tensor = self.out(self.transformer(tokens))[..., 0]
        return logits.float()

    def loss(self, latents: Tensor, error: Tensor, lengths: Tensor, counted: Tensor | None = None) -> Tensor:
        """Compare with what happened: binary cross entropy, 0 for the tokens that were kept and 1 for the rest.

        Args:
            latents: `(b, n, dim)`.
            error: `(b,)`, what the reconstruction from `lengths` tokens had.
            lengths: int64 `(b,)`.
            counted: bool `(b,)`, samples that say something; all if None.
        """
        logits = self(latents, error)
        halted = torch.arange(logits.shape[1], device=logits.device) >= lengths[:, None]
        each = functional.binary_cross_entropy_with_logits(logits, halted.float(), reduction="none").mean(1)
        return each.mean() if counted is None else (each * counted).mean()

    @torch.no_grad()
    def lengths(self, latents: Tensor, error: Tensor) -> Tensor:
        """Count the tokens before the first that halts, int64 `(b,)` in [1, n]."""
        goes_on = self(latents, error).sigmoid() < self.threshold
        count: Tensor = goes_on.long().cumprod(1).sum(1).clamp(min=1)
        return count
