"""A transformer block that a condition modulates, such as the time of a diffusion: AdaLN-zero."""

import torch
from torch import Tensor, nn
from torch.nn import functional

from varitok import UserError

from .attention import attend

__all__ = ["ModulatedBlock", "time_waves"]


class ModulatedBlock(nn.Module):
    """Transformer block with norms shifted, scaled and gated by a condition (DiT, arXiv 2212.09748, section 3.2).

    The first tokens and the rest attend to each other, but are modulated by vectors of their own, as FlexTok's
    registers and patches (arXiv 2502.13967). All vectors start at 0, so that the block starts as the identity.

    Args:
        width: Width of tokens and condition.
        heads: Attention heads; divides the width.
        expansion: Hidden width of the perceptron, as a multiple of `width`.
    """

    def __init__(self, width: int, heads: int, expansion: float = 4.0) -> None:
        super().__init__()
        if width % heads:
            raise UserError(f"transformer: width={width} should be a multiple of its heads={heads}")
        self.heads = heads
        self.attention_norm = nn.LayerNorm(width, elementwise_affine=False)
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)
        self.mlp_norm = nn.LayerNorm(width, elementwise_affine=False)
        hidden = int(width * expansion)
        self.mlp = nn.Sequential(nn.Linear(width, hidden), nn.GELU(), nn.Linear(hidden, width))
        self.modulation = nn.Linear(width, 12 * width)
        nn.init.zeros_(self.modulation.weight)
        nn.init.zeros_(self.modulation.bias)

    def forward(self, x: Tensor, condition: Tensor, first: int, mask: Tensor | None) -> Tensor:
        """Transform tokens.

        Args:
            x: Tokens, `(b, n, width)`.
            condition: `(b, width)`.
            first: Number of the first tokens.
            mask: bool `(b, n)`, True where a token may be attended to; None: all.
        """
        # (b, 12 * width) -> 6 of (b, 2, width)
        vectors = self.modulation(functional.silu(condition)).reshape(x.shape[0], 2, 6, -1).unbind(2)
        allowed: Tensor | None = None
        if mask is not None:
            allowed = mask[:, None, None, :]
        normed = _shift(self.attention_norm(x), vectors[0], vectors[1], first)
        x = x + _scale(self.out(attend(self.qkv(normed), self.heads, allowed)), vectors[2], first)
        normed = _shift(self.mlp_norm(x), vectors[3], vectors[4], first)
        return x + _scale(self.mlp(normed), vectors[5], first)


def _scale(x: Tensor, factors: Tensor, first: int) -> Tensor:
    """Multiply the `first` tokens of `(b, n, width)`, and the others, by their factors `(b, 2, width)`."""
    return torch.cat([x[:, :first] * factors[:, :1], x[:, first:] * factors[:, 1:]], dim=1)


def _shift(x: Tensor, scales: Tensor, shifts: Tensor, first: int) -> Tensor:
    """Return `x * (1 + scale) + shift`, for the `first` tokens and for the others; see `_scale`."""
    ours, theirs = x[:, :first] * (1 + scales[:, :1]), x[:, first:] * (1 + scales[:, 1:])
    return torch.cat([ours + shifts[:, :1], theirs + shifts[:, 1:]], dim=1)


def time_waves(time: Tensor, width: int) -> Tensor:
    """Return sines and cosines of times in [0, 1], `(b,)` -> `(b, width)` (arXiv 1706.03762, section 3.5).

    Their angles are from 1000 t down to 0.1 t, as of DDPM's 1000 steps; an odd width's last channel is 0.
    """
    half = width // 2
    rates = 1000 * torch.pow(10_000, -torch.arange(half, device=time.device) / half)
    angles = time[:, None] * rates
    return functional.pad(torch.cat([angles.sin(), angles.cos()], dim=1), [0, width - 2 * half])
