"""Focal modulation over sequences, and FocalCodec's compressor and decompressor.

Focal modulation (FocalNet, arXiv 2203.11926, section 3) replaces self-attention at a cost linear in the length. Stacked
depthwise convolutions compute contexts of growing receptive field; the last context is the mean over the whole signal.
Each step is multiplied by a gated sum of its contexts. FocalCodec (arXiv 2502.04465, section 3) compresses features
with it, and decompresses them for a vocoder.
"""

import math
from collections.abc import Callable, Sequence
from typing import Annotated

import torch
from torch import Tensor, nn
from torch.nn import functional

from varitok import UserError

from .contract import Decoder, Encoder, Network
from .layers.activations import Activation
from .layers.convolution import Convolution, TransposedConvolution, at_rate, zero_invalid

__all__ = ["FocalDecoder", "FocalEncoder", "FocalSequence"]


class _Modulation(nn.Module):
    """Focal modulation (FocalNet, equations 4 to 7): `y = out(q(x) * mix(sum_l gate_l(x) * context_l(x)))`.

    A causal layer replaces the last context, the global mean, by a convolution over the last `span` steps.
    """

    def __init__(self, width: int, window: int, levels: int, growth: int, causal: bool, span: int) -> None:
        super().__init__()
        self.obstacle = "" if causal else "focal modulation isn't causal"
        self.sizes = [width, width, levels + 1]
        self.into = nn.Linear(width, 2 * width + levels + 1)
        self.levels = nn.ModuleList(
            Convolution(width, width, window + growth * level, groups=width, causal=causal) for level in range(levels)
        )
        self.past = Convolution(width, width, span, groups=width, causal=True) if causal else None
        self.mix = nn.Linear(width, width)
        self.out = nn.Linear(width, width)

    def forward(self, x: Tensor, mask: Tensor | None, memory: list[Tensor] | None) -> Tensor:
        """Transform `(b, n, width)`; `mask` is bool `(b, 1, n)`."""
        query, context, gates = self.into(x).split(self.sizes, dim=2)
        # (b, n, width) -> (b, width, n), and (b, n, levels + 1) -> (b, levels + 1, n)
        context, gates = context.transpose(1, 2), gates.transpose(1, 2)
        total = torch.zeros_like(context)
        for level, layer in enumerate(self.levels):
            context = functional.gelu(layer(context, mask, memory))
            total = total + context * gates[:, level : level + 1]
        if self.past is not None:
            whole = self.past(context, mask, memory)
        elif mask is None:
            whole = context.mean(2, keepdim=True)
        else:
            whole = zero_invalid(context, mask).sum(2, keepdim=True) / mask.sum(2, keepdim=True).clamp(min=1)
        total = total + functional.gelu(whole) * gates[:, -1:]
        modulated: Tensor = self.out(query * self.mix(total.transpose(1, 2)))
        return modulated


class _Block(nn.Module):
    """Pre-norm block: focal modulation and a perceptron with GELU, residual, with LayerScale."""

    def __init__(
        self,
        width: int,
        hidden: int,
        window: int,
        levels: int,
        growth: int,
        scale: float,
        causal: bool,
        span: int,
    ) -> None:
        super().__init__()
        self.modulation_norm = nn.LayerNorm(width)
        self.modulation = _Modulation(width, window, levels, growth, causal, span)
        self.mlp_norm = nn.LayerNorm(width)
        self.wide = nn.Linear(width, hidden)
        self.out = nn.Linear(hidden, width)
        self.modulation_scale = nn.Parameter(torch.full((width,), float(scale)))
        self.mlp_scale = nn.Parameter(torch.full((width,), float(scale)))

    def forward(self, x: Tensor, mask: Tensor | None, memory: list[Tensor] | None) -> Tensor:
        x = x + self.modulation_scale * self.modulation(self.modulation_norm(x), mask, memory)
        x = x + self.mlp_scale * self.out(functional.gelu(self.wide(self.mlp_norm(x))))
        return x


