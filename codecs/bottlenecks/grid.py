"""Codes of a grid of levels: a mixed-radix number, the same arithmetic for training and export."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

__all__ = ["FramedGrid", "Grid"]


class Grid(nn.Module):
    """Turns digits into codes and back, the first dimension the lowest digit.

    Sums are int64: float32 counts exactly to 24 bits only, and a 36-bit code packed in it is right in 0.4 % of cases.

    Args:
        levels: Levels of each dimension; their product is below 2^63.
    """

    levels: Tensor
    radix: Tensor

    def __init__(self, levels: Sequence[int]) -> None:
        super().__init__()
        radix = [math.prod(levels[:i]) for i in range(len(levels))]
        self.register_buffer("levels", torch.tensor(list(levels)), persistent=False)
        self.register_buffer("radix", torch.tensor(radix), persistent=False)

    def code(self, digits: Tensor) -> Tensor:
        """Turn int64 digits `(b, n, d)` into codes `(b, 1, n)`."""
        return (digits * self.radix).sum(-1).unsqueeze(1)

    def digits(self, codes: Tensor) -> Tensor:
        """Turn codes `(b, 1, n)` into int64 digits `(b, n, d)`."""
        # As `//`, since ONNX gets torch.div with a rounding mode as a division of float32.
        return codes[:, 0].unsqueeze(-1) // self.radix % self.levels


class FramedGrid(nn.Module):
    """A grid of scaled, rotated or permuted latents.

    Args:
        grid: Has `encode` and `decode`.
        into: Matrix `(d, d)` from latents to the grid.
        out: Matrix `(d, d)` from the grid to latents.
    """

    into: Tensor
    out: Tensor

    def __init__(self, grid: nn.Module, into: Tensor, out: Tensor) -> None:
        super().__init__()
        self.grid = grid
        self.register_buffer("into", into)
        self.register_buffer("out", out)

    def encode(self, latents: Tensor) -> Tensor:
        """Turn latents `(b, n, d)` into int64 codes `(b, 1, n)`."""
        codes: Tensor = self.grid.encode(latents @ self.into)  # type: ignore[operator]
        return codes

    def decode(self, codes: Tensor) -> Tensor:
        """Turn codes `(b, 1, n)` into latents `(b, n, d)`."""
        latents: Tensor = self.grid.decode(codes)  # type: ignore[operator]
        return latents @ self.out
