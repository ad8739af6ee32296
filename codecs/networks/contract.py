"""Interface of encoders and decoders; `tests/codecs/networks/test_contract.py` checks it for all presets.

Latents are tokens, `(b, n, width)`. *Placed* tokens form a grid over the signal, flattened row by row. *Ordered* tokens
are outputs of learned queries and have no position. In a clip, each block of frames (a step of the first axis) has its
own ordered tokens: the latents are `(b * blocks, n, width)`.
"""

from abc import ABC, abstractmethod
from typing import Any

import torch
from torch import Tensor, nn

from varitok.data.noise import gaussian

__all__ = ["Decoder", "Denoiser", "Encoder", "GenerativeDecoder", "Network", "Precise"]


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
        multiple: Number that the steps of the first axis are a multiple of, if tokens are placed.
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
        multiple: int = 1,
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
        self.multiple = multiple


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

    def reconstruct(
        self, latents: Tensor, mask: Tensor | None, grid: list[int], signal: Tensor
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Return signals for the losses of a training step, and the decoder's own losses by name.

        By default what `forward` returns, and none.

        Args:
            latents: See `forward`.
            mask: See `forward`.
            grid: See `forward`.
            signal: The encoded signals, `(b, channels, *size)`.
        """
        return self(latents, mask, grid), {}


class GenerativeDecoder(Decoder):
    """Decoder that samples: where the latents leave a choice, noise makes it.

    It trains by a loss of its own and decodes by `forward`. Noise is a function of `seed`, the same for all signals of
    a batch (`data/noise.py`), so that decoding is a function of latents and seed.

    Args:
        seed: Seed of the noise if the caller gives none.
        steps: Steps of the sampler.
        form: Arguments of `Network`.
    """

    def __init__(self, *, seed: int, steps: int, **form: Any) -> None:
        super().__init__(**form)
        self.seed = seed
        self.steps = steps

    def describe(self) -> dict[str, Any]:
        """Return what a bundle's config.json says of the sampler, as plain data: at least its steps and seed."""
        return {"steps": self.steps, "seed": self.seed}

    @abstractmethod
    def loss(self, latents: Tensor, mask: Tensor | None, signal: Tensor) -> tuple[Tensor, Tensor]:
        """Return an estimate of the signals `(b, channels, *size)`, and the loss, a scalar; both have gradients.

        Args:
            latents: See `forward`.
            mask: See `forward`.
            signal: The encoded signals.
        """

    @abstractmethod
    def forward(
        self,
        latents: Tensor,
        mask: Tensor | None,
        grid: list[int],
        memory: list[Tensor] | None = None,
        noise: Tensor | None = None,
    ) -> Tensor:
        """Sample signals `(b, channels, *(grid * downsample))`.

        Args:
            latents: See `Decoder.forward`.
            mask: See `Decoder.forward`.
            grid: See `Decoder.forward`.
            memory: See `Decoder.forward`.
            noise: Standard normal noise, `(1 or b, channels, *(grid * downsample))`; None: that of `seed`.
        """

    @abstractmethod
    def step(
        self, latents: Tensor, mask: Tensor | None, sample: Tensor, state: Tensor, number: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Do one step of the sampler; return the next sample and state.

        Args:
            latents: See `forward`.
            mask: See `forward`.
            sample: `(b, channels, *size)`; at first the noise.
            state: What the sampler remembers, of the same shape; at first zeros.
            number: Number of the step, int64 `()`, below `steps`.
        """

    def reconstruct(
        self, latents: Tensor, mask: Tensor | None, grid: list[int], signal: Tensor
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the estimate and the loss of `loss`."""
        estimate, loss = self.loss(latents, mask, signal)
        return estimate, {"generation": loss}

    @torch.jit.unused
    def draw(self, grid: list[int], like: Tensor) -> Tensor:
        """Return the noise of `seed` for signals of a grid, `(1, channels, *(grid * downsample))`."""
        steps = [*grid, self.rows, self.columns][: len(self.downsample)]
        size = [count * step for count, step in zip(steps, self.downsample, strict=True)]
        return torch.from_numpy(gaussian((self.channels, *size), self.seed))[None].to(like)


class Denoiser(Network):
    """Network inside a generative decoder: predicts from a noised signal, a time and latents."""

    @abstractmethod
    def forward(self, noised: Tensor, time: Tensor, latents: Tensor, mask: Tensor | None) -> Tensor:
        """Return a prediction of the shape of `noised`; of what, the decoder that trains it decides.

        Args:
            noised: Noised signals, `(b, channels, *size)`.
            time: From 0, noise alone, to 1, the signal alone; `(b,)`.
            latents: `(b, n, width)`; of ordered latents, any prefix.
            mask: bool `(b, n)`, False for missing latents; None if all are present.
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
