"""Haar wavelet transform of images and clips, and its inverse (Cosmos tokenizer, arXiv 2501.03575, section 4.1)."""

from functools import reduce

import torch
from torch import Tensor, nn
from torch.nn import functional

__all__ = ["Haar", "InverseHaar"]


def _kernels(dims: int) -> Tensor:
    """Return the orthonormal Haar kernels, products of sums and differences per axis: `(2^dims, 1, 2, 2, ...)`."""
    pair = torch.tensor([[1.0, 1.0], [1.0, -1.0]]) / 2**0.5
    return reduce(torch.kron, [pair] * dims).reshape(2**dims, 1, *[2] * dims)


class Haar(nn.Module):
    """Orthonormal Haar transform: each level maps blocks of 2 x 2 (x 2) positions to 4 (8) channels; invertible.

    Args:
        channels: Channels of the signal.
        levels: Levels of the transform; each halves every axis.
        dims: Axes: 2 for images, 3 for clips.

    Attributes:
        rate: Downsampling factor of each axis, `2 ** levels`.
        bands: Channels of the transformed signal, `channels * 2 ** (dims * levels)`.
    """

    kernels: Tensor

    def __init__(self, channels: int, levels: int, dims: int = 3) -> None:
        super().__init__()
        self.levels = levels
        self.rate = 2**levels
        self.bands = channels * 2 ** (dims * levels)
        self.register_buffer("kernels", _kernels(dims), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """Transform `(b, c, *size)` to `(b, bands, *(size / rate))`."""
        for _ in range(self.levels):
            # Depthwise: the bands of a channel are adjacent. (b, c, *size) -> (b, c * 2^dims, *(size / 2))
            groups = x.shape[1]
            if x.dim() == 4:
                x = functional.conv2d(x, self.kernels.repeat(groups, 1, 1, 1), stride=2, groups=groups)
            else:
                x = functional.conv3d(x, self.kernels.repeat(groups, 1, 1, 1, 1), stride=2, groups=groups)
        return x


class InverseHaar(Haar):
    """Inverse of the `Haar` transform with the same arguments."""

    def forward(self, x: Tensor) -> Tensor:
        """Transform `(b, bands, *size)` to `(b, channels, *(size * rate))`."""
        for _ in range(self.levels):
            groups = x.shape[1] // self.kernels.shape[0]
            if x.dim() == 4:
                x = functional.conv_transpose2d(x, self.kernels.repeat(groups, 1, 1, 1), stride=2, groups=groups)
            else:
                x = functional.conv_transpose3d(x, self.kernels.repeat(groups, 1, 1, 1, 1), stride=2, groups=groups)
        return x
