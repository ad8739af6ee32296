"""A pre-norm transformer on padded sequences."""

from torch import Tensor, nn
from torch.nn import functional

__all__ = ["Transformer"]


class Attention(nn.Module):
    """Multi-head self-attention (arXiv 1706.03762, section 3.2).

    Args:
        width: Width of the tokens; `heads` divides it.
        heads: Number of heads.
    """

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)

    def forward(self, x: Tensor, mask: Tensor | None) -> Tensor:
        """Attend from every token to those that `mask` (bool `(b, n)`, None for all) allows; x is `(b, n, width)`."""
        b, n, width = x.shape
        q, k, v = self.qkv(x).view(b, n, 3, self.heads, width // self.heads).permute(2, 0, 3, 1, 4).unbind(0)
        allowed: Tensor | None = None
        if mask is not None:
            allowed = mask[:, None, None, :]
        y = functional.scaled_dot_product_attention(q, k, v, attn_mask=allowed)
        attended: Tensor = self.out(y.transpose(1, 2).reshape(b, n, width))
        return attended


class Block(nn.Module):
    """Attention and a two-layer perceptron, each behind a layer norm and added to its input.

    Args:
        width: Width of the tokens.
        heads: Number of heads.
        expansion: The perceptron's hidden width over the tokens'.
    """

    def __init__(self, width: int, heads: int, expansion: float) -> None:
        super().__init__()
        hidden = int(width * expansion)
        self.attention_norm = nn.LayerNorm(width)
        self.attention = Attention(width, heads)
        self.mlp_norm = nn.LayerNorm(width)
        self.mlp = nn.Sequential(nn.Linear(width, hidden), nn.GELU(), nn.Linear(hidden, width))
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
        nn.init.zeros_(self.attention.out.weight)
        nn.init.zeros_(self.mlp[2].weight)  # type: ignore[arg-type]

    def forward(self, x: Tensor, mask: Tensor | None) -> Tensor:
        """Transform tokens `(b, n, width)`."""
        x = x + self.attention(self.attention_norm(x), mask)
        x = x + self.mlp(self.mlp_norm(x))
        return x


class Transformer(nn.Module):
    """A stack of blocks that begins as the identity: the last map of each branch starts at zero (arXiv 1901.09321).

    Args:
        width: Width of the tokens.
        depth: Number of blocks.
        heads: Heads of each block; divides `width`.
        expansion: Hidden width of each perceptron over `width`.
    """

    def __init__(self, width: int, depth: int, heads: int, expansion: float = 4.0) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block(width, heads, expansion) for _ in range(depth))

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """Transform tokens `(b, n, width)`; `mask` is bool `(b, n)`, True where a token may be attended to."""
        for block in self.blocks:
            x = block(x, mask)
        return x
