"""What every encoder and every decoder keeps; `tests/codecs/networks/test_contract.py` runs it over all presets.

Latents are tokens, `(b, n, width)`. *Placed* ones lie on a grid over the signal, row by row. *Ordered* ones answer the
encoder's queries, and have no place; of clips each block of frames, a step of the first axis, has its own, and
`(b * blocks, n, width)` are its latents.
"""

from abc import ABC, abstractmethod

from torch import Tensor, nn

__all__ = ["Decoder", "Encoder", "Network"]


class Network(nn.Module, ABC):
    """What a codec reads of either side.

    They are no annotations of the class, because TorchScript would read those.

    Args:
        width: Width of the latents.
        downsample: Samples (pixels, frames) of each axis of the signal to a step of the grid.
        channels: Channels of the signal.
        causal: Whether a step of the first axis depends on none behind it.
        causal_pad: Copies of the first frame that go before a clip, so that it alone makes the first step.
        tokens: The most ordered tokens of a signal, or of a block of frames; 0 where tokens are placed.
        later_tokens: The most tokens of a block behind a clip's first; as many as `tokens` where None.
        sides: Rows and columns of a block's grid in training, where a memory has no other.
        direct: Whether latents are the bottleneck's own, with no map between.
    """

    def __init__(
        self,
        *,
        width: int,
        downsample: tuple[int, ...],
        channels: int,
        causal: bool = False,
        causal_pad: int = 0,
        tokens: int = 0,
        later_tokens: int | None = None,
        sides: tuple[int, int] = (1, 1),
        direct: bool = False,
    ) -> None:
        super().__init__()
        self.width = width
        self.downsample = downsample
        self.channels = channels
        self.causal = causal
        self.causal_pad = causal_pad
        self.tokens = tokens
        self.later_tokens = tokens if later_tokens is None else later_tokens
        self.rows, self.columns = sides
        self.direct = direct


class Encoder(Network):
    """Reads signals into latents."""

    @property
    def repeats(self) -> bool:
        """Whether a token that nothing changes is repeated in its place, so that a run of it need be told once only."""
        return False

    @abstractmethod
    def forward(self, signal: Tensor, mask: Tensor | None = None, memory: list[Tensor] | None = None) -> Tensor:
        """Return the latents `(b, n, width)`.

        Args:
            signal: `(b, channels, *size)`, each side a multiple of its `downsample`.
            mask: bool `(b, n)`, True for placed latents that are of a signal: a prefix of the first axis. What comes
                out of the others is of no meaning. Ordered ones have no mask.
            memory: Of the chunks before; see `codecs/streaming.py`.
        """


class Decoder(Network):
    """Makes signals from latents."""

    @abstractmethod
    def forward(
        self, latents: Tensor, mask: Tensor | None, grid: list[int], memory: list[Tensor] | None = None
    ) -> Tensor:
        """Return the signals `(b, channels, *(grid * downsample))`; what isn't valid is 0.

        Args:
            latents: `(b, n, width)`; of ordered ones any prefix.
            mask: bool `(b, n)`, False where a latent is not there; None where all are.
            grid: Steps of each axis. Where latents are ordered, rows and columns may be missing: those of training.
            memory: Of the chunks before; see `codecs/streaming.py`.
        """
