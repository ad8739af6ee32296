"""Vision transformers of image tokenizers on a grid: a token for each patch.

ViT-VQGAN (arXiv 2110.04627, section 3.1), BSQ-ViT (arXiv 2406.07548) and ViTok (arXiv 2501.09755) differ in sizes,
perceptrons and bottlenecks. Positions aren't learned, so that images have any size. A convolutional network may come
before the patches (arXiv 2106.14881) and after them.
"""

from typing import Annotated, Literal

from torch import Tensor, nn
from torch.nn import functional

from varitok import UserError

from .contract import Decoder, Encoder, Network
from .layers.attention import Transformer
from .layers.convolution import along_first, at_rate, within_squares, zero_invalid
from .layers.positions import grid_waves
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
        gated: bool = False,
        positions: Literal["rotary", "sincos"] = "rotary",
        network: Network | None = None,
    ) -> None:
        if positions not in ("rotary", "sincos"):
            raise UserError(f"codec: positions={positions} should be rotary or sincos")
        if gated and positions == "sincos":
            raise UserError("codec: gated perceptrons have positions=rotary")
        steps = (1, 1) if network is None else network.downsample
        channels = channels if network is None else network.channels
        super().__init__(width=width, downsample=(patch * steps[0], patch * steps[1]), channels=channels)
        self.patch = patch
        self.network = network
        inside = channels if network is None else network.width  # channels of the patches
        if not self.decodes:
            self.embed = nn.Conv2d(inside, width, patch, stride=patch)
        self.transformer: SequenceTransformer | None = None
        self.plain: Transformer | None = None
        if positions == "rotary":
            self.transformer = SequenceTransformer(
                width, depth, heads, hidden, layer_scale=1.0, qk_norm=True, gated=gated, axes=2
            )
        else:
            self.plain = Transformer(width, depth, heads, (hidden or 4 * width) / width)
        self.norm = nn.LayerNorm(width)
        if self.decodes:
            self.to_pixels = nn.Linear(width, inside * patch * patch)

    def attend(self, x: Tensor, mask: Tensor | None, rows: int, columns: int) -> Tensor:
        """Run the transformer over tokens `(b, n, width)` of a grid; `mask` is bool `(b, n)`."""
        if self.transformer is not None:
            x = self.transformer(x, mask, None, rows, columns)
        if self.plain is not None:
            x = self.plain(x + grid_waves(self.width, rows, columns, x.device).flatten(2).transpose(1, 2), mask)
        return self.norm(x)  # type: ignore[no-any-return]


class ViTEncoder(_ViT, Encoder):
    """Encoder of images into one latent per patch.

    Args:
        patch: Side of a patch, in pixels, or in steps of the network.
        width: Width of the transformer and of the latents.
        depth: Blocks of the transformer.
        heads: Attention heads per block; twice their number divides the width.
        hidden: Hidden width of the perceptrons; four times the width if None.
        channels: Channels of the image, if there is no network.
        gated: Use SwiGLU instead of GELU perceptrons (ViTok); with rotary positions.
        positions: "rotary" in each block, with norms of queries and keys, or "sincos" added to the patches.
        network: Encoder whose latents are cut into patches, such as `ResNetEncoder`; None for patches of pixels.

    Raises:
        UserError: Inconsistent sizes.
    """

    decodes = False

    def forward(self, signal: Tensor, mask: Tensor | None = None, memory: list[Tensor] | None = None) -> Tensor:
        """Return the latents `(b, n, width)` of images `(b, c, h, w)`."""
        rows, columns = signal.shape[2] // self.downsample[0], signal.shape[3] // self.downsample[1]
        if self.network is not None:
            cells = self.network(signal, within_squares(mask, self.patch, rows, columns))
            # (b, n, d) -> (b, d, rows, columns), of the network's steps
            signal = cells.transpose(1, 2).reshape(cells.shape[0], -1, rows * self.patch, columns * self.patch)
        patches = self.embed(signal).flatten(2).transpose(1, 2)  # (b, width, rows, columns) -> (b, n, width)
        latents: Tensor = self.attend(patches, mask, rows, columns)
        return latents


class ViTDecoder(_ViT, Decoder):
    """Decoder of latents into images; the other arguments are the encoder's.

    Args:
        network: Decoder whose latents the patches are, such as `ResNetDecoder`; None for patches of pixels.

    Raises:
        UserError: Inconsistent sizes.
    """

    decodes = True

    def forward(
        self, latents: Tensor, mask: Tensor | None, grid: list[int], memory: list[Tensor] | None = None
    ) -> Tensor:
        """Decode latents `(b, n, width)` into images `(b, c, h, w)`."""
        rows, columns = grid
        x = self.to_pixels(self.attend(latents, mask, rows, columns))
        # (b, n, c * patch^2) -> (b, c * patch^2, rows, columns)
        signal = functional.pixel_shuffle(x.transpose(1, 2).reshape(x.shape[0], -1, rows, columns), self.patch)
        if self.network is not None:
            cells = signal.flatten(2).transpose(1, 2)  # (b, d, rows, columns) -> (b, n, d), of the network's steps
            inner = within_squares(mask, self.patch, rows, columns)
            return self.network(cells, inner, [rows * self.patch, columns * self.patch])  # type: ignore[no-any-return]
        return zero_invalid(signal, at_rate(along_first(mask, rows, 2), self.patch, 2))
