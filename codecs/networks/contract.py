"""What every encoder and every decoder keeps; `tests/codecs/networks/test_contract.py` runs it over all presets.

Latents are tokens, `(b, n, width)`. *Placed* tokens are on a grid over the signal, row by row. *Ordered* tokens answer
the encoder's queries and have no position. In a clip each block of frames, a step of the first axis, has its own, and
the latents are `(b * blocks, n, width)`.
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
        causal: Whether a step of the first axis depends on none after it.
        causal_pad: Copies of the first frame that go before a clip, so that it alone makes the first step.
        tokens: The most ordered tokens of a signal, or of a block of frames; 0 if tokens are placed.
        later_tokens: The most tokens of a block after a clip's first; equal to `tokens` if None.
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
        """Whether unchanged tokens repeat, so that a run is coded once."""
        return False

    @abstractmethod
    def forward(self, signal: Tensor, mask: Tensor | None = None, memory: list[Tensor] | None = None) -> Tensor:
        """Return the latents `(b, n, width)`.

        Args:
            signal: `(b, channels, *size)`, each side a multiple of its `downsample`.
            mask: bool `(b, n)`, True for valid placed latents: a prefix of the first axis. The others' outputs
                are undefined. Ordered ones have no mask.
            memory: State of earlier chunks; see `codecs/streaming.py`.
        """


class Decoder(Network):
    """Makes signals from latents."""

    @abstractmethod
    def forward(
        self, latents: Tensor, mask: Tensor | None, grid: list[int], memory: list[Tensor] | None = None
    ) -> Tensor:
        """Return the signals `(b, channels, *(grid * downsample))`; what isn't valid is 0.

        Args:
            latents: `(b, n, width)`; any prefix of ordered ones.
            mask: bool `(b, n)`, False for missing latents; None if there are none.
            grid: Steps of each axis. For ordered latents rows and columns may be missing: then those of training.
            memory: State of earlier chunks; see `codecs/streaming.py`.
        """
