"""Windowed rotary transformer over sequences `(b, n, d)`, and attention within separate windows.

The transformer is the whole of a ViT or TAAE, and the `middle` or `inner` of convolutional codecs (Mimi).

In streaming, a causal attention layer stores the values and unrotated keys of the last `context` steps in the memory
(see `convolution.py`). Positions are counted from the first stored key, with the same result, because rotary attention
depends on differences of positions only.
"""

from typing import Annotated

import torch
from torch import Tensor, nn
from torch.nn import functional

from varitok import UserError

from .attention import Attention, Rotary, Span, attention_spans, near
from .convolution import prepend_context

__all__ = ["LocalAttention", "SequenceTransformer"]


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
        scale: float,
        qk_norm: bool,
        gated: bool,
        eps: float,
    ) -> None:
        super().__init__()
        self.attention_norm = nn.LayerNorm(width, eps)
        self.attention = Attention(width, heads, qk_norm, eps)
        self.mlp_norm = nn.LayerNorm(width, eps)
        self.mlp = _Perceptron(width, hidden, gated)
        self.attention_scale = nn.Parameter(torch.full((width,), float(scale)))
        self.mlp_scale = nn.Parameter(torch.full((width,), float(scale)))

    def forward(
        self,
        x: Tensor,
        turn: tuple[Tensor, Tensor],
        spans: list[Span],
        causal: bool,
        context: int,
        memory: list[Tensor] | None,
    ) -> Tensor:
        attended = self.attention(self.attention_norm(x), turn, spans, causal, context, memory)
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
        _check_heads(width, heads)
        self.width = width
        self.axes = axes
        self.causal = causal
        self.window = window or 0
        self.context = max(self.window - 1, 0)
        self.slot = 0
        self.obstacle = "" if causal and window else "a transformer isn't causal, or has no window"
        self.rotary = Rotary(width // heads, base, axes)
        self.blocks = nn.ModuleList(
            _Block(width, heads, hidden or 4 * width, layer_scale, qk_norm, gated, eps) for _ in range(depth)
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
        # Causal attention needs no mask if invalid tokens are a suffix; with free or dropped tokens, they may not be.
        shown = mask if free > 0 or some is not None or not self.causal else None
        n = x.shape[1]
        spans = [Span(0, n, 0, context + n, None)]
        whole = self.window == 0 and not (self.causal and self.axes == 3) and shown is None
        if not whole and x.is_cuda and some is None and memory is None and not torch.jit.is_scripting():  # type: ignore[attr-defined]
            spans = attention_spans(n, frame, self.causal, self.window, shown, x)
        elif not whole:
            spans = [Span(0, n, 0, context + n, self._allowed(x, step, shown, context, memory))]
        turn = self.rotary(positions)
        for block in self.blocks:
            x = block(x, turn, spans, self.causal and whole, context, memory)
        return x

    def _allowed(
        self, x: Tensor, step: Tensor, shown: Tensor | None, context: int, memory: list[Tensor] | None
    ) -> Tensor:
        """Return which keys tokens may attend to, bool `(1 or b, 1, n, context + n)`, given the keys' steps."""
        allowed = near(step[:, context:], step, self.causal, self.window)[:, None]
        if memory is not None and context > 0:
            real = torch.ones_like(x[:, :, 0]) if shown is None else shown.to(x.dtype)
            shown = prepend_context(real, memory, self.slot, context, 1) > 0
        if shown is not None:
            # Each token may attend to itself: softmax over no key at all is NaN.
            every = torch.arange(context + x.shape[1], device=x.device)
            allowed = allowed & (shown[:, None, None, :] | (every[context:, None] == every))
        return allowed


class LocalAttention(nn.Module):
    """Attention within windows side by side, `x + attention(norm(x))`, with rotary positions (SNAC, arXiv 2410.14411).

    Args:
        width: Width of the tokens.
        heads: Attention heads; `width / heads` is even.
        window: Tokens in a window; the last one may have fewer.
        eps: Epsilon of the layer norm.
        base: Base of the rotary wavelengths.

    Raises:
        UserError: The heads don't fit the width.
    """

    obstacle = "attention within windows looks ahead"

    def __init__(
        self,
        width: int,
        heads: int,
        window: int,
        eps: Annotated[float, "(0, inf)"] = 1e-5,
        base: Annotated[float, "(0, inf)"] = 10000.0,
    ) -> None:
        super().__init__()
        _check_heads(width, heads)
        self.width = width
        self.window = window
        self.rotary = Rotary(width // heads, base)
        self.norm = nn.LayerNorm(width, eps)
        self.attention = Attention(width, heads, qk_norm=False, eps=eps)

    def forward(self, x: Tensor, mask: Tensor | None = None, memory: list[Tensor] | None = None) -> Tensor:
        """Transform tokens `(b, n, width)`; `mask` is bool `(b, n)`, True for valid tokens, a prefix."""
        b, n, width = x.shape
        missing = -n % self.window
        windows = functional.pad(x, [0, 0, 0, missing]).reshape(-1, self.window, width)
        places = torch.arange(self.window, device=x.device)
        allowed: Tensor | None = None
        if mask is not None or torch.jit.is_scripting() or self._is_ragged(n):  # type: ignore[attr-defined]
            valid = torch.ones_like(x[:, :, 0]) if mask is None else mask.to(x.dtype)
            shown = functional.pad(valid, [0, missing]).reshape(-1, 1, 1, self.window) > 0
            # Each token may attend to itself: softmax over no key at all is NaN.
            allowed = shown | (places[:, None] == places)
        spans = [Span(0, self.window, 0, self.window, allowed)]
        y = self.attention(self.norm(windows), self.rotary(places[None, :, None]), spans, False, 0, None)
        return x + y.reshape(b, -1, width)[:, :n]  # type: ignore[no-any-return]

    @torch.jit.unused
    def _is_ragged(self, n: int) -> bool:
        """Return whether the last window is incomplete, or may be: an exported graph has any number of tokens."""
        return torch.compiler.is_exporting() or n % self.window > 0


def _check_heads(width: int, heads: int) -> None:
    if width % (2 * heads):
        raise UserError(f"transformer: width={width} should be a multiple of twice its heads={heads}")
