"""Residual discriminator of images (StyleGAN2)."""

import math
from itertools import pairwise
from typing import Annotated

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.utils.parametrize import register_parametrization

from .contract import DiscriminatorOutput, Feature

__all__ = ["StyleDiscriminator"]

LAST = 4  # pixels: rows and columns of the last features


class StyleDiscriminator(nn.Module):
    """StyleGAN2's residual discriminator (arXiv 1912.04958, section 4.1), with one logit per image.

    Its minibatch standard deviation is left out: logits don't depend on the batch, and reconstructions differ as their
    originals do. Images of other sizes than in training are pooled to the last features' 4 x 4 positions.

    Args:
        size: Height and width of the training images, in pixels.
        channels: Channels of the image.
        width: Most channels of a layer.
        base: Channels of a layer times its rows, up to `width`.
    """

    def __init__(
        self, size: Annotated[int, "[8, inf)"], channels: int = 3, width: int = 512, base: int = 32768
    ) -> None:
        super().__init__()
        sides = [size >> halvings for halvings in range(int(math.log2(size // LAST)) + 1)]
        widths = [max(1, min(width, base // side)) for side in sides]
        self.first = _equalize(nn.Conv2d(channels, widths[0], 1))
        self.blocks = nn.ModuleList([_Block(wide, wider) for wide, wider in pairwise(widths)])
        self.mix = _equalize(nn.Conv2d(widths[-1], widths[-1], 3, padding=1))
        self.hidden = _equalize(nn.Linear(widths[-1] * LAST**2, widths[-1]))
        self.judge = _equalize(nn.Linear(widths[-1], 1))

    def forward(self, signal: Tensor, lengths: Tensor | None = None) -> list[DiscriminatorOutput]:
        """Compute logits `(b, 1)` and each block's features of images `(b, c, h, w)` in [-1, 1].

        Images have no padding, so `lengths` is ignored.
        """
        x = _activate(self.first(signal))
        features = []
        for block in self.blocks:
            x = block(x)
            features.append(Feature(x, None))
        x = _activate(self.mix(x))
        if x.shape[2:] != (LAST, LAST):
            x = functional.adaptive_avg_pool2d(x, LAST)
        return [DiscriminatorOutput(self.judge(_activate(self.hidden(x.flatten(1)))), None, features)]


class _Block(nn.Module):
    """Two convolutions with a linear path beside them; the second and the path halve rows and columns."""

    blur: Tensor

    def __init__(self, narrow: int, wide: int) -> None:
        super().__init__()
        self.keep = _equalize(nn.Conv2d(narrow, narrow, 3, padding=1))
        self.halve = _equalize(nn.Conv2d(narrow, wide, 3, stride=2))
        self.path = _equalize(nn.Conv2d(narrow, wide, 1, bias=False))
        taps = torch.tensor([1.0, 3.0, 3.0, 1.0]) / 8
        self.register_buffer("blur", torch.outer(taps, taps), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """Map features `(b, narrow, h, w)` to `(b, wide, h / 2, w / 2)`."""
        y = _activate(self.keep(x))
        y = _activate(self.halve(self._smooth(y, padding=2)))
        path: Tensor = self.path(self._smooth(x, padding=1, stride=2))
        return (path + y) / math.sqrt(2)

    def _smooth(self, x: Tensor, padding: int, stride: int = 1) -> Tensor:
        """Filter each channel, so that halving doesn't alias."""
        taps = self.blur.to(x.dtype).expand(x.shape[1], 1, -1, -1)
        return functional.conv2d(x, taps, stride=stride, padding=padding, groups=x.shape[1])


class _Scale(nn.Module):
    """Equalized learning rate (Progressive GAN, arXiv 1710.10196, section 4.1): a weight of unit variance, scaled."""

    def __init__(self, gain: float) -> None:
        super().__init__()
        self.gain = gain

    def forward(self, weight: Tensor) -> Tensor:
        """Return the scaled weight."""
        return self.gain * weight


def _equalize(layer: nn.Module) -> nn.Module:
    """Initialize a layer's weight with unit variance, and scale it by 1 / sqrt(inputs) when it is used."""
    weight = layer.get_parameter("weight")
    nn.init.normal_(weight)
    if layer.bias is not None:
        nn.init.zeros_(layer.get_parameter("bias"))
    return register_parametrization(layer, "weight", _Scale(1 / math.sqrt(weight[0].numel())))


def _activate(x: Tensor) -> Tensor:
    """Apply leaky ReLU, scaled to preserve variance."""
    return functional.leaky_relu(x, 0.2) * math.sqrt(2)