class FocalSequence(nn.Module):
    """Blocks of focal modulation; can replace a transformer as `middle` of `ConvEncoder` or `VocosDecoder`.

    Args:
        width: Width of the tokens.
        depth: Number of blocks.
        hidden: Hidden width of the perceptrons; four times the width if None.
        window: Kernel size of the first convolution.
        levels: Stacked convolutions per block.
        growth: Increase of the kernel size from each convolution to the next.
        layer_scale: Initial LayerScale of each branch; 1 is close to none.
        causal: Whether a token depends on no later one; a convolution over the past then replaces the mean.
        span: Kernel size of that convolution (512 in FocalCodec-Stream, arXiv 2509.16195); ignored if not causal.

    Attributes:
        context: Earlier steps on which a step depends if causal, else 0.
    """

    def __init__(
        self,
        width: int,
        depth: Annotated[int, "[1, 1000]"],
        hidden: int | None = None,
        window: int = 7,
        levels: Annotated[int, "[1, 1000]"] = 2,
        growth: Annotated[int, "[0, inf)"] = 2,
        layer_scale: float = 1.0,
        causal: bool = False,
        span: int = 512,
    ) -> None:
        super().__init__()
        self.width = width
        self.causal = causal
        each = sum(window + growth * level - 1 for level in range(levels)) + span - 1
        self.context = depth * each if causal else 0
        self.blocks = nn.ModuleList(
            _Block(width, hidden or 4 * width, window, levels, growth, layer_scale, causal, span) for _ in range(depth)
        )

    def forward(self, x: Tensor, mask: Tensor | None = None, memory: list[Tensor] | None = None) -> Tensor:
        """Transform tokens `(b, n, width)`; `mask` is bool `(b, n)`, `memory` the state of earlier chunks."""
        here = at_rate(mask, 1, 1)
        for block in self.blocks:
            x = block(x, here, memory)
        return x


class _Stage(nn.Module):
    """Resampling, activation and blocks, in this order in an encoder and reversed in a decoder."""

    def __init__(self, blocks: FocalSequence, act: Activation, resample: nn.Module, decodes: bool) -> None:
        super().__init__()
        self.blocks = blocks
        self.act = act
        self.resample = resample
        self.decodes = decodes

    def forward(self, x: Tensor, before: Tensor | None, after: Tensor | None, memory: list[Tensor] | None) -> Tensor:
        """Transform `(b, n, d)`; the masks `before` and `after`, bool `(b, n)`, are at the input and output rate."""
        here = at_rate(before, 1, 1)
        if self.decodes:
            x = self.blocks(x, before, memory).transpose(1, 2)
            return self.resample(self.act(x, here), here, memory).transpose(1, 2)  # type: ignore[no-any-return]
        x = self.resample(x.transpose(1, 2), here, memory)
        return self.blocks(self.act(x, at_rate(after, 1, 1)).transpose(1, 2), after, memory)  # type: ignore[no-any-return]


def _slower(mask: Tensor | None, rate: int) -> Tensor | None:
    """Repeat each element of a mask, bool `(b, n)`, `rate` times: `(b, n * rate)`."""
    spread = at_rate(mask, rate, 1)
    return None if spread is None else spread[:, 0]


class _FocalCodec(Network):
    """Stages of encoder or decoder; `outside` maps between signal and features, `blocks` builds a stage's blocks."""

    decodes: bool
    strides: list[int]

    def __init__(
        self,
        outside: Network,
        widths: Sequence[int],
        strides: Sequence[int],
        blocks: Callable[[int], FocalSequence],
        activation: str,
        causal: bool,
    ) -> None:
        if len(widths) != len(strides) or not widths:
            raise UserError(f"focal: {len(widths)} widths and {len(strides)} strides: give as many, at least one")
        if causal and not outside.causal:
            raise UserError(f"focal: a causal codec needs a causal {type(outside).__name__}")
        slowdown = math.prod(strides)
        rate = outside.downsample[0] * slowdown
        super().__init__(width=widths[-1], downsample=(rate,), channels=outside.channels, causal=causal)
        self.slowdown = slowdown
        self.rate = rate
        ends = [outside.width, *widths]
        change = TransposedConvolution if self.decodes else Convolution
        stages = []
        for level, stride in enumerate(strides):
            outer, inner = ends[level], ends[level + 1]
            sequence = blocks(inner)
            sizes = (inner, outer) if self.decodes else (outer, inner)
            resample = change(*sizes, stride, stride, causal=causal)
            stages.append(_Stage(sequence, Activation(activation, inner), resample, self.decodes))
        # In order of execution.
        self.strides = list(reversed(strides) if self.decodes else strides)
        self.stages = nn.ModuleList(reversed(stages) if self.decodes else stages)


