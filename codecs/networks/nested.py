"""Networks of frames whose tokens each cover a square of cells: what a hierarchy of codebooks is about.

A network's latents lie on a grid. `halvings` times, two rows and two columns of it become one, so that a token holds
`4 ** halvings` cells, in the order in which they nest: the cells of each quarter of its square follow each other, and
so do those of each quarter of a quarter. The mean over a run of cells is then one over neighbours, which is what the
layers of `bottlenecks/hierarchy.py` code.
"""

from torch import Tensor, nn

from varitok import at_least

__all__ = ["NestedDecoder", "NestedEncoder"]


def _folded(x: Tensor) -> Tensor:
    """Put each two rows and two columns of `(b, t, rows, columns, d)` into one: `(b, t, rows/2, columns/2, 4 * d)`."""
    b, t, rows, columns, d = x.shape
    x = x.reshape(b, t, rows // 2, 2, columns // 2, 2, d).permute(0, 1, 2, 4, 3, 5, 6)
    return x.reshape(b, t, rows // 2, columns // 2, 4 * d)


def _unfolded(x: Tensor) -> Tensor:
    """Undo `_folded`."""
    b, t, rows, columns, d = x.shape
    x = x.reshape(b, t, rows, columns, 2, 2, d // 4).permute(0, 1, 2, 4, 3, 5, 6)
    return x.reshape(b, t, rows * 2, columns * 2, d // 4)


class NestedEncoder(nn.Module):
    """Reads clips into tokens that hold the latents of the cells that they cover.

    Args:
        network: Reads clips into latents of cells.
        halvings: Of a grid's rows and columns, from cells to tokens.

    Attributes:
        hop: Frames, rows and columns for a token.
        width: The network's, once for each cell of a token.

    Raises:
        UserError: There is no halving.
    """

    def __init__(self, network: nn.Module, halvings: int) -> None:
        super().__init__()
        at_least({"codec.encoder.halvings": (halvings, 1)})
        self.network = network
        self.halvings = halvings
        first, second, third = network.hop  # type: ignore[misc]
        self.cell = (int(second), int(third))
        self.hop = (int(first), int(second) << halvings, int(third) << halvings)
        self.width = int(network.width) << 2 * halvings  # type: ignore[arg-type]
        self.lead = int(network.lead)  # type: ignore[arg-type]
        self.channels = int(network.channels)  # type: ignore[arg-type]
        self.causal = bool(network.causal)

    def forward(self, signal: Tensor, mask: Tensor | None = None, memory: list[Tensor] | None = None) -> Tensor:
        """Turn clips `(b, c, t, h, w)`, each axis a multiple of its hop, into tokens' latents `(b, n, width)`.

        `mask` and `memory` are the network's: which frames there are, a mask of tokens tells as well as one of cells.
        """
        cells: Tensor = self.network(signal, mask, memory)
        rows, columns = signal.shape[3] // self.cell[0], signal.shape[4] // self.cell[1]
        x = cells.reshape(cells.shape[0], -1, rows, columns, cells.shape[2])
        for _ in range(self.halvings):
            x = _folded(x)
        return x.flatten(1, 3)


class NestedDecoder(nn.Module):
    """Makes clips from what tokens hold: the encoder's mirror.

    Args:
        network: Makes clips from latents of cells.
        halvings: The encoder's.

    Attributes:
        hop: Frames, rows and columns for a token.
        width: The network's, once for each cell of a token.

    Raises:
        UserError: There is no halving.
    """

    def __init__(self, network: nn.Module, halvings: int) -> None:
        super().__init__()
        at_least({"codec.decoder.halvings": (halvings, 1)})
        self.network = network
        self.halvings = halvings
        first, second, third = network.hop  # type: ignore[misc]
        self.hop = (int(first), int(second) << halvings, int(third) << halvings)
        self.width = int(network.width) << 2 * halvings  # type: ignore[arg-type]
        self.causal = bool(network.causal)

    def forward(
        self,
        latents: Tensor,
        mask: Tensor | None = None,
        first: int = 1,
        second: int = 1,
        third: int = 1,
        memory: list[Tensor] | None = None,
    ) -> Tensor:
        """Turn latents `(b, n, width)` of a grid of tokens into clips `(b, c, *grid * hop)`; see `FactoredDecoder`."""
        x = latents.reshape(latents.shape[0], first, second, third, latents.shape[2])
        for _ in range(self.halvings):
            x = _unfolded(x)
        clips: Tensor = self.network(x.flatten(1, 3), mask, first, x.shape[2], x.shape[3], memory)
        return clips
