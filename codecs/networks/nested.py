"""Networks of frames whose tokens each cover a square of cells: what a hierarchy of codebooks is about.

A network's latents are cells of a grid. `halvings` times, two rows and two columns become one, so that a token holds
`4 ** halvings` cells, in the order in which they nest: the cells of each quarter of its square follow each other, and
so do those of each quarter of a quarter. The mean over a run of cells is then one over neighbors, which is what the
layers of `bottlenecks/hierarchy.py` code.
"""

from torch import Tensor

from varitok import require_min

from .contract import Decoder, Encoder, Network

__all__ = ["NestedDecoder", "NestedEncoder"]


def _fold(x: Tensor) -> Tensor:
    """Put each two rows and two columns of `(b, t, rows, columns, d)` into one: `(b, t, rows/2, columns/2, 4 * d)`."""
    b, t, rows, columns, d = x.shape
    x = x.reshape(b, t, rows // 2, 2, columns // 2, 2, d).permute(0, 1, 2, 4, 3, 5, 6)
    return x.reshape(b, t, rows // 2, columns // 2, 4 * d)


def _unfold(x: Tensor) -> Tensor:
    """Undo `_fold`."""
    b, t, rows, columns, d = x.shape
    x = x.reshape(b, t, rows, columns, 2, 2, d // 4).permute(0, 1, 2, 4, 3, 5, 6)
    return x.reshape(b, t, rows * 2, columns * 2, d // 4)


class _Nested(Network):
    """The sizes of both: those of a network of cells, of tokens."""

    def __init__(self, network: Network, halvings: int) -> None:
        require_min({"codec.encoder.halvings": (halvings, 1)})
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
    """Reads clips into tokens that hold the latents of the cells that they cover.

    Args:
        network: Reads clips into latents of cells.
        halvings: Times that a grid's rows and columns are halved, from cells to tokens.

    Raises:
        UserError: There is no halving.
    """

    def forward(self, signal: Tensor, mask: Tensor | None = None, memory: list[Tensor] | None = None) -> Tensor:
        """Return the latents of clips; a mask of tokens serves as one of cells, since both select frames."""
        cells: Tensor = self.network(signal, mask, memory)
        rows, columns = signal.shape[3] // self.cell[1], signal.shape[4] // self.cell[2]
        x = cells.reshape(cells.shape[0], -1, rows, columns, cells.shape[2])
        for _ in range(self.halvings):
            x = _fold(x)
        return x.flatten(1, 3)


class NestedDecoder(_Nested, Decoder):
    """Makes clips from what tokens hold: the encoder's mirror.

    Args:
        network: Makes clips from latents of cells.
        halvings: The encoder's.

    Raises:
        UserError: There is no halving.
    """

    def forward(
        self, latents: Tensor, mask: Tensor | None, grid: list[int], memory: list[Tensor] | None = None
    ) -> Tensor:
        """Return the clips that latents of a grid of tokens stand for."""
        x = latents.reshape([latents.shape[0]] + grid + [latents.shape[2]])  # noqa: RUF005 (TorchScript)
        for _ in range(self.halvings):
            x = _unfold(x)
        clips: Tensor = self.network(x.flatten(1, 3), mask, [grid[0], x.shape[2], x.shape[3]], memory)
        return clips
