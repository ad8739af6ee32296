"""Self-attention for all networks, and a plain pre-norm transformer.

If every token may attend to every other, no mask is passed, so that GPUs use their fastest kernel (flash attention).
"""

import torch
from torch import Tensor, nn
from torch.nn import functional

from varitok import UserError

from .convolution import prepend_context

__all__ = ["Attention", "Rotary", "Transformer", "attend"]


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

    With several axes, each rotates an equal share of the channel pairs, with its own wavelengths.

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

    def forward(self, x: Tensor, positions: Tensor) -> Tensor:
        """Rotate queries or keys `(b, heads, n, d)` by their positions, `(b, n, axes)` or `(1, n, axes)`."""
        angles = (positions[:, None, :, :, None] * self.rates).sum(3)
        cos, sin = angles.cos().to(x.dtype), angles.sin().to(x.dtype)
        first, second = x.chunk(2, dim=-1)
        return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)


class Attention(nn.Module):
    """Self-attention with rotary positions and a cache of earlier chunks' keys and values.

    Args:
        width: Width of the tokens.
        heads: Attention heads; divides the width.
        base: Base of the rotary wavelengths.
        axes: Number of coordinates of a token's position.
        qk_norm: Apply a layer norm to the queries and keys of each head (arXiv 2302.05442).
        eps: Epsilon of these norms.
    """

    def __init__(self, width: int, heads: int, base: float, axes: int, qk_norm: bool, eps: float) -> None:
        super().__init__()
        self.heads = heads
        self.slot = 0
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.out = nn.Linear(width, width, bias=False)
        each = width // heads
        self.rotary = Rotary(each, base, axes)
        self.q_norm: nn.Module = nn.LayerNorm(each, eps) if qk_norm else nn.Identity()
        self.k_norm: nn.Module = nn.LayerNorm(each, eps) if qk_norm else nn.Identity()

    def forward(
        self,
        x: Tensor,
        positions: Tensor,
        allowed: Tensor | None,
        causal: bool,
        context: int,
        memory: list[Tensor] | None,
    ) -> Tensor:
        """Return the attention output, `(b, n, width)`.

        Args:
            x: Tokens `(b, n, width)`.
            positions: Positions of the keys, `(1 or b, context + n, axes)`.
            allowed: bool, broadcastable to `(b, heads, n, context + n)`; if None, `causal` decides.
            causal: Whether tokens attend to no later token.
            context: Number of earlier tokens whose keys and values are in `memory`.
            memory: State of earlier chunks.
        """
        b, n, width = x.shape
        q, k, v = split_heads(self.qkv(x), self.heads)
        q, k = self.q_norm(q), self.k_norm(k)
        if memory is not None and context > 0:
            k, v = prepend_context(torch.cat([k, v], dim=-1), memory, self.slot, context, 2).chunk(2, dim=-1)
        q, k = self.rotary(q, positions[:, positions.shape[1] - n :]), self.rotary(k, positions)
        y = functional.scaled_dot_product_attention(q, k, v.to(q.dtype), attn_mask=allowed, is_causal=causal)
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
