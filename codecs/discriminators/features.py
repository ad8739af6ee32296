"""Discriminator on the features of a frozen network, such as DINO."""

import math
from collections.abc import Sequence
from typing import Annotated

from torch import Tensor, nn
from torch.nn.utils.parametrizations import spectral_norm

from varitok import UserError
from varitok.data.teachers.vision import FrameTeacher

from ..unregistered import FrozenModules
from .contract import DiscriminatorOutput, Feature

__all__ = ["FeatureDiscriminator"]


class FeatureDiscriminator(nn.Module):
    """A head on each of several layers of a frozen network (StyleGAN-T, arXiv 2301.09515, section 3.2).

    UniTok (arXiv 2502.20321) and GigaTok (arXiv 2504.08736) train with such heads on DINO-S.

    A head has convolutions of one position, of 3 x 3 positions beside a linear path, and of one position to the logits,
    with spectral norm. In the papers the second one has nine tokens of a row-major sequence, and the norms are those
    of small batches; here rows stay rows, and logits don't depend on the batch. Without differentiable augmentation.

    Args:
        network: Frozen network of images, which is neither trained nor checkpointed.
        layers: Indices of its layers; None for all.
        width: Channels of the heads.

    Raises:
        UserError: The network has no such layer, or none is chosen.
    """

    def __init__(
        self,
        network: FrameTeacher,
        layers: Annotated[Sequence[int] | None, "[0, inf)", "null takes all"] = None,
        width: int = 384,
    ) -> None:
        super().__init__()
        count = len(network.layer_channels)
        self.layers = list(range(count)) if layers is None else list(layers)
        if not self.layers or any(layer >= count for layer in self.layers):
            raise UserError(f"discriminator.layers={self.layers}: {network.name} has layers 0 to {count - 1}")
        self.aside = FrozenModules({"network": network})
        self.heads = nn.ModuleList([_Head(network.layer_channels[layer], width) for layer in self.layers])

    def forward(self, signal: Tensor, lengths: Tensor | None = None) -> list[DiscriminatorOutput]:
        """Compute each head's logits `(b, 1, h', w')` and its features of images `(b, c, h, w)` in [-1, 1].

        Images have no padding, so `lengths` is ignored.

        Raises:
            UserError: The images' size isn't the network's.
        """
        maps, _ = self.aside.networks["network"].layers(signal)
        return [head(maps[layer]) for head, layer in zip(self.heads, self.layers, strict=True)]


class _Head(nn.Module):
    def __init__(self, channels: int, width: int) -> None:
        super().__init__()
        self.into = _layer(channels, width, 1)
        self.mix = _layer(width, width, 3)
        self.judge = spectral_norm(nn.Conv2d(width, 1, 1))

    def forward(self, features: Tensor) -> DiscriminatorOutput:
        """Compute logits `(b, 1, h, w)` of features `(b, channels, h, w)`."""
        x = self.into(features)
        y = (self.mix(x) + x) / math.sqrt(2)
        return DiscriminatorOutput(self.judge(y), None, [Feature(x, None), Feature(y, None)])


def _layer(narrow: int, wide: int, kernel: int) -> nn.Sequential:
    convolution = spectral_norm(nn.Conv2d(narrow, wide, kernel, padding=kernel // 2, padding_mode="replicate"))
    return nn.Sequential(convolution, nn.GroupNorm(math.gcd(32, wide), wide), nn.LeakyReLU(0.2))
