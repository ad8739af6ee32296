"""Video discriminators: 3-D patches, and single frames."""

from itertools import pairwise
from typing import Annotated

from torch import Tensor, nn

from ..masking import prefix_mask
from .contract import DiscriminatorOutput, Feature, Layers

__all__ = ["ClipDiscriminator", "FrameDiscriminator"]


class ClipDiscriminator(nn.Module):
    """3-D PatchGAN: strided space-time convolutions to a map of logits (TATS, arXiv 2204.03638).

    Weight norm replaces the paper's batch norm, so that logits don't depend on the batch or on padding.

    Args:
        channels: Channels of the clip.
        width: Channels of the first layer; each further layer doubles them, up to 8 times.
        layers: Layers that halve rows and columns; all but the first also halve frames.
    """

    def __init__(self, channels: int = 3, width: int = 64, layers: Annotated[int, "[0, 1000]"] = 3) -> None:
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
        """Compute logits and features of clips `(b, c, t, h, w)` in [-1, 1], valid up to frame `lengths`."""
        last, _, features = self.layers(signal, lengths)
        return [DiscriminatorOutput(last.values, last.valid, features)]


class FrameDiscriminator(nn.Module):
    """Image discriminator applied to each frame of a clip.

    Args:
        discriminator: Discriminator of images `(n, c, h, w)`.
    """

    def __init__(self, discriminator: nn.Module) -> None:
        super().__init__()
        self.discriminator = discriminator

    def forward(self, signal: Tensor, lengths: Tensor | None = None) -> list[DiscriminatorOutput]:
        """Compute logits and features of clips `(b, c, t, h, w)` in [-1, 1], valid up to frame `lengths`."""
        b, _, t = signal.shape[:3]
        valid = None if lengths is None else prefix_mask(lengths, t)

        def by_clip(values: Tensor) -> Feature:
            values = values.view(b, t, *values.shape[1:])  # (b * t, ...) -> (b, t, ...)
            return Feature(values, None if valid is None else valid[(..., *[None] * (values.ndim - 2))])

        # (b, c, t, h, w) -> (b * t, c, h, w)
        outputs: list[DiscriminatorOutput] = self.discriminator(signal.transpose(1, 2).flatten(0, 1))
        return [
            DiscriminatorOutput(*by_clip(one.logits), [by_clip(feature.values) for feature in one.features])
            for one in outputs
        ]
