"""Block-causal transformers that encode each block of a clip's frames as ordered tokens.

The encoder's input per block is the tubelets of a few frames and N learned queries. A block's tokens attend to each
other and to all earlier blocks (AdapTok, arXiv 2505.17011, section 3.1; ElasticTok, arXiv 2410.08368, section 3). The
outputs at the queries are the latents. The decoder's input per block is the kept latents and a mask token per tubelet.
Later blocks may have fewer tokens than the first (LanDiff, arXiv 2503.04606, section 3.1: I-frames and P-frames).
"""

import math
from typing import Annotated

import torch
from torch import Tensor, nn

from varitok import UserError

from .contract import Decoder, Encoder, Network
from .layers.convolution import prepend_context
from .layers.cosine import CosineTransform, random_maps
from .layers.sequence import SequenceTransformer
from .register_vit import GridTable
from .tubelet import from_tubelets, to_tubelets

__all__ = ["BlockQueryDecoder", "BlockQueryEncoder"]


class _BlockQueries(Network):
    """Layers of encoder and decoder."""

    decodes: bool

    def __init__(
        self,
        *,
        image_size: int | tuple[int, int],
        patch: tuple[int, int, int],
        tokens: int,
        width: int,
        depth: Annotated[int, "[0, 1000]"],
        heads: int,
        hidden: int | None = None,
        window: int | None = None,
        causal: bool = True,
        channels: int = 3,
        shortcut: bool = False,
        cosines: Annotated[int, "[0, inf)", "0 starts all queries alike"] = 0,
        later_tokens: int | None = None,
    ) -> None:
        first, high, wide = patch
        height, across = (image_size, image_size) if isinstance(image_size, int) else image_size
        if height % high or across % wide:
            raise UserError(f"codec: patch={list(patch)} does not divide the image size {image_size}")
        if later_tokens is not None and later_tokens > tokens:
            raise UserError(f"codec: later_tokens={later_tokens} should be at most tokens={tokens}")
        if tokens * cosines > channels * first * height * across:
            raise UserError(f"codec.encoder.cosines={cosines}: {tokens} x {cosines} is more than a block has values")
        super().__init__(
            width=width,
            downsample=(first, high, wide),
            channels=channels,
            causal=causal,
            causal_pad=first - 1 if causal else 0,
            tokens=tokens,
            later_tokens=later_tokens,
            sides=(height // high, across // wide),
        )
        self.patch = (first, high, wide)
        self.slot = 0  # in the memory: whether there was an earlier block
        self.pixels = channels * first * high * wide
        self.queries = nn.Parameter(torch.randn(1, tokens, width) * 0.02)
        self.canvas = nn.Parameter(torch.randn(1, 1, width) * 0.02) if self.decodes else None
        # Scaled so that the initial weighted mean (encoder) or sum (decoder) has the variance of its inputs.
        size = tokens**-0.5 if self.decodes else math.sqrt(self.rows * self.columns)
        start = torch.randn(1, tokens, self.rows, self.columns)
        self.shortcut = GridTable(start * size) if shortcut else None
        self.cosines: CosineTransform | None = None
        if cosines:
            self.cosines = CosineTransform([channels, first, height, across], tokens * cosines)
            self.cosine_maps = nn.Parameter(random_maps(tokens, cosines, width, self.decodes))
            if self.decodes:
                self.embed = nn.Linear(self.pixels, width)
        linear = shortcut or cosines > 0
        scale = 0.1 if linear else 1.0
        self.transformer = SequenceTransformer(
            width, depth, heads, hidden, causal, window, layer_scale=scale, qk_norm=True, axes=3
        )
        self.norm = nn.Identity() if linear else nn.LayerNorm(width)
        self.map = nn.Linear(width, self.pixels) if self.decodes else nn.Linear(self.pixels, width)
        nn.init.zeros_(self.map.bias)

    def own(self, placed: Tensor, frame: int, k: int, memory: list[Tensor] | None) -> Tensor | None:
        """Return which of the first k ordered tokens each block has, bool `(b * blocks, k)`; None if all have all.

        Args:
            placed: Placed tokens, `(b, blocks * frame, width)`.
            frame: Placed tokens per block.
            k: Number of ordered tokens.
            memory: State of earlier chunks.
        """
        if self.later_tokens == self.tokens:
            return None
        ones = torch.ones_like(placed[:, :, 0]).reshape(placed.shape[0], -1, frame)[:, :, 0]
        if memory is None:
            before = torch.cat([torch.zeros_like(ones[:, :1]), ones], dim=1)
        else:
            before = prepend_context(ones, memory, self.slot, 1, 1)
        first = before[:, :-1].reshape(-1, 1) == 0
        numbers = torch.arange(k, device=placed.device)
        return (numbers < self.later_tokens) | (first & (numbers < self.tokens))

    def transform(
        self,
        free: Tensor,
        placed: Tensor,
        kept: Tensor | None,
        rows: int,
        columns: int,
        memory: list[Tensor] | None,
    ) -> Tensor:
        """Transform the blocks of a clip: in each, the ordered tokens followed by the placed ones.

        Args:
            free: Ordered tokens, `(b * blocks, k, width)`.
            placed: Placed tokens, `(b, blocks * rows * columns, width)`.
            kept: bool `(b * blocks, k)`, True for valid ordered tokens; None for all.
            rows: Rows of tubelets.
            columns: Columns of tubelets.
            memory: State of earlier chunks.

        Returns:
            `(b * blocks, k + rows * columns, width)`.
        """
        b, frame = placed.shape[0], rows * columns
        k = free.shape[1]
        x = torch.cat([free, placed.reshape(-1, frame, self.width)], dim=1)  # (b * blocks, k + frame, width)
        mask: Tensor | None = None
        if kept is not None:
            mask = torch.cat([kept, torch.ones_like(x[:, k:, 0], dtype=torch.bool)], dim=1).reshape(b, -1)
        x = self.transformer(x.reshape(b, -1, self.width), mask, memory, rows, columns, k)
        y: Tensor = self.norm(x.reshape(-1, k + frame, self.width))  # (b, n, width) -> (b * blocks, k + frame, width)
        return y


class BlockQueryEncoder(_BlockQueries, Encoder):
    """Encoder of each block of frames into `tokens` latents.

    Args:
        image_size: Side, or height and width, of the training frames, in pixels; other sizes work as well, since
            positions are rotary.
        patch: Frames of a block, and rows and columns of a tubelet, in pixels.
        tokens: Latents per block, N.
        width: Width of the transformer and of the latents.
        depth: Blocks of the transformer.
        heads: Attention heads per block of the transformer.
        hidden: Hidden width of the perceptrons; four times the width if None.
        window: Attention window in blocks of frames, including the token's own; None for all.
        causal: Whether tokens attend to no later block.
        channels: Channels of the clip.
        shortcut: Add a linear path in parallel to attention, as in `RegisterEncoder`: each query starts as its own
            learned weighted mean of its block's tubelets, and there is no final norm.
        cosines: Coefficients of its block's DCT from which each query starts, as in `RegisterEncoder`.
        later_tokens: Tokens of each block but a clip's first; equal to `tokens` if None. Latents beyond them are 0 and
            masked.

    Raises:
        UserError: Inconsistent sizes.
    """

    decodes = False

    def forward(self, signal: Tensor, mask: Tensor | None = None, memory: list[Tensor] | None = None) -> Tensor:
        """Return the latents of each block of the clips, `(b * blocks, N, width)`."""
        rows, columns = signal.shape[3] // self.patch[1], signal.shape[4] // self.patch[2]
        patches = self.map(to_tubelets(signal, self.patch))
        blocks = patches.reshape(-1, rows * columns, self.width)
        queries = self.queries.expand(blocks.shape[0], -1, -1)
        if self.shortcut is not None:
            queries = queries + self.shortcut(rows, columns).transpose(1, 2) @ blocks / (rows * columns)
        if self.cosines is not None:
            # (b, c, t, h, w) -> (b, blocks, c, first, h, w) -> (b * blocks, c, first, h, w)
            b, c, _, height, width = signal.shape
            parts = signal.reshape(b, c, -1, self.patch[0], height, width).transpose(1, 2).flatten(0, 1)
            queries = queries + self.cosines.to_tokens(parts, self.cosine_maps)
        own = self.own(patches, rows * columns, self.tokens, memory)
        latents: Tensor = self.transform(queries, patches, own, rows, columns, memory)[:, : self.tokens]
        return latents if own is None else latents * own.unsqueeze(-1)


class BlockQueryDecoder(_BlockQueries, Decoder):
    """Decoder of each block's kept latents into clips; its arguments are the encoder's."""

    decodes = True

    def forward(
        self, latents: Tensor, mask: Tensor | None, grid: list[int], memory: list[Tensor] | None = None
    ) -> Tensor:
        """Decode latents `(b * blocks, k, width)` into clips; k is from 1 to N, and N with a memory."""
        rows, columns = self.rows, self.columns
        if len(grid) > 1:
            rows, columns = grid[1], grid[2]
        k = latents.shape[1]
        assert self.canvas is not None
        canvas = self.canvas.expand(latents.shape[0], rows * columns, -1)
        own = self.own(canvas.reshape(-1, grid[0] * rows * columns, self.width), rows * columns, k, memory)
        if own is not None:
            mask = own if mask is None else mask & own
        there = latents if mask is None else latents * mask.unsqueeze(-1)
        if self.shortcut is not None:
            canvas = canvas + self.shortcut(rows, columns)[:, :, :k] @ there
        draft: Tensor | None = None
        if self.cosines is not None:
            size = [self.channels, self.patch[0], rows * self.patch[1], columns * self.patch[2]]
            # (b * blocks, c, first, h, w) -> (b * blocks, rows * columns, pixels)
            draft = to_tubelets(self.cosines.from_tokens(there, self.cosine_maps, size), self.patch)
            canvas = canvas + self.embed(draft)
        placed = canvas.reshape(-1, grid[0] * rows * columns, self.width)
        painted = self.transform(latents + self.queries[:, :k], placed, mask, rows, columns, memory)[:, k:]
        x = self.map(painted)
        if draft is not None:
            x = x + draft
        x = x.reshape(-1, grid[0] * rows * columns, self.pixels)
        return from_tubelets(x, self.patch, self.channels, rows, columns)
