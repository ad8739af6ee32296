"""Vision transformers of a 1-D image tokenizer, with learned register tokens (TiTok, arXiv 2406.07550, section 3.2).

The encoder's input is the patches and N register tokens; the outputs at the registers are the latents. The decoder's
input is the N quantized latents and a mask token per patch; the outputs at the mask tokens are the patches. N doesn't
depend on the image size. Training defines the order of the tokens: tail drop sorts them by importance.
"""

from typing import Annotated

import torch
from torch import Tensor, nn
from torch.nn import functional

from varitok import UserError

from .contract import Decoder, Encoder, Network
from .layers.attention import Transformer
from .layers.cosine import CosineTransform, random_maps
from .layers.positions import grid_waves

__all__ = ["RegisterDecoder", "RegisterEncoder"]


class GridTable(nn.Module):
    """Learned vector per position of a grid; bicubic interpolation for other grid sizes.

    Args:
        start: Initial vectors, `(1, d, height, width)`.
    """

    def __init__(self, start: Tensor) -> None:
        super().__init__()
        self.height, self.width = int(start.shape[2]), int(start.shape[3])
        self.table = nn.Parameter(start)

    def forward(self, height: int, width: int) -> Tensor:
        """Return the vectors of a grid of height x width, `(1, height * width, d)`."""
        table: Tensor = self.table
        if height != self.height or width != self.width:
            table = functional.interpolate(table, [height, width], mode="bicubic", align_corners=False)
        return table.flatten(2).transpose(1, 2)  # (1, d, h, w) -> (1, h * w, d)


class _RegisterCodec(Network):
    """Layers of encoder and decoder."""

    decodes: bool

    def __init__(
        self,
        *,
        image_size: int,
        patch: int,
        tokens: int,
        width: int,
        depth: Annotated[int, "[0, 1000]"],
        heads: int,
        channels: int = 3,
        shortcut: bool = False,
        cosines: Annotated[int, "[0, inf)", "0 starts all registers alike"] = 0,
        class_token: bool = False,
    ) -> None:
        if image_size % patch:
            raise UserError(f"codec.encoder.patch={patch}: does not divide the image size {image_size}")
        side = image_size // patch
        super().__init__(width=width, downsample=(patch, patch), channels=channels, tokens=tokens, sides=(side, side))
        if tokens * cosines > channels * image_size**2:
            raise UserError(f"codec.encoder.cosines={cosines}: {tokens} x {cosines} is more than an image has values")
        self.patch = patch
        if cosines or not self.decodes:
            self.embed = nn.Conv2d(channels, width, patch, stride=patch)
        self.registers = nn.Parameter(torch.randn(1, tokens, width) * 0.02)
        if self.decodes:
            self.canvas = nn.Parameter(torch.randn(1, 1, width) * 0.02)
        self.positions = GridTable(grid_waves(width, side, side))
        self.class_token = nn.Parameter(torch.randn(1, 1, width) * 0.02) if class_token else None
        self.first_norm: nn.Module = nn.LayerNorm(width) if class_token else nn.Identity()
        self.shortcut: GridTable | None = None
        if shortcut:
            weights = torch.randn(1, tokens, side, side)
            self.shortcut = GridTable(weights / tokens**0.5 if self.decodes else weights * side)
        self.cosines: CosineTransform | None = None
        if cosines:
            self.cosines = CosineTransform([channels, image_size, image_size], tokens * cosines)
            self.cosine_maps = nn.Parameter(random_maps(tokens, cosines, width, self.decodes))
        self.transformer = Transformer(width, depth, heads)
        self.norm = nn.Identity() if shortcut or cosines else nn.LayerNorm(width)
        if self.decodes:
            self.to_pixels = nn.Linear(width, channels * patch * patch)
            # Patches are decoded independently; a small convolution, the identity at first, smooths their borders.
            self.out = nn.Conv2d(channels, channels, 3, padding=1)
            nn.init.dirac_(self.out.weight)
            nn.init.zeros_(self.out.bias)  # type: ignore[arg-type]

    def with_class(self, tokens: Tensor) -> Tensor:
        """Append the class token, if any, to tokens `(b, n, width)`, and apply the first norm."""
        if self.class_token is not None:
            tokens = torch.cat([tokens, self.class_token.expand(tokens.shape[0], -1, -1)], dim=1)
        normed: Tensor = self.first_norm(tokens)
        return normed


