"""Networks on sequences `(b, n, d)`: a transformer with rotary positions and a window, a recurrent one, patch codecs.

They are the middles of convolutional codecs (Mimi's transformer, EnCodec's LSTM) and, between patches and latents, the
whole of TAAE (arXiv 2411.19842).

Chunk by chunk, a causal layer keeps in its memory (see `convolution.py`) the keys and values of the last `context`
steps, the keys before their rotation, and rotates by positions counted from the first one kept; only differences of
positions matter, so that the result is the same.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional

from varitok import UserError

from .attention import Attention
from .contract import Decoder, Encoder, Network
from .convolution import Convolution, TransposedConvolution, at_rate, prepend_context, zero_invalid
from .lstm import LSTM

__all__ = ["PatchDecoder", "PatchEncoder", "Recurrent", "SequenceTransformer"]


class _Perceptron(nn.Module):
    """Two layers with GELU, or gated by SiLU (SwiGLU, arXiv 2002.05202)."""

    def __init__(self, width: int, hidden: int, gated: bool) -> None:
        super().__init__()
        self.gated = gated
        self.wide = nn.Linear(width, 2 * hidden if gated else hidden, bias=gated)
        self.out = nn.Linear(hidden, width, bias=gated)

    def forward(self, x: Tensor) -> Tensor:
        x = self.wide(x)
        if self.gated:
            x, gate = x.chunk(2, dim=-1)
            x = x * functional.silu(gate)
        else:
            x = functional.gelu(x)
        y: Tensor = self.out(x)
        return y


class _Block(nn.Module):
    """Attention and perceptron, each normalized, scaled for each channel, and added."""

    def __init__(
        self,
        width: int,
        heads: int,
        hidden: int,
        base: float,
        scale: float,
        qk_norm: bool,
        gated: bool,
        eps: float,
        axes: int,
    ) -> None:
        super().__init__()
        self.attention_norm = nn.LayerNorm(width, eps)
        self.attention = Attention(width, heads, base, axes, qk_norm, eps)
        self.mlp_norm = nn.LayerNorm(width, eps)
        self.mlp = _Perceptron(width, hidden, gated)
        self.attention_scale = nn.Parameter(torch.full((width,), float(scale)))
        self.mlp_scale = nn.Parameter(torch.full((width,), float(scale)))

    def forward(
        self,
        x: Tensor,
        positions: Tensor,
        allowed: Tensor | None,
        causal: bool,
        context: int,
        memory: list[Tensor] | None,
    ) -> Tensor:
        attended = self.attention(self.attention_norm(x), positions, allowed, causal, context, memory)
        x = x + self.attention_scale * attended
        x = x + self.mlp_scale * self.mlp(self.mlp_norm(x))
        return x


class SequenceTransformer(nn.Module):
    """A pre-norm transformer with rotary positions and LayerScale (Mimi, arXiv 2410.00037, section 3.3.1; TAAE).

    A step may be a frame of rows x columns tokens, after some that have no position in it: then it is block-causal, a
    frame's tokens attend to each other and to those of frames before.

    Args:
        width: Width of the tokens.
        depth: Blocks.
        heads: Heads of each; `width / heads` is even.
        hidden: Hidden width of the perceptrons; four times the width if None.
        causal: A step attends to none after it.
        window: Steps within which tokens attend to each other, themselves counted: `i - j < window`, and without
            `causal` also `j - i < window`; None for all.
        layer_scale: Start of the scales of each branch (arXiv 2103.17239); 1 for about none.
        qk_norm: Queries and keys of each head go through a layer norm (arXiv 2302.05442).
        gated: The perceptrons are gated by SiLU, instead of GELU.
        eps: Epsilon of the layer norms; TAAE needs 1e-2, or quiet steps blow up.
        base: Base of the rotary wavelengths.
        axes: Coordinates of a token's position: 1, the step alone, or 3, step, row and column.

    Attributes:
        context: Steps that a causal layer looks back to; 0 if that is all of them.
        slot: Its place in a memory, for what of the blocks' memory is of real steps: 1 there, 0 before the start.

    Raises:
        UserError: Sizes that don't fit each other.
    """

    def __init__(
        self,
        width: int,
        depth: int,
        heads: int,
        hidden: int | None = None,
        causal: bool = False,
        window: int | None = None,
        layer_scale: float = 0.01,
        qk_norm: bool = False,
        gated: bool = False,
        eps: float = 1e-5,
        base: float = 10000.0,
        axes: int = 1,
    ) -> None:
        super().__init__()
        if axes not in (1, 3):
            raise UserError(f"transformer: axes={axes} should be 1, of sequences, or 3, of frames")
        if width % (2 * heads):
            raise UserError(f"transformer: width={width} should be a multiple of twice its heads={heads}")
        if window is not None and window < 1:
            raise UserError(f"transformer: window={window} should be at least 1")
        self.width = width
        self.axes = axes
        self.causal = causal
        self.window = window or 0
        self.context = max(self.window - 1, 0)
        self.slot = 0
        self.obstacle = "" if causal and window else "a transformer isn't causal, or has no window"
        self.blocks = nn.ModuleList(
            _Block(width, heads, hidden or 4 * width, base, layer_scale, qk_norm, gated, eps, axes)
            for _ in range(depth)
        )

    def forward(
        self,
        x: Tensor,
        mask: Tensor | None = None,
        memory: list[Tensor] | None = None,
        rows: int = 1,
        columns: int = 1,
        free: int = 0,
        some: Tensor | None = None,
    ) -> Tensor:
        """Transform tokens `(b, n, width)`, of frames row by row.

        Args:
            x: The tokens.
            mask: bool `(b, n)`, True where a token is valid.
            memory: State of earlier chunks.
            rows: Rows of tokens in a frame.
            columns: Columns of tokens in a frame.
            free: Tokens of each step that come before its rows, and are in none.
            some: int64 `(b, n)`, indices of these tokens, if some are left out; `mask` then is of all tokens.
        """
        frame = free + rows * columns
        context = self.context * frame if memory is not None else 0
        index = torch.arange(context + x.shape[1], device=x.device)[None] if some is None else some
        step = index // frame
        positions = index[:, :, None]
        if self.axes == 3:
            # Not by `%`, which ONNX's exporter takes with a constant only.
            inside = (index - step * frame - free).clamp(min=0)
            row = inside // columns
            positions = torch.stack([step, row, inside - row * columns], dim=2)
        allowed: Tensor | None = None
        # To a causal one what isn't valid can't come, being a suffix; but for free tokens, of any step, and for some.
        masks = mask is not None and (free > 0 or some is not None or not self.causal)
        if self.window > 0 or (self.causal and self.axes == 3) or masks:
            back = step[:, context:, None] - step[:, None]
            near = back >= 0 if self.causal else torch.ones_like(back, dtype=torch.bool)
            if self.window > 0:
                near = near & (back.abs() < self.window)
            allowed = near[:, None]
            shown = mask if masks else None
            if memory is not None and context > 0:
                real = torch.ones_like(x[:, :, 0]) if shown is None else shown.to(x.dtype)
                shown = prepend_context(real, memory, self.slot, context, 1) > 0
            if shown is not None:
                # Itself each may attend to: a row without anything allowed is NaN.
                every = torch.arange(context + x.shape[1], device=x.device)
                allowed = allowed & (shown[:, None, None, :] | (every[context:, None] == every))
        causal = self.causal and allowed is None
        for block in self.blocks:
            x = block(x, positions, allowed, causal, context, memory)
        return x


class Recurrent(nn.Module):
    """LSTM layers added to their input (EnCodec, arXiv 2210.13438, section 3.1: two of them).

    Args:
        width: Width of the tokens.
        depth: Layers.
        bidirectional: Each layer reads both ways, half of its width each (SpeechTokenizer's encoder, which has the full
            width each way); padding is not read.
    """

    def __init__(self, width: int, depth: int = 2, bidirectional: bool = False) -> None:
        super().__init__()
        if bidirectional and width % 2:
            raise UserError(f"recurrent: width={width} should be even, for both ways")
        self.bidirectional = bidirectional
        self.obstacle = "a recurrent layer reads both ways" if bidirectional else ""
        ways = 2 if bidirectional else 1
        self.onward = nn.ModuleList(LSTM(width, width // ways) for _ in range(depth))
        self.returning = nn.ModuleList(LSTM(width, width // ways) for _ in range(depth if bidirectional else 0))

    def forward(self, x: Tensor, mask: Tensor | None = None, memory: list[Tensor] | None = None) -> Tensor:
        """Transform tokens `(b, n, width)`; `mask` is bool `(b, n)`, True up to each sample's length."""
        y = x
        if not self.bidirectional:
            for layer in self.onward:
                y = layer(y, memory)
            return x + y
        # Each sample is turned around by itself, so that the way back begins at its own end.
        positions = torch.arange(x.shape[1], device=x.device)[None].expand(x.shape[0], -1)
        lengths = positions[:, :1] + x.shape[1] if mask is None else mask.sum(1, keepdim=True)
        turned = torch.where(positions < lengths, lengths - 1 - positions, positions).unsqueeze(2)
        for layer, back in zip(self.onward, self.returning):  # noqa: B905 (TorchScript knows no strict)
            reverse = back(y.gather(1, turned.expand(-1, -1, y.shape[2])))
            y = torch.cat([layer(y), reverse.gather(1, turned.expand(-1, -1, reverse.shape[2]))], dim=2)
        return x + y


