"""Networks over sequences `(b, n, d)`: windowed rotary transformers, LSTMs, and the patch codec TAAE.

Transformers and LSTMs can be the `middle` or `inner` of convolutional codecs (Mimi, EnCodec). TAAE (arXiv 2411.19842)
consists of transformers between patches and latents.

In streaming, a causal attention layer stores the values and unrotated keys of the last `context` steps in the memory
(see `convolution.py`). Positions are counted from the first stored key, with the same result, because rotary attention
depends on differences of positions only.
"""

import math
from collections.abc import Sequence
from typing import Annotated

import torch
from torch import Tensor, nn
from torch.nn import functional

from varitok import UserError

from .attention import Attention
from .contract import Decoder, Encoder, Network, Precise
from .convolution import Convolution, TransposedConvolution, at_rate, prepend_context, recall, zero_invalid

__all__ = ["PatchDecoder", "PatchEncoder", "Recurrent", "SequenceTransformer"]


class _Perceptron(nn.Module):
    """Two-layer perceptron with GELU, or SwiGLU (arXiv 2002.05202)."""

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
    """Pre-norm transformer block with LayerScale: `x + s_1 attention(norm(x))`, then `x + s_2 mlp(norm(x))`."""

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
    """Pre-norm transformer with rotary positions and LayerScale (Mimi, arXiv 2410.00037, section 3.3.1; TAAE).

    A step can be one token, or a frame: tokens without a position, then rows x columns tokens. Causal attention over
    frames is block-causal: tokens attend to all tokens of their own and of earlier frames.

    Args:
        width: Width of the tokens.
        depth: Number of blocks.
        heads: Attention heads per block; `width / heads` is even.
        hidden: Hidden width of the perceptrons; four times the width if None.
        causal: Whether tokens attend to no later step.
        window: Attention window in steps, including the token's own: `i - j < window`, and if not causal also
            `j - i < window`; None for all.
        layer_scale: Initial LayerScale of each branch (arXiv 2103.17239); 1 is close to none.
        qk_norm: Apply a layer norm to the queries and keys of each head (arXiv 2302.05442).
        gated: Use SwiGLU instead of GELU perceptrons.
        eps: Epsilon of the layer norms; TAAE needs 1e-2, otherwise the norm amplifies quiet steps too much.
        base: Base of the rotary wavelengths.
        axes: Number of coordinates of a token's position: 1 (step), 2 (row, column of one frame) or 3 (step, row,
            column).

    Attributes:
        context: Earlier steps to which a causal layer attends; 0 if unlimited.
        slot: Index in the memory, for a mask of the stored keys: 1 for valid steps, 0 before the start.

    Raises:
        UserError: Inconsistent sizes.
    """

    def __init__(
        self,
        width: int,
        depth: Annotated[int, "[0, 1000]"],
        heads: int,
        hidden: int | None = None,
        causal: bool = False,
        window: int | None = None,
        layer_scale: float = 0.01,
        qk_norm: bool = False,
        gated: bool = False,
        eps: Annotated[float, "(0, inf)"] = 1e-5,
        base: Annotated[float, "(0, inf)"] = 10000.0,
        axes: int = 1,
    ) -> None:
        super().__init__()
        if axes not in (1, 2, 3):
            raise UserError(f"transformer: axes={axes} should be 1 for sequences, 2 for images, or 3 for frames")
        if width % (2 * heads):
            raise UserError(f"transformer: width={width} should be a multiple of twice its heads={heads}")
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
        """Transform tokens `(b, n, width)`, ordered by step, row, column.

        Args:
            x: The tokens.
            mask: bool `(b, n)`, True for valid tokens.
            memory: State of earlier chunks.
            rows: Rows of tokens in a frame.
            columns: Columns of tokens in a frame.
            free: Number of tokens of each step without a position, before its rows.
            some: int64 `(b, n)`, indices of these tokens in the full sequence, if tokens were dropped.
        """
        frame = free + rows * columns
        context = self.context * frame if memory is not None else 0
        index = torch.arange(context + x.shape[1], device=x.device)[None] if some is None else some
        step = index // frame
        positions = index[:, :, None]
        if self.axes > 1:
            # Not by `%`, which ONNX export supports for constants only.
            inside = (index - step * frame - free).clamp(min=0)
            row = inside // columns
            positions = torch.stack([step, row, inside - row * columns], dim=2)[:, :, 3 - self.axes :]
        allowed: Tensor | None = None
        # Causal attention needs no mask if invalid tokens are a suffix; with free or dropped tokens, they may not be.
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
                # Each token may attend to itself: softmax over no key at all is NaN.
                every = torch.arange(context + x.shape[1], device=x.device)
                allowed = allowed & (shown[:, None, None, :] | (every[context:, None] == every))
        causal = self.causal and allowed is None
        for block in self.blocks:
            x = block(x, positions, allowed, causal, context, memory)
        return x


