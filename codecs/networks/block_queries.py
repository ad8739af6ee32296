"""Transformers that read each block of a clip's frames into tokens of its own, in the order of their importance.

A block has the tubelets of a few frames and N queries; a block's tokens attend to each other and to those of the blocks
before (AdapTok, arXiv 2505.17011, section 3.1; ElasticTok, arXiv 2410.08368, section 3). The queries leave as latents.
The decoder sees the kept latents of each block, and a canvas that becomes its tubelets. Blocks after the first,
which attend to earlier ones, may have fewer tokens (LanDiff, arXiv 2503.04606, section 3.1: I-frames and P-frames).
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from varitok import UserError

from .contract import Decoder, Encoder, Network
from .convolution import prepend_context
from .register_vit import GridTable
from .sequence import SequenceTransformer
from .tubelet import from_tubelets, to_tubelets, tubelet

__all__ = ["BlockQueryDecoder", "BlockQueryEncoder"]


class _BlockQueries(Network):
    """What both directions share, which is all but the direction."""

    decodes: bool

    def __init__(
        self,
        *,
        image_size: int | Sequence[int],
        patch: Sequence[int],
        tokens: int,
        width: int,
        depth: int,
        heads: int,
        hidden: int | None = None,
        window: int | None = None,
        causal: bool = True,
        channels: int = 3,
        shortcut: bool = False,
        later_tokens: int | None = None,
    ) -> None:
        first, high, wide = tubelet(patch)
        height, across = (image_size, image_size) if isinstance(image_size, int) else image_size
        if height % high or across % wide:
            raise UserError(f"codec: patch={list(patch)} does not divide the image size {image_size}")
        if tokens < 1:
            raise UserError(f"codec: tokens={tokens} should be at least 1")
        if later_tokens is not None and not 1 <= later_tokens <= tokens:
            raise UserError(f"codec: later_tokens={later_tokens} should be from 1 to tokens={tokens}")
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
        self.slot = 0  # for whether a block came before
        self.pixels = channels * first * high * wide
        self.queries = nn.Parameter(torch.randn(1, tokens, width) * 0.02)
        self.canvas = nn.Parameter(torch.randn(1, 1, width) * 0.02) if self.decodes else None
        # At the start a mean, or a sum, is as large as one of what it is of.
        size = tokens**-0.5 if self.decodes else math.sqrt(self.rows * self.columns)
        start = torch.randn(1, tokens, self.rows, self.columns)
        self.shortcut = GridTable(start * size) if shortcut else None
        scale = 0.1 if shortcut else 1.0
        self.transformer = SequenceTransformer(
            width, depth, heads, hidden, causal, window, layer_scale=scale, qk_norm=True, axes=3
        )
        self.norm = nn.Identity() if shortcut else nn.LayerNorm(width)
        self.map = nn.Linear(width, self.pixels) if self.decodes else nn.Linear(self.pixels, width)
        nn.init.zeros_(self.map.bias)

    def own(self, placed: Tensor, frame: int, k: int, memory: list[Tensor] | None) -> Tensor | None:
        """Mark those of the first k tokens that blocks have, bool `(b * blocks, k)`; None if all have all.

        Args:
            placed: `(b, blocks * frame, width)`.
            frame: Tokens of a block that have a place.
            k: How many are asked about.
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
        """Transform the blocks of a clip, each `free` tokens, and after them the placed ones.

        Args:
            free: `(b * blocks, k, width)`.
            placed: `(b, blocks * rows * columns, width)`.
            kept: bool `(b * blocks, k)`, which of the free ones are there; all if None.
            rows: Rows of tubelets.
            columns: Columns of tubelets.
            memory: State of earlier chunks.

        Returns:
            `(b * blocks, k + rows * columns, width)`.
        """
        b, frame = placed.shape[0], rows * columns
        k = free.shape[1]
        x = torch.cat([free, placed.reshape(-1, frame, self.width)], dim=1)
        mask: Tensor | None = None
        if kept is not None:
            mask = torch.cat([kept, torch.ones_like(x[:, k:, 0], dtype=torch.bool)], dim=1).reshape(b, -1)
        x = self.transformer(x.reshape(b, -1, self.width), mask, memory, rows, columns, k)
        y: Tensor = self.norm(x.reshape(-1, k + frame, self.width))
        return y


class BlockQueryEncoder(_BlockQueries, Encoder):
    """Reads each block of frames into `tokens` latents.

    Args:
        image_size: Side, or height and width, of the frames of training, in pixels; rotary positions take any other
            too.
        patch: Frames of a block, and rows and columns of a tubelet.
        tokens: Latents of a block, N.
        width: Width of the transformer and of the latents.
        depth: Its blocks.
        heads: Heads of each.
        hidden: Hidden width of the perceptrons; four times the width if None.
        window: Blocks of frames that a token sees, its own counted; None for all.
        causal: A token sees none of the blocks after its own.
        channels: Channels of the clip.
        shortcut: Lay a linear path beside attention, as in `RegisterEncoder`: each query starts from its own learned
            mean of its block's tubelets, and nothing is normalized on the way out.
        later_tokens: Tokens of each block but a clip's first; equal to `tokens` if None. Latents beyond them are 0 and
            masked.

    Raises:
        UserError: Sizes that don't fit each other.
    """

    decodes = False

    def forward(self, signal: Tensor, mask: Tensor | None = None, memory: list[Tensor] | None = None) -> Tensor:
        """Return the latents of clips' blocks, `(b * blocks, N, width)`."""
        rows, columns = signal.shape[3] // self.patch[1], signal.shape[4] // self.patch[2]
        patches = self.map(to_tubelets(signal, self.patch))
        blocks = patches.reshape(-1, rows * columns, self.width)
        queries = self.queries.expand(blocks.shape[0], -1, -1)
        if self.shortcut is not None:
            queries = queries + self.shortcut(rows, columns).transpose(1, 2) @ blocks / (rows * columns)
        own = self.own(patches, rows * columns, self.tokens, memory)
        latents: Tensor = self.transform(queries, patches, own, rows, columns, memory)[:, : self.tokens]
        return latents if own is None else latents * own.unsqueeze(-1)


class BlockQueryDecoder(_BlockQueries, Decoder):
    """Makes clips from kept latents of each block; its arguments are the encoder's."""

    decodes = True

    def forward(
        self, latents: Tensor, mask: Tensor | None, grid: list[int], memory: list[Tensor] | None = None
    ) -> Tensor:
        """Decode latents `(b * blocks, k, width)`, k from 1 to N, to clips; with a memory k is N."""
        rows, columns = self.rows, self.columns
        if len(grid) > 1:
            rows, columns = grid[1], grid[2]
        k = latents.shape[1]
        assert self.canvas is not None
        canvas = self.canvas.expand(latents.shape[0], rows * columns, -1)
        own = self.own(canvas.reshape(-1, grid[0] * rows * columns, self.width), rows * columns, k, memory)
        if own is not None:
            mask = own if mask is None else mask & own
        if self.shortcut is not None:
            there = latents if mask is None else latents * mask.unsqueeze(-1)
            canvas = canvas + self.shortcut(rows, columns)[:, :, :k] @ there
        placed = canvas.reshape(-1, grid[0] * rows * columns, self.width)
        painted = self.transform(latents + self.queries[:, :k], placed, mask, rows, columns, memory)[:, k:]
        x = self.map(painted).reshape(-1, grid[0] * rows * columns, self.pixels)
        return from_tubelets(x, self.patch, self.channels, rows, columns)
