"""Interface of encoders and decoders; `tests/codecs/networks/test_contract.py` checks it for all presets.

Latents are tokens, `(b, n, width)`. *Placed* tokens form a grid over the signal, flattened row by row. *Ordered* tokens
are outputs of learned queries and have no position. In a clip, each block of frames (a step of the first axis) has its
own ordered tokens: the latents are `(b * blocks, n, width)`.
"""

from abc import ABC, abstractmethod

import torch
from torch import Tensor, nn

__all__ = ["Decoder", "Encoder", "Network", "Precise"]


class Network(nn.Module, ABC):
    """Base class of encoders and decoders: the attributes that `Codec` reads.

    They are not annotated on the class, because TorchScript would compile the annotations.

    Args:
        width: Width of the latents.
        downsample: Downsampling factor of each axis: samples, pixels or frames per step of the grid.
        channels: Channels of the signal.
        causal: Whether each step of the first axis depends on no later step.
        causal_pad: Copies of the first frame to prepend to a clip, so that this frame alone is the first step.
        tokens: Maximum number of ordered tokens per signal, or per block of frames; 0 if tokens are placed.
        later_tokens: Maximum number of tokens of each block but a clip's first; equal to `tokens` if None.
        sides: Rows and columns of a block's grid in training; used if the caller gives none.
        direct: Whether the bottleneck quantizes the latents directly, without a linear projection.
        partial: Whether an encoder takes signals that end within a step, if all samples of a batch are valid.
        first_steps: Steps of the grid that a causal network's first chunk has at least.
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
        partial: bool = False,
        first_steps: int = 1,
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
        self.partial = partial
        self.first_steps = first_steps


class Encoder(Network):
    """Encoder of signals into latents."""

    @property
    def repeats(self) -> bool:
        """Whether unchanged tokens repeat, so that a run of equal tokens is coded once."""
        return False

    @abstractmethod
    def forward(self, signal: Tensor, mask: Tensor | None = None, memory: list[Tensor] | None = None) -> Tensor:
        """Return the latents `(b, n, width)`.

        Args:
            signal: `(b, channels, *size)`, each side a multiple of its `downsample`, unless `partial` and no mask.
            mask: bool `(b, n)`, True for valid placed latents, a prefix of the first axis; invalid latents are
                undefined in the output. None if all are valid, and always for ordered latents.
            memory: State of earlier chunks; see `codecs/streaming.py`.
        """


class Decoder(Network):
    """Decoder of latents into signals."""

    @abstractmethod
    def forward(
        self, latents: Tensor, mask: Tensor | None, grid: list[int], memory: list[Tensor] | None = None
    ) -> Tensor:
        """Return the signals `(b, channels, *(grid * downsample))`; invalid steps are 0.

        Args:
            latents: `(b, n, width)`; of ordered latents, any prefix.
            mask: bool `(b, n)`, False for missing latents; None if all are present.
            grid: Steps of each axis. With ordered latents, rows and columns may be omitted: those of training.
            memory: State of earlier chunks; see `codecs/streaming.py`.
        """


class Precise(Network):
    """Base class of networks that compute in float32 even under autocast, which TorchScript lacks."""

    @abstractmethod
    def compute(self, x: Tensor, mask: Tensor | None, memory: list[Tensor] | None) -> Tensor:
        """Compute the output from float32 `x`."""

    def precisely(self, x: Tensor, mask: Tensor | None, memory: list[Tensor] | None) -> Tensor:
        """Call `compute` with autocast disabled; `mask` is bool, `memory` the state of earlier chunks."""
        if torch.jit.is_scripting():  # type: ignore[attr-defined]
            y: Tensor = self.compute(x, mask, memory)
        else:
            y = self._eager(x, mask, memory)
        return y

    @torch.jit.unused
    def _eager(self, x: Tensor, mask: Tensor | None, memory: list[Tensor] | None) -> Tensor:
        if not torch.is_autocast_enabled(x.device.type):  # export doesn't support the block below
            return self.compute(x, mask, memory)
        with torch.autocast(x.device.type, enabled=False):
            return self.compute(x.float(), mask, memory)