class _Stage(nn.Module):
    """A transformer and a change of rate, before it in an encoder and after it in a decoder."""

    def __init__(self, transformer: SequenceTransformer, resample: nn.Module | None, decodes: bool) -> None:
        super().__init__()
        self.transformer = transformer
        self.resample = resample
        self.decodes = decodes

    def forward(self, x: Tensor, before: Tensor | None, after: Tensor | None, memory: list[Tensor] | None) -> Tensor:
        """Transform `(b, n, d)`; the masks, `(b, 1, n)`, are of the rate that comes in and of the one that goes out."""
        if self.resample is not None and not self.decodes:
            x = self.resample(x.transpose(1, 2), before, memory).transpose(1, 2)
        slow = before if self.decodes else after
        x = self.transformer(x, None if slow is None else slow[:, 0], memory)
        if self.resample is not None and self.decodes:
            x = self.resample(x.transpose(1, 2), before, memory).transpose(1, 2)
        return x


class _PatchCodec(Network):
    """What patch encoder and decoder share, which is all but the direction."""

    decodes: bool
    strides: list[int]

    def __init__(
        self,
        *,
        width: int,
        base: int,
        patch: int,
        strides: Sequence[int],
        depths: Sequence[int],
        heads: int,
        window: int | None = 64,
        channels: int = 1,
        hidden: int | None = None,
        causal: bool = False,
        layer_scale: float = 0.01,
        qk_norm: bool = True,
        gated: bool = True,
        eps: float = 1e-2,
    ) -> None:
        if len(strides) != len(depths) or not strides:
            raise UserError(f"codec: {len(strides)} strides and {len(depths)} depths should be as many, one at least")
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
        # In the order in which they act.
        self.strides = list(reversed(strides) if self.decodes else strides)
        self.stages = nn.ModuleList(reversed(stages) if self.decodes else stages)
        self.embed = nn.Linear(width if self.decodes else channels * patch, base)
        nn.init.zeros_(self.embed.bias)
        self.out = nn.Linear(base, channels * patch if self.decodes else width)


