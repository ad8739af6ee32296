"""A discriminator that judges patches."""

from torch import Tensor, nn

from .contract import DiscriminatorOutput, Feature

__all__ = ["PatchDiscriminator"]


class PatchDiscriminator(nn.Module):
    """PatchGAN: strided convolutions to a map of logits (pix2pix, arXiv 1611.07004, section 3.2.2).

    Group norm stands in for the batch norm of the paper: an image is then judged the same in any batch.

    Args:
        channels: Channels of the image.
        width: Channels of the first layer; doubled by each further one, to 8 times at most.
        layers: Layers that halve the image.
    """

    def __init__(self, channels: int = 3, width: int = 64, layers: int = 3) -> None:
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
        """Judge images `(b, c, h, w)` in [-1, 1] by logits `(b, 1, h', w')`, h' about h / 2^layers.

        All rows are valid, so `lengths` is not needed.
        """
        features = []
        for module in self.net:
            signal = module(signal)
            if isinstance(module, nn.LeakyReLU):
                features.append(Feature(signal, None))
        return [DiscriminatorOutput(signal, None, features)]
