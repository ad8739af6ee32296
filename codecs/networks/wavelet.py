"""Haar wavelets before and after a video codec (Cosmos tokenizer, arXiv 2501.03575, section 3.1)."""

import torch
from torch import Tensor, nn
from torch.nn import functional

__all__ = ["Haar", "InverseHaar"]


def _kernels() -> Tensor:
    """Return the eight products of sums and differences along three axes, `(8, 1, 2, 2, 2)`, of length 1 each."""
    pair = torch.tensor([[1.0, 1.0], [1.0, -1.0]]) / 2**0.5
    return torch.einsum("ax,by,cz->abcxyz", pair, pair, pair).reshape(8, 1, 2, 2, 2)


class Haar(nn.Module):
    """Turns blocks of two frames, rows and columns into eight channels, again and again; nothing is lost.

    Args:
        channels: Channels in.
        levels: How often; each halves every axis.

    Attributes:
        rate: Steps of each axis to one that comes out.
        outputs: Channels out.
    """

    kernels: Tensor

    def __init__(self, channels: int, levels: int) -> None:
        super().__init__()
        self.levels = levels
        self.rate = 2**levels
        self.outputs = channels * 8**levels
        self.register_buffer("kernels", _kernels(), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """Transform `(b, c, t, h, w)`; all axes are multiples of `rate`."""
        for _ in range(self.levels):
            # Each channel is a group of its own, whose eight bands stay together.
            x = functional.conv3d(x, self.kernels.repeat(x.shape[1], 1, 1, 1, 1), stride=2, groups=x.shape[1])
        return x


class InverseHaar(nn.Module):
    """Undoes `Haar`.

    Args:
        channels: Channels out.
        levels: How often.

    Attributes:
        rate: Steps of each axis that come out for one.
        inputs: Channels in.
    """

    kernels: Tensor

    def __init__(self, channels: int, levels: int) -> None:
        super().__init__()
        self.levels = levels
        self.rate = 2**levels
        self.inputs = channels * 8**levels
        self.register_buffer("kernels", _kernels(), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """Transform `(b, c, t, h, w)`."""
        for _ in range(self.levels):
            groups = x.shape[1] // 8
            x = functional.conv_transpose3d(x, self.kernels.repeat(groups, 1, 1, 1, 1), stride=2, groups=groups)
        return x
