"""Audio codec of transformers over patches of samples: TAAE (arXiv 2411.19842), the codec of Stable Codec."""

import math
from collections.abc import Sequence
from typing import Annotated

from torch import Tensor, nn

from varitok import UserError

from .contract import Decoder, Encoder, Network, Precise
from .layers.convolution import Convolution, TransposedConvolution, at_rate, zero_invalid
from .layers.sequence import SequenceTransformer

__all__ = ["PatchDecoder", "PatchEncoder"]


class _Stage(nn.Module):
    """Transformer with resampling before it in an encoder, and after it in a decoder."""

    def __init__(self, transformer: SequenceTransformer, resample: nn.Module | None, decodes: bool) -> None:
        super().__init__()
        self.transformer = transformer
        self.resample = resample
        self.decodes = decodes

    def forward(self, x: Tensor, before: Tensor | None, after: Tensor | None, memory: list[Tensor] | None) -> Tensor:
        """Transform `(b, n, d)`; the masks `before` and `after`, `(b, 1, n)`, are at the input and output rate."""
        if self.resample is not None and not self.decodes:
            x = self.resample(x.transpose(1, 2), before, memory).transpose(1, 2)
        slow = before if self.decodes else after
        x = self.transformer(x, None if slow is None else slow[:, 0], memory)
        if self.resample is not None and self.decodes:
            x = self.resample(x.transpose(1, 2), before, memory).transpose(1, 2)
        return x


class _PatchCodec(Network):
    """Layers of encoder and decoder."""

    decodes: bool
    strides: list[int]

    def __init__(
        self,
        *,
        width: int,
        base: int,
        patch: int,
        strides: Sequence[int],
        depths: Annotated[Sequence[int], "[0, 1000]"],
        heads: int,
        window: int | None = 64,
        channels: int = 1,
        hidden: int | None = None,
        causal: bool = False,
        layer_scale: float = 0.01,
        qk_norm: bool = True,
        gated: bool = True,
        eps: Annotated[float, "(0, inf)"] = 1e-2,
    ) -> None:
        if len(strides) != len(depths) or not strides:
            raise UserError(f"codec: {len(strides)} strides and {len(depths)} depths: give as many, at least one")
        rate = patch * math.prod(strides)
        super().__init__(width=width, downsample=(rate,), channels=channels, causal=causal)
        self.patch = patch
        self.rate = rate
        change = TransposedConvolution if self.decodes else Convolution
        stages = [
            _Stage(
                SequenceTransformer(base, depth, heads, hidden, causal, window, layer_scale, qk_norm, gated, eps),
                change(base, base, 2 * stride, stride, causal=causal) if stride > 1 else None,
                self.decodes,
            )
            for stride, depth in zip(strides, depths, strict=True)
        ]
        # In order of execution.
        self.strides = list(reversed(strides) if self.decodes else strides)
        self.stages = nn.ModuleList(reversed(stages) if self.decodes else stages)
        self.embed = nn.Linear(width if self.decodes else channels * patch, base)
        nn.init.zeros_(self.embed.bias)
        self.out = nn.Linear(base, channels * patch if self.decodes else width)


class PatchEncoder(_PatchCodec, Encoder):
    """Encoder of audio by transformers over patches of samples (TAAE, arXiv 2411.19842, section 3.1).

    Each stage is a strided convolution, if its stride is above 1, and a transformer.

    Args:
        width: Width of the latents.
        base: Width of the transformers.
        patch: Samples per patch.
        strides: Stride of each stage.
        depths: Transformer blocks of each stage.
        heads: Attention heads per block.
        window: See `SequenceTransformer`, as for the arguments below.
        channels: Channels of the signal.
        hidden: Hidden width of the perceptrons.
        causal: Whether a latent depends only on the signal up to the end of its step.
        layer_scale: Initial LayerScale of each branch.
        qk_norm: Whether to normalize queries and keys.
        gated: Whether the perceptrons are SwiGLU.
        eps: Epsilon of the layer norms.

    Raises:
        UserError: Inconsistent sizes.
    """

    decodes = False

    def forward(self, signal: Tensor, mask: Tensor | None = None, memory: list[Tensor] | None = None) -> Tensor:
        """Return the latents `(b, n, width)` of audio `(b, c, t)`."""
        # (b, c, t) -> (b, c, n, patch) -> (b, n, c * patch)
        x = signal.reshape(signal.shape[0], self.channels, -1, self.patch).transpose(1, 2).flatten(2)
        x = self.embed(x)
        rate = self.rate // self.patch
        for level, stage in enumerate(self.stages):
            before = at_rate(mask, rate, 1)
            rate = rate // self.strides[level]
            x = stage(x, before, at_rate(mask, rate, 1), memory)
        latents: Tensor = self.out(x)
        return latents


class PatchDecoder(_PatchCodec, Precise, Decoder):
    """Decoder of audio by transformers over patches: the mirror of `PatchEncoder`, with the same arguments.

    Strides and depths are in the encoder's order. If causal, sample i depends on latents up to `i // downsample` only.
    """

    decodes = True

    def forward(
        self, latents: Tensor, mask: Tensor | None, grid: list[int], memory: list[Tensor] | None = None
    ) -> Tensor:
        """Decode latents `(b, n, width)` into audio `(b, c, t)`."""
        x = self.embed(latents)
        rate = 1
        for level, stage in enumerate(self.stages):
            before = at_rate(mask, rate, 1)
            rate = rate * self.strides[level]
            x = stage(x, before, at_rate(mask, rate, 1), memory)
        return self.precisely(x, at_rate(mask, self.rate, 1), memory)

    def compute(self, x: Tensor, mask: Tensor | None, memory: list[Tensor] | None) -> Tensor:
        """Return the signal, given the last stage's output `(b, n, d)`."""
        patches = self.out(x).reshape(x.shape[0], x.shape[1], self.channels, self.patch)
        return zero_invalid(patches.transpose(1, 2).flatten(2), mask)  # (b, n, c, patch) -> (b, c, n * patch)
