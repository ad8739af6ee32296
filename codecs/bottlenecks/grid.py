"""Grids of scalar levels, whose codes are mixed-radix integers; training and export share the arithmetic."""

import copy
import math
from abc import abstractmethod
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from varitok import UserError

from ..masking import prefix_mask
from ..result import Quantized
from .contract import Bottleneck

__all__ = ["FramedGrid", "Grid", "GridQuantizer"]


class Grid(nn.Module):
    """Base of grids: `code = sum_i digit_i * prod_(j<i) levels_j`.

    Sums are int64: float32 is exact up to 24 bits only, and 99.6 % of 36-bit codes summed in it are wrong.

    Args:
        levels: Levels of each dimension; their product is below 2^63.

    Raises:
        UserError: There are none, or too many for an int64 code.
    """

    levels: Tensor
    radix: Tensor

    def __init__(self, levels: Sequence[int]) -> None:
        super().__init__()
        if not levels or math.prod(levels) >= 1 << 63:
            raise UserError(f"bottleneck.levels={list(levels)}: give one or more, with a product below 2^63")
        radix = [math.prod(levels[:i]) for i in range(len(levels))]
        self.register_buffer("levels", torch.tensor(list(levels)), persistent=False)
        self.register_buffer("radix", torch.tensor(radix), persistent=False)

    def code(self, digits: Tensor) -> Tensor:
        """Pack int64 digits `(b, n, d)` into codes `(b, 1, n)`."""
        return (digits * self.radix).sum(-1).unsqueeze(1)

    def digits(self, codes: Tensor) -> Tensor:
        """Unpack codes `(b, 1, n)` into int64 digits `(b, n, d)`."""
        # `//`, because ONNX exports torch.div with a rounding mode as a float32 division.
        return codes[:, 0].unsqueeze(-1) // self.radix % self.levels

    def encode(self, latents: Tensor) -> Tensor:
        """Quantize latents `(b, n, d)` to int64 codes `(b, 1, n)`."""
        raise NotImplementedError

    def decode(self, codes: Tensor) -> Tensor:
        """Decode codes `(b, 1, n)` to latents `(b, n, d)`."""
        raise NotImplementedError


class FramedGrid(nn.Module):
    """Grid applied to linearly mapped (scaled, rotated or permuted) latents.

    Args:
        grid: The grid.
        into: Matrix `(d, d)` from latents to the grid.
        out: Matrix `(d, d)` from the grid to latents.
    """

    into: Tensor
    out: Tensor

    def __init__(self, grid: Grid, into: Tensor, out: Tensor) -> None:
        super().__init__()
        self.grid = grid
        self.register_buffer("into", into)
        self.register_buffer("out", out)

    def encode(self, latents: Tensor) -> Tensor:
        """Quantize latents `(b, n, d)` to int64 codes `(b, 1, n)`."""
        return self.grid.encode(latents @ self.into)

    def decode(self, codes: Tensor) -> Tensor:
        """Decode codes `(b, 1, n)` to latents `(b, n, d)`."""
        return self.grid.decode(codes) @ self.out


class GridQuantizer(Bottleneck):
    """Base of quantizers whose only codebook is a grid: there is no table to learn or to collapse.

    Args:
        levels: Levels of each dimension; their product is the number of codes.
        grid: The grid of these levels.
    """

    def __init__(self, levels: Sequence[int], grid: Grid) -> None:
        super().__init__()
        self.dim = len(levels)
        self.codebook_sizes = (math.prod(levels),)
        self.grid = grid

    def forward(self, latents: Tensor, lengths: Tensor, n_codebooks: Tensor) -> Quantized:
        """Quantize; see `Bottleneck.forward`."""
        # Autocast ends here: in bfloat16 half of the codes cannot be reached.
        with torch.autocast(latents.device.type, enabled=False):
            return self._quantize(latents.float(), prefix_mask(lengths, latents.shape[1]))

    @abstractmethod
    def _quantize(self, latents: Tensor, valid: Tensor) -> Quantized:
        """Quantize float32 latents `(b, n, d)`; bool `(b, n)` marks the valid ones."""

    def encode(self, latents: Tensor) -> Tensor:
        """Quantize latents to codes; see `Bottleneck.encode`."""
        return self.grid.encode(latents.float())

    def decode(self, codes: Tensor) -> Tensor:
        """Decode codes to grid points; see `Bottleneck.decode`."""
        return self.grid.decode(codes)

    def frozen(self) -> nn.Module:
        """Return the export form, a copy of the grid; see `Bottleneck.frozen`."""
        return copy.deepcopy(self.grid)