class _LSTM(nn.Module):
    """Single LSTM layer, for TorchScript and streaming.

    ONNX export emits the LSTM operator, since torch.export would fix the sequence length.

    Args:
        inputs: Input size.
        outputs: Hidden size.

    Attributes:
        slot: Index in the memory, which holds the hidden and the cell state.
    """

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.slot = 0
        self.lstm = nn.LSTM(inputs, outputs, batch_first=True)

    def forward(self, x: Tensor, memory: list[Tensor] | None = None) -> Tensor:
        """Transform `(b, n, inputs)` to `(b, n, outputs)`."""
        start = x.new_zeros([x.shape[0], 2, self.lstm.hidden_size])
        if memory is not None:
            start = recall(memory, self.slot, x, list(start.shape))
        hidden, cell = start[:, 0].unsqueeze(0), start[:, 1].unsqueeze(0)
        if torch.jit.is_scripting():  # type: ignore[attr-defined]
            y, (hidden, cell) = self.lstm(x, (hidden.contiguous(), cell.contiguous()))
        else:
            y, hidden, cell = self._eager(x, hidden, cell)
        if memory is not None:
            memory[self.slot] = torch.stack([hidden[0], cell[0]], dim=1)
        return y  # type: ignore[no-any-return]

    @torch.jit.unused
    def _eager(self, x: Tensor, hidden: Tensor, cell: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        lstm = self.lstm
        if not torch.onnx.is_in_onnx_export():
            y, (hidden, cell) = lstm(x, (hidden.contiguous(), cell.contiguous()))
            return y, hidden, cell

        def gates(name: str) -> Tensor:
            """Reorder torch's gates (input, forget, cell, output) to ONNX's (input, output, forget, cell)."""
            i, f, c, o = lstm.get_parameter(name).chunk(4)
            return torch.cat([i, o, f, c])

        weights = [gates("weight_ih_l0")[None], gates("weight_hh_l0")[None]]
        bias = torch.cat([gates("bias_ih_l0"), gates("bias_hh_l0")])[None]
        last = [1, x.shape[0], lstm.hidden_size]
        y, hidden, cell = torch.onnx.ops.symbolic_multi_out(
            "LSTM",
            [x.transpose(0, 1), *weights, bias, None, hidden, cell],
            {"hidden_size": lstm.hidden_size},
            dtypes=[x.dtype] * 3,
            shapes=[[x.shape[1], 1, x.shape[0], lstm.hidden_size], last, last],
            version=14,
        )
        return y.squeeze(1).transpose(0, 1), hidden, cell  # y: (n, 1, b, outputs) -> (b, n, outputs)


class Recurrent(nn.Module):
    """LSTM with a residual connection around all layers (EnCodec, arXiv 2210.13438, section 3.1: two layers).

    Args:
        width: Width of the tokens.
        depth: Number of layers.
        bidirectional: Use bidirectional layers of half the width per direction (SpeechTokenizer's encoder has the full
            width); each sample's backward direction starts at its last valid step.
    """

    def __init__(self, width: int, depth: Annotated[int, "[0, 1000]"] = 2, bidirectional: bool = False) -> None:
        super().__init__()
        if bidirectional and width % 2:
            raise UserError(f"recurrent: width={width} should be even if bidirectional")
        self.bidirectional = bidirectional
        self.obstacle = "a recurrent layer is bidirectional" if bidirectional else ""
        ways = 2 if bidirectional else 1
        self.onward = nn.ModuleList(_LSTM(width, width // ways) for _ in range(depth))
        self.returning = nn.ModuleList(_LSTM(width, width // ways) for _ in range(depth if bidirectional else 0))

    def forward(self, x: Tensor, mask: Tensor | None = None, memory: list[Tensor] | None = None) -> Tensor:
        """Transform tokens `(b, n, width)`; `mask` is bool `(b, n)`, True up to each sample's length."""
        y = x
        if not self.bidirectional:
            for layer in self.onward:
                y = layer(y, memory)
            return x + y
        # Reverse each sample's valid steps, so that the backward direction starts at its own end.
        positions = torch.arange(x.shape[1], device=x.device)[None].expand(x.shape[0], -1)
        lengths = positions[:, :1] + x.shape[1] if mask is None else mask.sum(1, keepdim=True)
        turned = torch.where(positions < lengths, lengths - 1 - positions, positions).unsqueeze(2)
        for layer, back in zip(self.onward, self.returning):  # noqa: B905 (TorchScript knows no strict)
            reverse = back(y.gather(1, turned.expand(-1, -1, y.shape[2])))
            y = torch.cat([layer(y), reverse.gather(1, turned.expand(-1, -1, reverse.shape[2]))], dim=2)
        return x + y


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