class PatchEncoder(_PatchCodec, Encoder):
    """Reads sound into latents by transformers over patches (TAAE, arXiv 2411.19842, section 3.1).

    Each stage is a strided convolution, if its stride is above 1, and a transformer after it.

    Args:
        width: Width of the latents.
        base: Width of the transformers.
        patch: Samples of a patch.
        strides: Strides of the stages.
        depths: Blocks of each stage's transformer.
        heads: Heads of each block.
        window: See `SequenceTransformer`, as are the other arguments.
        channels: Channels of the signal.
        hidden: Hidden width of the perceptrons.
        causal: Latent i depends on the signal up to the end of its step only.
        layer_scale: Start of the scales of each branch.
        qk_norm: Queries and keys are normalized.
        gated: The perceptrons are gated.
        eps: Epsilon of the layer norms.

    Raises:
        UserError: Sizes that don't fit each other.
    """

    decodes = False

    def forward(self, signal: Tensor, mask: Tensor | None = None, memory: list[Tensor] | None = None) -> Tensor:
        """Return the latents of sounds."""
        x = signal.reshape(signal.shape[0], self.channels, -1, self.patch).transpose(1, 2).flatten(2)
        x = self.embed(x)
        rate = self.rate // self.patch
        for level, stage in enumerate(self.stages):
            before = at_rate(mask, rate, 1)
            rate = rate // self.strides[level]
            x = stage(x, before, at_rate(mask, rate, 1), memory)
        latents: Tensor = self.out(x)
        return latents


class PatchDecoder(_PatchCodec, Decoder):
    """Makes sound from latents by transformers over patches: the mirror of `PatchEncoder`, whose arguments it takes.

    Strides and depths are in the encoder's order. Where causal, sample i depends on latents up to `i // downsample`.
    """

    decodes = True

    def forward(
        self, latents: Tensor, mask: Tensor | None, grid: list[int], memory: list[Tensor] | None = None
    ) -> Tensor:
        """Return the sounds that latents stand for."""
        x = self.embed(latents)
        rate = 1
        for level, stage in enumerate(self.stages):
            before = at_rate(mask, rate, 1)
            rate = rate * self.strides[level]
            x = stage(x, before, at_rate(mask, rate, 1), memory)
        patches = self.out(x).reshape(x.shape[0], x.shape[1], self.channels, self.patch)
        return zero_invalid(patches.transpose(1, 2).flatten(2), at_rate(mask, self.rate, 1))