class FocalEncoder(_FocalCodec, Encoder):
    """Encoder of audio: features compressed by focal modulation (FocalCodec, arXiv 2502.04465, section 3.1).

    Each stage is a convolution whose kernel size is its stride, an activation, and blocks. The published features are
    those of WavLM's sixth layer; any audio encoder can replace it.

    Args:
        features: Feature extractor.
        widths: Width of each stage; the last is the width of the latents.
        strides: Stride of each stage.
        hop_length: Hop length of `features`, in samples; the data configuration reads it here.
        depth: Blocks per stage.
        hidden: See `FocalSequence`, as for the arguments below.
        window: Kernel size of the first convolution.
        levels: Convolutions per block.
        growth: Increase of the kernel size.
        layer_scale: Initial LayerScale.
        activation: See `activations.ACTIVATIONS`.
        causal: Whether a latent depends only on the signal up to the end of its step.
        span: Kernel size of the convolution over the past.

    Raises:
        UserError: Inconsistent sizes, or `causal` with features that aren't.
    """

    decodes = False

    def __init__(
        self,
        *,
        features: Encoder,
        widths: Sequence[int],
        strides: Sequence[int],
        hop_length: int,
        depth: Annotated[int, "[0, 1000]"] = 1,
        hidden: int | None = None,
        window: int = 7,
        levels: Annotated[int, "[1, 1000]"] = 2,
        growth: int = 2,
        layer_scale: float = 1.0,
        activation: str = "snake",
        causal: bool = False,
        span: int = 512,
    ) -> None:
        sizes = (depth, hidden, window, levels, growth, layer_scale, causal, span)
        super().__init__(features, widths, strides, lambda width: FocalSequence(width, *sizes), activation, causal)
        if hop_length * self.slowdown != self.rate:
            raise UserError(f"focal: hop_length={hop_length}, but that of the features is {self.rate // self.slowdown}")
        self.features = features

    def forward(self, signal: Tensor, mask: Tensor | None = None, memory: list[Tensor] | None = None) -> Tensor:
        """Return the latents `(b, n, width)` of audio `(b, c, t)`."""
        rate = self.slowdown
        here = _slower(mask, rate)
        x = self.features(signal, here, memory)
        for level, stage in enumerate(self.stages):
            rate = rate // self.strides[level]
            after = _slower(mask, rate)
            x = stage(x, here, after, memory)
            here = after
        latents: Tensor = x
        return latents


class FocalDecoder(_FocalCodec, Decoder):
    """Decoder of audio, the mirror of `FocalEncoder`: focal modulation from latents to features, and a vocoder.

    The other arguments are the encoder's; widths and strides are in its order.

    Args:
        vocoder: Decoder of features into audio, such as `VocosDecoder`.

    Raises:
        UserError: Inconsistent sizes, or `causal` with a vocoder that isn't.
    """

    decodes = True

    def __init__(
        self,
        *,
        vocoder: Decoder,
        widths: Sequence[int],
        strides: Sequence[int],
        depth: Annotated[int, "[0, 1000]"] = 1,
        hidden: int | None = None,
        window: int = 7,
        levels: Annotated[int, "[1, 1000]"] = 2,
        growth: int = 2,
        layer_scale: float = 1.0,
        activation: str = "snake",
        causal: bool = False,
        span: int = 512,
    ) -> None:
        sizes = (depth, hidden, window, levels, growth, layer_scale, causal, span)
        super().__init__(vocoder, widths, strides, lambda width: FocalSequence(width, *sizes), activation, causal)
        self.vocoder = vocoder

    def forward(
        self, latents: Tensor, mask: Tensor | None, grid: list[int], memory: list[Tensor] | None = None
    ) -> Tensor:
        """Decode latents `(b, n, width)` into audio `(b, c, t)`."""
        x = latents
        here = mask
        rate = 1
        for level, stage in enumerate(self.stages):
            rate = rate * self.strides[level]
            after = _slower(mask, rate)
            x = stage(x, here, after, memory)
            here = after
        signal: Tensor = self.vocoder(x, here, [x.shape[1]], memory)
        return signal
