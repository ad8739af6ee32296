"""Discriminators of clips: of stretches of space and time, and of frames."""

from itertools import pairwise

from torch import Tensor, nn

from ..masking import prefix_mask
from .contract import DiscriminatorOutput, Feature, Layers

__all__ = ["ClipDiscriminator", "FrameDiscriminator"]


class ClipDiscriminator(nn.Module):
    """PatchGAN in three dimensions: strided convolutions over space and time to a map of logits (TATS, 2204.03638).

    Weight norm stands in for the batch norm of the paper: a clip is then judged the same in any batch, at any length.

    Args:
        channels: Channels of the clip.
        width: Channels of the first layer; doubled by each further one, to 8 times at most.
        layers: Layers that halve rows and columns, and, from the second on, frames.
    """

    def __init__(self, channels: int = 3, width: int = 64, layers: int = 3) -> None:
        super().__init__()
        widths = [channels, *(width * min(2**layer, 8) for layer in range(layers + 1))]
        convolutions = []
        for layer, (narrow, wide) in enumerate(pairwise(widths)):
            across = 2 if layer < layers else 1
            stride = (across if layer else 1, across, across)
            convolutions.append(nn.Conv3d(narrow, wide, (3, 4, 4), stride=stride, padding=1))
        convolutions.append(nn.Conv3d(widths[-1], 1, (3, 4, 4), padding=1))
        self.layers = Layers(convolutions, slope=0.2)

    def forward(self, signal: Tensor, lengths: Tensor | None = None) -> list[DiscriminatorOutput]:
        """Judge clips `(b, c, t, h, w)` in [-1, 1] with `lengths` valid frames; None for all."""
        last, _, features = self.layers(signal, lengths)
        return [DiscriminatorOutput(last.values, last.valid, features)]


class FrameDiscriminator(nn.Module):
    """Judges clips by a discriminator of images, frame by frame.

    Args:
        discriminator: A discriminator of images `(n, c, h, w)`.
    """

    def __init__(self, discriminator: nn.Module) -> None:
        super().__init__()
        self.discriminator = discriminator

    def forward(self, signal: Tensor, lengths: Tensor | None = None) -> list[DiscriminatorOutput]:
        """Judge clips `(b, c, t, h, w)` in [-1, 1] with `lengths` valid frames; None for all."""
        b, _, t = signal.shape[:3]
        valid = None if lengths is None else prefix_mask(lengths, t)

        def by_clip(values: Tensor) -> Feature:
            values = values.view(b, t, *values.shape[1:])
            return Feature(values, None if valid is None else valid[(..., *[None] * (values.ndim - 2))])

        judged: list[DiscriminatorOutput] = self.discriminator(signal.transpose(1, 2).flatten(0, 1))
        return [
            DiscriminatorOutput(*by_clip(one.logits), [by_clip(feature.values) for feature in one.features])
            for one in judged
        ]
