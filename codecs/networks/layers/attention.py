"""Self-attention for all networks, and a plain pre-norm transformer.

If every token may attend to every other, no mask is passed, so that GPUs use their fastest kernel (flash attention).
There, causal attention over frames and attention in windows is split into spans: each range of queries attends to the
keys that it may see, and only spans with a border within them have a mask, as small as they are.
"""

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from varitok import UserError

from .convolution import prepend_context

__all__ = ["Attention", "Rotary", "Span", "Transformer", "attend", "attention_spans", "near"]

SPAN = 256  # queries of a span at least, unless a step alone has more


def attend(qkv: Tensor, heads: int = 1, allowed: Tensor | None = None) -> Tensor:
    """Return scaled dot-product self-attention, `(b, n, width)` (arXiv 1706.03762, section 3.2).

    `softmax(q k^T / sqrt(width / heads)) v` in each head.

    Args:
        qkv: Queries, keys and values, `(b, n, 3 * width)`.
        heads: Attention heads; divides the width.
        allowed: bool, broadcastable to `(b, heads, n, n)`, True where a query may attend to a key; None for all.
    """
    q, k, v = split_heads(qkv, heads)
    y = functional.scaled_dot_product_attention(q, k, v, attn_mask=allowed)
    return y.transpose(1, 2).reshape(qkv.shape[0], qkv.shape[1], -1)  # (b, heads, n, d) -> (b, n, heads * d)


