"""Finite scalar quantization."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from varitok import UserError

from ..result import Quantized
from .contract import Bottleneck, straight_through

__all__ = ["FiniteScalarQuantizer"]


class _Grid(nn.Module):
    """The arithmetic of the grid, the same for training and export.

    A code is a mixed-radix number, the first dimension its lowest digit; it is summed in int64, since float32 counts
    exactly to 24 bits only.
    """

    levels: Tensor
    radix: Tensor
    zero: Tensor
    reach: Tensor
    offset: Tensor
    shift: Tensor

    def __init__(self, levels: Sequence[int]) -> None:
        super().__init__()
        radix = [math.prod(levels[:i]) for i in range(len(levels))]
        sizes = torch.tensor(levels)
        half = (sizes - 1) * (1 + 1e-3) / 2
        offset = torch.where(sizes % 2 == 0, 0.5, 0.0)
        for name, value in {
            "levels": sizes,
            "radix": torch.tensor(radix),
            "zero": sizes // 2,  # the digit of the value 0
            "reach": half,
            "offset": offset,
            "shift": torch.atanh(offset / half),
        }.items():
            self.register_buffer(name, value, persistent=False)

    def bound(self, latents: Tensor) -> Tensor:
        return torch.tanh(latents + self.shift) * self.reach - self.offset

    def code(self, digits: Tensor) -> Tensor:
        return ((digits + self.zero) * self.radix).sum(-1).unsqueeze(1)

    def encode(self, latents: Tensor) -> Tensor:
        """Turn latents `(b, n, d)` into int64 codes `(b, 1, n)`."""
        return self.code(torch.round(self.bound(latents)).to(torch.int64))

    def decode(self, codes: Tensor) -> Tensor:
        """Turn codes `(b, 1, n)` into latents `(b, n, d)` in [-1, 1]."""
        digits = torch.div(codes[:, 0].unsqueeze(-1), self.radix, rounding_mode="floor") % self.levels
        return (digits - self.zero).to(torch.float32) / self.zero


class FiniteScalarQuantizer(Bottleneck):
    """Rounds each dimension to a few levels; no codebook to learn or to collapse (arXiv 2309.15505, section 3).

    Args:
        levels: Levels of each dimension, at least 3 (with 2 the bound has next to no gradient); their product is
            the number of codes.

    Raises:
        UserError: A level is below 3.
    """

    def __init__(self, levels: Sequence[int]) -> None:
        super().__init__()
        if not levels or min(levels) < 3:
            raise UserError(f"bottleneck.levels: every level must be at least 3, got {list(levels)}")
        self.dim = len(levels)
        self.book_sizes = (math.prod(levels),)
        self.grid = _Grid(levels)

    def forward(self, latents: Tensor, lengths: Tensor, depth: Tensor) -> Quantized:
        """Quantize; see `Bottleneck.forward`."""
        # In bfloat16 half of the codes are out of reach, so autocast ends here.
        with torch.autocast(latents.device.type, enabled=False):
            bounded = self.grid.bound(latents.float())
            codes = self.grid.code(torch.round(bounded.detach()).to(torch.int64))
            quantized = straight_through(bounded / self.grid.zero, self.grid.decode(codes))
        return Quantized(quantized, codes, {}, {})

    def encode(self, latents: Tensor) -> Tensor:
        """Round latents to their codes; see `Bottleneck.encode`."""
        codes: Tensor = self.grid.encode(latents.float())
        return codes

    def decode(self, codes: Tensor) -> Tensor:
        """Turn codes into grid points; see `Bottleneck.decode`."""
        latents: Tensor = self.grid.decode(codes)
        return latents

    def frozen(self) -> nn.Module:
        """Give the export form; see `Bottleneck.frozen`."""
        return _Grid(self.grid.levels.tolist())
