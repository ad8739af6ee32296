"""Networks whose tokens concatenate a square of latents, for the layers of codes of `bottlenecks/hierarchy.py`.

The wrapped network's latents are called cells. Each of `halvings` steps concatenates `side` x `side` cells, row by row.
Several steps of 2 x 2 arrange a token's cells in quadtree (Z) order: each quarter of a token, and each quarter of a
quarter, is a square of neighboring cells, whose mean a layer of `hierarchy` codes. One step of a larger side keeps a
token's cells row by row, as `multi_scale` resizes them.
"""

from typing import Annotated

from torch import Tensor

from .contract import Decoder, Encoder, Network
from .layers.convolution import within_squares

__all__ = ["NestedDecoder", "NestedEncoder"]


def _fold(x: Tensor, side: int) -> Tensor:
    """Concatenate the channels of each square: `(b, t, h, w, d)` -> `(b, t, h / side, w / side, side ** 2 * d)`."""
    b, t, rows, columns, d = x.shape
    x = x.reshape(b, t, rows // side, side, columns // side, side, d).permute(0, 1, 2, 4, 3, 5, 6)
    return x.reshape(b, t, rows // side, columns // side, side * side * d)


def _unfold(x: Tensor, side: int) -> Tensor:
    """Invert `_fold`."""
    b, t, rows, columns, d = x.shape
    x = x.reshape(b, t, rows, columns, side, side, d // (side * side)).permute(0, 1, 2, 4, 3, 5, 6)
    return x.reshape(b, t, rows * side, columns * side, d // (side * side))


class _Nested(Network):
    """A network of cells, with the width and the downsampling factors of tokens.

    Args:
        network: Encoder or decoder of images or clips, whose latents are cells.
        halvings: Times that rows and columns of cells are divided by `side`, to those of tokens.
        side: Rows and columns of cells that each of these steps concatenates.
        direct: See `Network`; a linear map would be of all of a token's cells.
    """

    def __init__(
        self,
        network: Network,
        halvings: Annotated[int, "[1, 1000]"],
        side: Annotated[int, "[2, 1000]"] = 2,
        direct: bool = False,
    ) -> None:
        square = side**halvings
        super().__init__(
            width=network.width * square**2,
            downsample=(*network.downsample[:-2], *(step * square for step in network.downsample[-2:])),
            channels=network.channels,
            causal=network.causal,
            causal_pad=network.causal_pad,
            direct=direct,
        )
        self.network = network
        self.halvings = halvings
        self.side = side
        self.square = square
        self.cell = network.downsample
        self.image = len(network.downsample) == 2

    def cell_mask(self, mask: Tensor | None, rows: int, columns: int) -> Tensor | None:
        """Return the cells' mask, given that of `rows` x `columns` tokens; frames, whose cells are whole, keep it."""
        return within_squares(mask, self.square, rows, columns) if self.image else mask


class NestedEncoder(_Nested, Encoder):
    """Encoder of images or clips into tokens, each a concatenation of the wrapped encoder's latents."""

    def forward(self, signal: Tensor, mask: Tensor | None = None, memory: list[Tensor] | None = None) -> Tensor:
        """Return the latents of images or clips."""
        rows, columns = signal.shape[-2] // self.cell[-2], signal.shape[-1] // self.cell[-1]
        here = self.cell_mask(mask, rows // self.square, columns // self.square)
        cells: Tensor = self.network(signal, here, memory)
        x = cells.reshape(cells.shape[0], -1, rows, columns, cells.shape[2])  # (b, n, d) -> (b, t, rows, columns, d)
        for _ in range(self.halvings):
            x = _fold(x, self.side)
        return x.flatten(1, 3)


class NestedDecoder(_Nested, Decoder):
    """Decoder of tokens into images or clips, the mirror of `NestedEncoder`."""

    def forward(
        self, latents: Tensor, mask: Tensor | None, grid: list[int], memory: list[Tensor] | None = None
    ) -> Tensor:
        """Decode latents of a grid of tokens into images or clips."""
        rows, columns = grid[-2], grid[-1]
        x = latents.reshape(latents.shape[0], -1, rows, columns, latents.shape[2])  # (b, n, d) -> (b, t, rows, ...)
        for _ in range(self.halvings):
            x = _unfold(x, self.side)
        here = self.cell_mask(mask, rows, columns)
        signal: Tensor = self.network(x.flatten(1, 3), here, grid[:-2] + [x.shape[2], x.shape[3]], memory)  # noqa: RUF005
        return signal