class RegisterEncoder(_RegisterCodec, Encoder):
    """Encoder of images into `tokens` latents.

    Args:
        image_size: Side of the training images, in pixels; positions are interpolated for other sizes.
        patch: Side of a patch, in pixels; divides the sides of every image.
        tokens: Number of latents, N.
        width: Width of the transformer and of the latents.
        depth: Blocks of the transformer.
        heads: Attention heads per block.
        channels: Channels of the image.
        shortcut: Add a linear path in parallel to attention: each register starts as its own learned weighted mean of
            all patches, and there is no final norm. Codecs trained before `cosines`, which learn faster, have it.
        cosines: Coefficients of the image's DCT from which each register starts, by a linear map of its own: the first
            token from the first ones, in the order of their expected size (`CosineTransform`), the next from the next;
            and there is no final norm. Attention alone learns slowly what to attend to (ours, not in TiTok; figures
            in ARCHITECTURE.md). 0: all images' registers start alike.
        class_token: A learned token beside the patches and a norm before the transformer, as in CLIP and in the
            authors' code.

    Raises:
        UserError: The patch doesn't divide `image_size`, or there are more cosines than values of an image.
    """

    decodes = False

    def forward(self, signal: Tensor, mask: Tensor | None = None, memory: list[Tensor] | None = None) -> Tensor:
        """Return the latents `(b, N, width)` of images `(b, c, h, w)`."""
        patches = self.embed(signal)
        height, width = patches.shape[-2], patches.shape[-1]
        patches = patches.flatten(2).transpose(1, 2)  # (b, width, h, w) -> (b, h * w, width)
        registers = self.registers.expand(signal.shape[0], -1, -1)
        if self.shortcut is not None:
            registers = registers + self.shortcut(height, width).transpose(1, 2) @ patches / (height * width)
        if self.cosines is not None:
            registers = registers + self.cosines.to_tokens(signal, self.cosine_maps)
        tokens = self.with_class(torch.cat([registers, patches + self.positions(height, width)], dim=1))
        latents: Tensor = self.norm(self.transformer(tokens)[:, : self.tokens])
        return latents


class RegisterDecoder(_RegisterCodec, Decoder):
    """Decoder of latents into images; its arguments are the encoder's.

    With `shortcut`, each patch starts as its own learned weighted sum of the latents. With `cosines`, the latents give
    coefficients of a DCT, whose image the transformer reads and corrects.
    """

    decodes = True

    def forward(
        self, latents: Tensor, mask: Tensor | None, grid: list[int], memory: list[Tensor] | None = None
    ) -> Tensor:
        """Decode latents `(b, k, width)`, k from 1 to N, into images `(b, c, h, w)`."""
        height, width = self.rows, self.columns
        if len(grid) > 0:
            height, width = grid[0], grid[1]
        b, k = latents.shape[0], latents.shape[1]
        canvas = (self.canvas + self.positions(height, width)).expand(b, -1, -1)
        there = latents if mask is None else latents * mask.unsqueeze(-1)
        if self.shortcut is not None:
            canvas = canvas + self.shortcut(height, width)[:, :, :k] @ there
        draft: Tensor | None = None
        if self.cosines is not None:
            size = [self.channels, height * self.patch, width * self.patch]
            draft = self.cosines.from_tokens(there, self.cosine_maps, size)
            canvas = canvas + self.embed(draft).flatten(2).transpose(1, 2)  # (b, width, h, w) -> (b, h * w, width)
        tokens = self.with_class(torch.cat([latents + self.registers[:, :k], canvas], dim=1))
        if mask is not None:
            mask = torch.cat([mask, mask.new_ones((b, tokens.shape[1] - k))], dim=1)
        painted = self.norm(self.transformer(tokens, mask)[:, k : k + height * width])
        # (b, height * width, c * patch^2) -> (b, c * patch^2, height, width)
        pixels = self.to_pixels(painted).transpose(1, 2).reshape(b, -1, height, width)
        signal: Tensor = self.out(functional.pixel_shuffle(pixels, self.patch))
        return signal if draft is None else signal + draft
