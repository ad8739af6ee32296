"""Vision transformers of image tokenizers on a grid: a token for each patch (ViT-VQGAN, arXiv 2110.04627, section 3.1).

Positions are rotary, by row and column, so that images have any size.
"""

from typing import Annotated

from torch import Tensor, nn
from torch.nn import functional

from .contract import Decoder, Encoder, Network
from .layers.convolution import along_first, at_rate, zero_invalid
from .layers.sequence import SequenceTransformer

__all__ = ["ViTDecoder", "ViTEncoder"]


class _ViT(Network):
    """Layers of encoder and decoder."""

    decodes: bool

    def __init__(
        self,
        *,
        patch: int,
        width: int,
        depth: Annotated[int, "[0, 1000]"],
        heads: int,
        hidden: int | None = None,
        channels: int = 3,
    ) -> None:
        super().__init__(width=width, downsample=(patch, patch), channels=channels)
        self.patch = patch
        if not self.decodes:
            self.embed = nn.Conv2d(channels, width, patch, stride=patch)
        self.transformer = SequenceTransformer(width, depth, heads, hidden, layer_scale=1.0, qk_norm=True, axes=2)
        self.norm = nn.LayerNorm(width)
        if self.decodes:
            self.to_pixels = nn.Linear(width, channels * patch * patch)


class ViTEncoder(_ViT, Encoder):
    """Encoder of images into one latent per patch.

    Args:
        patch: Side of a patch, in pixels.
        width: Width of the transformer and of the latents.
        depth: Blocks of the transformer.
        heads: Attention heads per block; twice their number divides the width.
        hidden: Hidden width of the perceptrons; four times the width if None.
        channels: Channels of the image.

    Raises:
        UserError: Inconsistent sizes.
    """

    decodes = False

    def forward(self, signal: Tensor, mask: Tensor | None = None, memory: list[Tensor] | None = None) -> Tensor:
        """Return the latents `(b, n, width)` of images `(b, c, h, w)`."""
        patches = self.embed(signal)
        rows, columns = patches.shape[2], patches.shape[3]
        patches = patches.flatten(2).transpose(1, 2)  # (b, width, rows, columns) -> (b, n, width)
        latents: Tensor = self.norm(self.transformer(patches, mask, None, rows, columns))
        return latents


class ViTDecoder(_ViT, Decoder):
    """Decoder of latents into images; its arguments are the encoder's."""

    decodes = True

    def forward(
        self, latents: Tensor, mask: Tensor | None, grid: list[int], memory: list[Tensor] | None = None
    ) -> Tensor:
        """Decode latents `(b, n, width)` into images `(b, c, h, w)`."""
        rows, columns = grid
        x = self.to_pixels(self.norm(self.transformer(latents, mask, None, rows, columns)))
        # (b, n, c * patch^2) -> (b, c * patch^2, rows, columns)
        signal = functional.pixel_shuffle(x.transpose(1, 2).reshape(x.shape[0], -1, rows, columns), self.patch)
        return zero_invalid(signal, at_rate(along_first(mask, rows, 2), self.patch, 2))
