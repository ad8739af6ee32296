"""A 1-D image tokenizer's networks: vision transformers that read an image into register tokens and back.

TiTok (arXiv 2406.07550, section 3.2): the encoder sees patches and N latent tokens and keeps the latter; the decoder
sees a grid of one repeated mask token and the N quantized tokens and keeps the former. N doesn't follow the image's
size, and the order of the tokens means what training makes it mean: with tail drop, importance.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional

from varitok import UserError

from .attention import Transformer
from .contract import Decoder, Encoder

__all__ = ["RegisterDecoder", "RegisterEncoder"]


def _waves(width: int, side: int) -> Tensor:
    """Return sines and cosines of both coordinates, `(1, width, side, side)`, as initial positions."""
    quarter = width // 4
    angles = torch.arange(side)[:, None] / 100 ** (torch.arange(quarter) / quarter)
    axis = torch.cat([angles.sin(), angles.cos()], dim=1).T
    grid = torch.cat([axis[:, :, None].expand(-1, -1, side), axis[:, None, :].expand(-1, side, -1)])
    return functional.pad(grid, (0, 0, 0, 0, 0, width - len(grid)))[None]


class GridTable(nn.Module):
    """A learned vector for each place of a grid, interpolated (bicubic) where the grid has another size.

    Args:
        start: The vectors at the start, `(1, d, height, width)`.
    """

    def __init__(self, start: Tensor) -> None:
        super().__init__()
        self.height, self.width = int(start.shape[2]), int(start.shape[3])
        self.table = nn.Parameter(start)

    def forward(self, height: int, width: int) -> Tensor:
        """Return the vectors of a grid, `(1, height * width, d)`."""
        table: Tensor = self.table
        if height != self.height or width != self.width:
            table = functional.interpolate(table, [height, width], mode="bicubic", align_corners=False)
        return table.flatten(2).transpose(1, 2)


class RegisterEncoder(Encoder):
    """Reads an image into `tokens` latents.

    Args:
        image_size: Side of the images of training, in pixels; others are read with interpolated positions.
        patch: Side of a patch; divides every image's sides.
        tokens: Latents, N.
        width: Width of the transformer.
        depth: Its blocks.
        heads: Its heads.
        channels: Channels of the image.
        shortcut: Lay a linear path beside attention: each register starts from its own learned mean of all patches,
            and nothing is normalized on the way out. Attention alone is slow to learn where
            to look (ARCHITECTURE.md has the figures; ours, not in TiTok).

    Raises:
        UserError: The patch doesn't divide `image_size`.
    """

    def __init__(
        self,
        *,
        image_size: int,
        patch: int,
        tokens: int,
        width: int,
        depth: int,
        heads: int,
        channels: int = 3,
        shortcut: bool = False,
    ) -> None:
        if image_size % patch:
            raise UserError(f"codec.encoder.patch={patch}: does not divide the image size {image_size}")
        side = image_size // patch
        super().__init__(width=width, downsample=(patch, patch), channels=channels, tokens=tokens, sides=(side, side))
        self.embed = nn.Conv2d(channels, width, patch, stride=patch)
        self.positions = GridTable(_waves(width, side))
        self.registers = nn.Parameter(torch.randn(1, tokens, width) * 0.02)
        self.shortcut = GridTable(torch.randn(1, tokens, side, side) * side) if shortcut else None
        self.transformer = Transformer(width, depth, heads)
        self.norm = nn.Identity() if shortcut else nn.LayerNorm(width)

    def forward(self, signal: Tensor, mask: Tensor | None = None, memory: list[Tensor] | None = None) -> Tensor:
        """Return the latents of images."""
        patches = self.embed(signal)
        height, width = patches.shape[-2], patches.shape[-1]
        patches = patches.flatten(2).transpose(1, 2)
        registers = self.registers.expand(signal.shape[0], -1, -1)
        if self.shortcut is not None:
            registers = registers + self.shortcut(height, width).transpose(1, 2) @ patches / (height * width)
        patches = patches + self.positions(height, width)
        latents: Tensor = self.norm(self.transformer(torch.cat([registers, patches], dim=1))[:, : self.tokens])
        return latents


class RegisterDecoder(Decoder):
    """Paints an image from latents; its arguments are the encoder's.

    With `shortcut` each patch starts from its own learned sum of the latents.
    """

    def __init__(
        self,
        *,
        image_size: int,
        patch: int,
        tokens: int,
        width: int,
        depth: int,
        heads: int,
        channels: int = 3,
        shortcut: bool = False,
    ) -> None:
        side = image_size // patch
        super().__init__(width=width, downsample=(patch, patch), channels=channels, tokens=tokens, sides=(side, side))
        self.patch = patch
        self.registers = nn.Parameter(torch.randn(1, tokens, width) * 0.02)
        self.canvas = nn.Parameter(torch.randn(1, 1, width) * 0.02)
        self.positions = GridTable(_waves(width, side))
        self.shortcut = GridTable(torch.randn(1, tokens, side, side) / tokens**0.5) if shortcut else None
        self.transformer = Transformer(width, depth, heads)
        self.norm = nn.Identity() if shortcut else nn.LayerNorm(width)
        self.to_pixels = nn.Linear(width, channels * patch * patch)
        # Patches are painted apart from each other; one small convolution mends their seams.
        self.out = nn.Conv2d(channels, channels, 3, padding=1)
        nn.init.dirac_(self.out.weight)
        nn.init.zeros_(self.out.bias)  # type: ignore[arg-type]

    def forward(
        self, latents: Tensor, mask: Tensor | None, grid: list[int], memory: list[Tensor] | None = None
    ) -> Tensor:
        """Return the images that latents `(b, k, width)` stand for, k from 1 to N."""
        height, width = self.rows, self.columns
        if len(grid) > 0:
            height, width = grid[0], grid[1]
        b, k = latents.shape[0], latents.shape[1]
        canvas = (self.canvas + self.positions(height, width)).expand(b, -1, -1)
        if self.shortcut is not None:
            there = latents if mask is None else latents * mask.unsqueeze(-1)
            canvas = canvas + self.shortcut(height, width)[:, :, :k] @ there
        if mask is not None:
            mask = torch.cat([mask, mask.new_ones((b, height * width))], dim=1)
        tokens = torch.cat([latents + self.registers[:, :k], canvas], dim=1)
        painted = self.norm(self.transformer(tokens, mask)[:, k:])
        pixels = self.to_pixels(painted).transpose(1, 2).reshape(b, -1, height, width)
        signal: Tensor = self.out(functional.pixel_shuffle(pixels, self.patch))
        return signal