def split_heads(qkv: Tensor, heads: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return queries, keys and values `(b, n, 3 * width)` per head, `(b, heads, n, width / heads)` each."""
    b, n, width = qkv.shape
    # (b, n, 3, heads, d) -> (3, b, heads, n, d)
    q, k, v = qkv.view(b, n, 3, heads, width // (3 * heads)).permute(2, 0, 3, 1, 4).unbind(0)
    return q, k, v


class Rotary(nn.Module):
    """Rotary position embedding (RoFormer, arXiv 2104.09864, section 3.4.2), in real arithmetic.

    With several axes, each rotates an equal share of the channel pairs, with its own wavelengths. Cosines and sines are
    computed once for all layers.

    Args:
        width: Width of a head, even.
        base: Base of the wavelengths.
        axes: Number of coordinates of a position.
    """

    rates: Tensor

    def __init__(self, width: int, base: float, axes: int = 1) -> None:
        super().__init__()
        rates = torch.zeros(axes, width // 2)
        shares = torch.arange(width // 2).tensor_split(axes)
        for axis, share in enumerate(shares):
            rates[axis, share] = base ** (-torch.arange(len(share)) / len(share))
        self.register_buffer("rates", rates, persistent=False)

    def forward(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Return cosines and sines, `(1 or b, 1, n, d / 2)`, at positions `(1 or b, n, axes)`."""
        angles = (positions[:, None, :, :, None] * self.rates).sum(3)
        return angles.cos(), angles.sin()


def _rotate(x: Tensor, turn: tuple[Tensor, Tensor]) -> Tensor:
    """Rotate queries or keys `(b, heads, n, d)` by the last n of cosines and sines `(1 or b, 1, m, d / 2)`."""
    n = x.shape[2]
    cos, sin = turn
    cos, sin = cos[:, :, cos.shape[2] - n :].to(x.dtype), sin[:, :, sin.shape[2] - n :].to(x.dtype)
    first, second = x.chunk(2, dim=-1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)


class Span(NamedTuple):
    """A range of queries and the range of keys to which they attend.

    Attributes:
        start, stop: Range of the queries.
        first, last: Range of the keys.
        allowed: bool, broadcastable to `(b, heads, queries, keys)`, True where a query may attend to a key; None for
            all.
    """

    start: int
    stop: int
    first: int
    last: int
    allowed: Tensor | None


def near(queries: Tensor, keys: Tensor, causal: bool, window: int) -> Tensor:
    """Return which keys are within reach, by step: bool `(..., n, m)`.

    Args:
        queries: Step of each query, int64 `(..., n)`.
        keys: Step of each key, int64 `(..., m)`.
        causal: Whether queries attend to no later step.
        window: Steps in the attention window; 0 for all.
    """
    steps, others = queries.unsqueeze(-1), keys.unsqueeze(-2)
    if window == 0:
        return others <= steps if causal else torch.ones_like(others <= steps)
    within = others > steps - window
    return within & (others <= steps if causal else others < steps + window)


@torch.jit.unused
def attention_spans(n: int, frame: int, causal: bool, window: int, mask: Tensor | None, like: Tensor) -> list[Span]:
    """Split the attention of n tokens to each other into spans of whole steps, each of at least `SPAN` queries.

    A token of a sample without any valid key may attend to invalid ones: softmax over no key at all is NaN.

    Args:
        n: Number of tokens.
        frame: Tokens in a step.
        causal: Whether tokens attend to no later step.
        window: Steps in the attention window, including the token's own; 0 for all.
        mask: bool `(b, n)`, True for valid tokens; None for all.
        like: Tensor on the device of the masks.
    """
    steps = n // frame
    limited = causal or window > 0
    each = max(1, SPAN // frame) if limited else steps
    found = []
    for begin in range(0, steps, each):
        end = min(begin + each, steps)
        low = max(0, begin - window + 1) if window else 0
        high = end if causal else min(steps, end + window - 1) if window else steps
        start, stop, first, last = begin * frame, end * frame, low * frame, high * frame
        allowed: Tensor | None = None
        queries, keys = (torch.arange(*ends, device=like.device) for ends in ((start, stop), (first, last)))
        if limited and end - begin > 1:
            allowed = near(queries // frame, keys // frame, causal, window)[None, None]
        if mask is not None:
            shown = mask[:, None, None, first:last]  # (b, n) -> (b, 1, 1, keys)
            if allowed is None:  # all queries of the span see the same keys
                allowed = shown | ~shown.any(3, keepdim=True)
            else:
                allowed = allowed & (shown | (queries[:, None] == keys))
        found.append(Span(start, stop, first, last, allowed))
    return found


class Attention(nn.Module):
    """Self-attention with rotary positions and a cache of earlier chunks' keys and values.

    Args:
        width: Width of the tokens.
        heads: Attention heads; divides the width.
        qk_norm: Apply a layer norm to the queries and keys of each head (arXiv 2302.05442).
        eps: Epsilon of these norms.
    """

    def __init__(self, width: int, heads: int, qk_norm: bool, eps: float) -> None:
        super().__init__()
        self.heads = heads
        self.slot = 0
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.out = nn.Linear(width, width, bias=False)
        each = width // heads
        self.q_norm: nn.Module = nn.LayerNorm(each, eps) if qk_norm else nn.Identity()
        self.k_norm: nn.Module = nn.LayerNorm(each, eps) if qk_norm else nn.Identity()

    def forward(
        self,
        x: Tensor,
        turn: tuple[Tensor, Tensor],
        spans: list[Span],
        causal: bool,
        context: int,
        memory: list[Tensor] | None,
    ) -> Tensor:
        """Return the attention output, `(b, n, width)`.

        Args:
            x: Tokens `(b, n, width)`.
            turn: Cosines and sines of the keys' positions, of `context + n` tokens; see `Rotary`.
            spans: Ranges of queries, in order, and the keys to which they attend.
            causal: Whether tokens attend to no later token, beside the spans.
            context: Number of earlier tokens whose keys and values are in `memory`.
            memory: State of earlier chunks.
        """
        b, n, width = x.shape
        q, k, v = split_heads(self.qkv(x), self.heads)
        q, k = self.q_norm(q), self.k_norm(k)
        if memory is not None and context > 0:
            k, v = prepend_context(torch.cat([k, v], dim=-1), memory, self.slot, context, 2).chunk(2, dim=-1)
        # Under autocast the norms return float32; attention computes in the type of the values.
        q, k = _rotate(q, turn).to(v.dtype), _rotate(k, turn).to(v.dtype)
        if len(spans) == 1:
            y = functional.scaled_dot_product_attention(q, k, v, attn_mask=spans[0].allowed, is_causal=causal)
        else:
            parts: list[Tensor] = []
            for start, stop, first, last, allowed in spans:
                queries, keys, values = q[:, :, start:stop], k[:, :, first:last], v[:, :, first:last]
                parts.append(functional.scaled_dot_product_attention(queries, keys, values, attn_mask=allowed))
            y = torch.cat(parts, dim=2)
        attended: Tensor = self.out(y.transpose(1, 2).reshape(b, n, width))  # (b, heads, n, d) -> (b, n, width)
        return attended


class _PlainAttention(nn.Module):
    """Self-attention without positions."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)

    def forward(self, x: Tensor, mask: Tensor | None) -> Tensor:
        allowed: Tensor | None = None
        if mask is not None:
            allowed = mask[:, None, None, :]
        attended: Tensor = self.out(attend(self.qkv(x), self.heads, allowed))
        return attended


class _Block(nn.Module):
    """Pre-norm transformer block: self-attention and a two-layer perceptron, each with a residual connection."""

    def __init__(self, width: int, heads: int, expansion: float) -> None:
        super().__init__()
        hidden = int(width * expansion)
        self.attention_norm = nn.LayerNorm(width)
        self.attention = _PlainAttention(width, heads)
        self.mlp_norm = nn.LayerNorm(width)
        first, last = nn.Linear(width, hidden), nn.Linear(hidden, width)
        self.mlp = nn.Sequential(first, nn.GELU(), last)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
        nn.init.zeros_(self.attention.out.weight)
        nn.init.zeros_(last.weight)

    def forward(self, x: Tensor, mask: Tensor | None) -> Tensor:
        x = x + self.attention(self.attention_norm(x), mask)
        x = x + self.mlp(self.mlp_norm(x))
        return x


class Transformer(nn.Module):
    """Pre-norm transformer, initially the identity: the last layer of each branch starts at 0 (arXiv 1901.09321).

    Args:
        width: Width of the tokens.
        depth: Number of blocks.
        heads: Attention heads per block; divides `width`.
        expansion: Hidden width of the perceptrons, as a multiple of `width`.
    """

    def __init__(self, width: int, depth: int, heads: int, expansion: float = 4.0) -> None:
        super().__init__()
        if width % heads:
            raise UserError(f"transformer: width={width} should be a multiple of its heads={heads}")
        self.blocks = nn.ModuleList(_Block(width, heads, expansion) for _ in range(depth))

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """Transform tokens `(b, n, width)`; `mask` is bool `(b, n)`, True where a token may be attended to."""
        for block in self.blocks:
            x = block(x, mask)
        return x
