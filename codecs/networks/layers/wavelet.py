"""3-D Haar wavelet transform of clips and its inverse (Cosmos tokenizer, arXiv 2501.03575, section 3.1)."""

import torch
from torch import Tensor, nn
from torch.nn import functional

__all__ = ["Haar", "InverseHaar"]


def _kernels() -> Tensor:
    """Return the eight orthonormal Haar kernels, products of sum and difference filters per axis: `(8, 1, 2, 2, 2)`."""
    pair = torch.tensor([[1.0, 1.0], [1.0, -1.0]]) / 2**0.5
    return torch.einsum("ax,by,cz->abcxyz", pair, pair, pair).reshape(8, 1, 2, 2, 2)


class Haar(nn.Module):
    """Orthonormal 3-D Haar transform: each level maps blocks of 2 x 2 x 2 positions to eight channels; invertible.

    Args:
        channels: Channels of the clip.
        levels: Levels of the transform; each halves every axis.

    Attributes:
        rate: Downsampling factor of each axis, `2 ** levels`.
        bands: Channels of the transformed clip, `channels * 8 ** levels`.
    """

    kernels: Tensor

    def __init__(self, channels: int, levels: int) -> None:
        super().__init__()
        self.levels = levels
        self.rate = 2**levels
        self.bands = channels * 8**levels
        self.register_buffer("kernels", _kernels(), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """Transform `(b, c, t, h, w)` to `(b, bands, t / rate, h / rate, w / rate)`."""
        for _ in range(self.levels):
            # Depthwise: the eight bands of a channel are adjacent. (b, c, t, h, w) -> (b, c * 8, t / 2, h / 2, w / 2)
            x = functional.conv3d(x, self.kernels.repeat(x.shape[1], 1, 1, 1, 1), stride=2, groups=x.shape[1])
        return x


class InverseHaar(Haar):
    """Inverse of the `Haar` transform with the same arguments."""

    def forward(self, x: Tensor) -> Tensor:
        """Transform `(b, bands, t, h, w)` to `(b, channels, t * rate, h * rate, w * rate)`."""
        for _ in range(self.levels):
            groups = x.shape[1] // 8
            x = functional.conv_transpose3d(x, self.kernels.repeat(groups, 1, 1, 1, 1), stride=2, groups=groups)
        return x
