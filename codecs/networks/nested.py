"""Video networks whose tokens concatenate a square of latents, for the hierarchical codebooks of `hierarchy.py`.

The wrapped network's latents are called cells. Each of `halvings` steps concatenates 2 x 2 cells, so that a token is
`4 ** halvings` cells in quadtree (Z) order. Each quarter of a token, and each quarter of a quarter, is then a square of
neighboring cells. The layers of `bottlenecks/hierarchy.py` code the means of such groups.
"""

from typing import Annotated

from torch import Tensor

from .contract import Decoder, Encoder, Network

__all__ = ["NestedDecoder", "NestedEncoder"]


def _fold(x: Tensor) -> Tensor:
    """Concatenate the channels of each 2 x 2 square: `(b, t, h, w, d)` -> `(b, t, h / 2, w / 2, 4 * d)`."""
    b, t, rows, columns, d = x.shape
    x = x.reshape(b, t, rows // 2, 2, columns // 2, 2, d).permute(0, 1, 2, 4, 3, 5, 6)
    return x.reshape(b, t, rows // 2, columns // 2, 4 * d)


def _unfold(x: Tensor) -> Tensor:
    """Invert `_fold`: `(b, t, h, w, 4 * d)` -> `(b, t, 2 * h, 2 * w, d)`."""
    b, t, rows, columns, d = x.shape
    x = x.reshape(b, t, rows, columns, 2, 2, d // 4).permute(0, 1, 2, 4, 3, 5, 6)
    return x.reshape(b, t, rows * 2, columns * 2, d // 4)


class _Nested(Network):
    """A network of cells, with the width and the downsampling factors of tokens.

    Args:
        network: Encoder or decoder whose latents are cells.
        halvings: Times that rows and columns of cells are halved, to those of tokens.
    """

    def __init__(self, network: Network, halvings: Annotated[int, "[1, 1000]"]) -> None:
        super().__init__(
            width=network.width << 2 * halvings,
            downsample=(network.downsample[0], *(side << halvings for side in network.downsample[1:])),
            channels=network.channels,
            causal=network.causal,
            causal_pad=network.causal_pad,
        )
        self.network = network
        self.halvings = halvings
        self.cell = network.downsample


class NestedEncoder(_Nested, Encoder):
    """Encoder of clips into tokens, each a concatenation of the wrapped encoder's latents."""

    def forward(self, signal: Tensor, mask: Tensor | None = None, memory: list[Tensor] | None = None) -> Tensor:
        """Return the latents of clips; the token mask selects frames, so it is the wrapped encoder's mask too."""
        cells: Tensor = self.network(signal, mask, memory)
        rows, columns = signal.shape[3] // self.cell[1], signal.shape[4] // self.cell[2]
        x = cells.reshape(cells.shape[0], -1, rows, columns, cells.shape[2])  # (b, n, d) -> (b, t, rows, columns, d)
        for _ in range(self.halvings):
            x = _fold(x)
        return x.flatten(1, 3)


class NestedDecoder(_Nested, Decoder):
    """Decoder of tokens into clips, the mirror of `NestedEncoder`."""

    def forward(
        self, latents: Tensor, mask: Tensor | None, grid: list[int], memory: list[Tensor] | None = None
    ) -> Tensor:
        """Decode latents of a grid of tokens into clips."""
        x = latents.reshape([latents.shape[0]] + grid + [latents.shape[2]])  # noqa: RUF005 (TorchScript)
        for _ in range(self.halvings):
            x = _unfold(x)
        clips: Tensor = self.network(x.flatten(1, 3), mask, [grid[0], x.shape[2], x.shape[3]], memory)
        return clips
