"""Patch discriminator of images."""

from typing import Annotated

from torch import Tensor, nn

from .contract import DiscriminatorOutput, Feature

__all__ = ["PatchDiscriminator"]


class PatchDiscriminator(nn.Module):
    """PatchGAN: strided convolutions to a map of logits (pix2pix, arXiv 1611.07004, section 3.2.2).

    Group norm replaces the paper's batch norm, so that logits don't depend on the batch.

    Args:
        channels: Channels of the image.
        width: Channels of the first layer; each further layer doubles them, up to 8 times.
        layers: Layers that halve rows and columns.
    """

    def __init__(self, channels: int = 3, width: int = 64, layers: Annotated[int, "[0, 1000]"] = 3) -> None:
        super().__init__()
        net: list[nn.Module] = [nn.Conv2d(channels, width, 4, stride=2, padding=1), nn.LeakyReLU(0.2)]
        wide = width
        for layer in range(1, layers + 1):
            narrow, wide = wide, width * min(2**layer, 8)
            stride = 2 if layer < layers else 1
            net += [
                nn.Conv2d(narrow, wide, 4, stride=stride, padding=1, bias=False),
                nn.GroupNorm(min(32, wide), wide),
                nn.LeakyReLU(0.2),
            ]
        net.append(nn.Conv2d(wide, 1, 4, padding=1))
        self.net = nn.Sequential(*net)
        for module in self.net:
            if isinstance(module, nn.Conv2d):
                nn.init.normal_(module.weight, std=0.02)

    def forward(self, signal: Tensor, lengths: Tensor | None = None) -> list[DiscriminatorOutput]:
        """Compute logits `(b, 1, h', w')` and features of images `(b, c, h, w)` in [-1, 1]; h' is about `h / 2^layers`.

        Images have no padding, so `lengths` is ignored.
        """
        features = []
        for module in self.net:
            signal = module(signal)
            if isinstance(module, nn.LeakyReLU):
                features.append(Feature(signal, None))
        return [DiscriminatorOutput(signal, None, features)]
