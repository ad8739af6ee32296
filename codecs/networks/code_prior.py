"""Autoregressive prior over codes: a small causal transformer whose probabilities are bit-exact on every machine.

In entropy coding, the decoder must reproduce the encoder's probabilities bit by bit: after one difference, every
further symbol is wrong. Floating-point sums depend on the machine, the library and the number of threads. Integer
networks avoid this (Balle, Johnston and Minnen, "Integer networks for data compression with latent-variable models",
ICLR 2019). This prior is trained in float32. Its exact form (`Prior.exact`) runs the same layers in float64 on
fixed-point numbers: weights, activations and logits have few enough bits that no sum is ever rounded. All other
operations are divisions, square roots and products, whose rounding IEEE 754 specifies. Hence the layers: squared ReLU
(Primer, arXiv 2109.08668, section 3), RMS norm, and `(1 + x / 16) ** 16` instead of `exp(x)` in attention.
"""

import copy
import math
from typing import Annotated

import torch
from torch import Tensor, nn
from torch.nn import functional

from varitok import UserError

__all__ = ["Prior"]

# Fixed-point formats of the exact form: fractional bits, and the largest magnitude.
ACTIVATION_BITS, ACTIVATION_BOUND = 12, 64.0  # 19 bits with the sign
WEIGHT_BITS, WEIGHT_BOUND = 12, 7.5  # 16 bits, so stored as int16: sums of up to 2^19 products are exact in float64
ATTENTION_BITS = 16
LOGIT_STEPS = 64  # integer logits per nat
BLOCK = 512  # positions per forward pass; the memory of attention is quadratic in it
FAR = -1024.0  # masked attention score; its weight is 0


class Prior(nn.Module):
    """Causal transformer over the symbol sequence of a code: p(symbol | earlier symbols).

    The embedding of a position sums those of: the symbol's kind (digit and codebook), its token's index if tokens are
    ordered, and `sources` earlier symbols. These are the previous one, and those of the same kind one step back along
    each axis of the grid. Attention covers the last `window` positions, with a learned bias per distance. Before the
    first symbol, keys and values are zero.

    Args:
        sizes: Number of symbols of each kind; their sum is the vocabulary size.
        places: Number of token indices for ordered tokens; 1 for placed tokens.
        sources: Number of earlier symbols in each position's embedding.
        width: Hidden size.
        depth: Layers.
        heads: Attention heads. Scores are scaled by a power of two, so `width / heads` should be a power of four.
        window: Attention window in positions, including the current one.
        order: "serial", or "delayed": groups of symbols are decoded together, so none sees the others of its group. See
            `varitok.export.bitstream.symbols.Symbols`.

    Raises:
        UserError: `heads` doesn't divide `width`.
    """

    kind_of: Tensor

    def __init__(
        self,
        sizes: list[int],
        places: int,
        sources: int,
        *,
        width: int = 128,
        depth: Annotated[int, "[0, 1000]"] = 3,
        heads: int = 4,
        window: Annotated[int, "[2, inf)"] = 128,
        order: str = "serial",
    ) -> None:
        super().__init__()
        if width % heads:
            raise UserError(f"prior.width={width}: must be a multiple of prior.heads={heads}")
        if order not in ("serial", "delayed"):
            raise UserError(f"prior.order={order}: must be serial or delayed")
        self.order, self.delayed = order, order == "delayed"
        self.sizes = tuple(sizes)
        self.window = window
        self.rounds = False
        vocabulary = sum(sizes)
        kind_of = torch.arange(len(sizes)).repeat_interleave(torch.tensor(sizes))  # kind of each symbol
        self.register_buffer("kind_of", kind_of, persistent=False)
        self.kind = nn.Embedding(len(sizes), width)
        self.place = nn.Embedding(places, width)
        self.sources = nn.ModuleList(nn.Embedding(vocabulary + 1, width) for _ in range(sources))
        self.layers = nn.ModuleList(_Layer(width, heads, window) for _ in range(depth))
        self.head = nn.Linear(width, vocabulary)
        for table in (self.kind, self.place, *self.sources):
            assert isinstance(table, nn.Embedding)
            nn.init.normal_(table.weight, std=0.5 / math.sqrt(2 + sources))
        nn.init.zeros_(self.head.weight)
        nn.init.zeros_(self.head.bias)

    @property
    def state_shape(self) -> tuple[int, ...]:
        """Shape of one sequence's key-value cache: `(layers, 2, window - 1, width)`."""
        return len(self.layers), 2, self.window - 1, self.kind.embedding_dim

    def forward(self, contexts: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        """Compute the logits of the next n symbols of each sequence.

        Args:
            contexts: int64 `(b, n, 2 + sources)`: kind, token index, and earlier symbols as vocabulary indices plus 1,
                or 0 for none. In the delayed order, the number of symbols of its group before it is the third column.
                All sequences have the same groups.
            state: Key-value cache `(b, *state_shape)`, initially zeros.

        Returns:
            Logits `(b, n, vocabulary)`, valid only for symbols of the position's kind; in the exact form integers, 64
            per nat. And the cache after these positions.
        """
        x = self.kind(contexts[..., 0]) + self.place(contexts[..., 1])
        behind = contexts[0, :, 2] if self.delayed else None
        for number, table in enumerate(self.sources):
            x = x + table(contexts[..., 2 + self.delayed + number])
        memories = []
        for number, layer in enumerate(self.layers):
            x, memory = layer(x, state[:, number], behind, self.rounds)
            memories.append(memory)
        logits = _linear(_norm(x, self.rounds), self.head, self.rounds)
        after = torch.stack(memories, dim=1) if memories else state
        return (torch.round(logits * LOGIT_STEPS) if self.rounds else logits), after

    def nats(self, contexts: Tensor, row: Tensor) -> Tensor:
        """Compute the cross-entropy of each symbol of the sequences `row` `(b, n)`: `(b, n)`, in nats."""
        state = self.head.weight.new_zeros(len(row), *self.state_shape)
        found = []
        for part, symbols in zip(torch.split(contexts, BLOCK, 1), torch.split(row, BLOCK, 1), strict=True):
            logits, state = self(part, state)
            logits = logits.masked_fill(self.kind_of != part[..., :1], -math.inf)
            found.append(functional.cross_entropy(logits.transpose(1, 2).float(), symbols, reduction="none"))
        return torch.cat(found, dim=1)

    def exact(self) -> "Prior":
        """Return a frozen fixed-point copy on the CPU, whose outputs are bit-identical on every machine."""
        found = copy.deepcopy(self).cpu().double().eval().requires_grad_(False)
        found.rounds = True
        for module in found.modules():
            for name, weight in module.named_parameters(recurse=False):
                linear = isinstance(module, nn.Linear) and name == "weight"
                bits, bound = (WEIGHT_BITS, WEIGHT_BOUND) if linear else (ACTIVATION_BITS, ACTIVATION_BOUND)
                weight.copy_(_grid(weight, bits, bound))
        return found


class _Layer(nn.Module):
    """Pre-norm block: windowed causal attention and a perceptron with squared ReLU."""

    def __init__(self, width: int, heads: int, window: int) -> None:
        super().__init__()
        self.heads = heads
        self.window = window
        self.scale = 2.0 ** -round(math.log2(width // heads) / 2)
        self.project = nn.Linear(width, 3 * width, bias=False)
        self.back = nn.Linear(width, width, bias=False)
        self.widen = nn.Linear(width, 4 * width, bias=False)
        self.narrow = nn.Linear(4 * width, width, bias=False)
        self.distance = nn.Embedding(window, heads)
        nn.init.zeros_(self.distance.weight)
        for linear in (self.project, self.widen):
            nn.init.normal_(linear.weight, std=width**-0.5)
        for linear in (self.back, self.narrow):
            nn.init.zeros_(linear.weight)

    def forward(self, x: Tensor, memory: Tensor, behind: Tensor | None, rounds: bool) -> tuple[Tensor, Tensor]:
        """Transform `(b, n, width)` and update the cache of earlier keys and values, `(b, 2, window - 1, width)`."""
        queries, keys, values = _linear(_norm(x, rounds), self.project, rounds).chunk(3, dim=-1)
        seen = torch.cat([memory, torch.stack([keys, values], dim=1)], dim=2)
        x = x + _linear(self._attend(queries, seen[:, 0], seen[:, 1], behind, rounds), self.back, rounds)
        hidden = functional.relu(_linear(_norm(x, rounds), self.widen, rounds)).square()
        x = _round_to_grid(x + _linear(_round_to_grid(hidden, rounds), self.narrow, rounds), rounds)
        return x, seen[:, :, seen.shape[2] - self.window + 1 :]

    def _attend(self, queries: Tensor, keys: Tensor, values: Tensor, behind: Tensor | None, rounds: bool) -> Tensor:
        b, n, width = queries.shape
        q, k, v = (  # (b, n, width) -> (b, heads, n, d)
            each.reshape(b, -1, self.heads, width // self.heads).transpose(1, 2) for each in (queries, keys, values)
        )
        places, reached = torch.arange(n, device=q.device), torch.arange(n + self.window - 1, device=q.device)
        back = places[:, None] + (self.window - 1) - reached  # 0 for the query itself
        sees = (back >= 0) & (back < self.window)
        if behind is not None:
            sees = sees & ((back == 0) | (back > behind[:, None]))
        # (n, keys, heads) -> (heads, n, keys)
        distance = self.distance(back.clamp(0, self.window - 1)).permute(2, 0, 1)
        scores = q @ k.transpose(2, 3) * self.scale + distance
        scores = torch.where(sees, scores, torch.full_like(scores, FAR))
        weights = functional.relu(1 + (scores - scores.amax(dim=-1, keepdim=True)) / 16)
        weights = _grid(weights.square().square().square().square(), ATTENTION_BITS, 1.0) if rounds else weights**16
        shares = weights / weights.sum(dim=-1, keepdim=True)
        shares = _grid(shares, ATTENTION_BITS, 1.0) if rounds else shares
        attended = (shares @ v).transpose(1, 2).reshape(b, n, width)  # (b, heads, n, d) -> (b, n, width)
        return _round_to_grid(attended, rounds)


def _norm(x: Tensor, rounds: bool) -> Tensor:
    """Normalize to a root mean square of 1 over the last axis."""
    size = x.square().sum(dim=-1, keepdim=True) / x.shape[-1] + 2.0**-10
    return _round_to_grid(x / size.sqrt(), rounds)


def _linear(x: Tensor, layer: nn.Linear, rounds: bool) -> Tensor:
    found = x @ layer.weight.T
    return _round_to_grid(found if layer.bias is None else found + layer.bias, rounds)


def _round_to_grid(x: Tensor, rounds: bool) -> Tensor:
    """Round activations to fixed point if `rounds`."""
    return _grid(x, ACTIVATION_BITS, ACTIVATION_BOUND) if rounds else x


def _grid(x: Tensor, bits: int, bound: float) -> Tensor:
    """Round to multiples of `2 ** -bits` and clamp to [-bound, bound]."""
    return (x * 2.0**bits).round().clamp(-bound * 2.0**bits, bound * 2.0**bits) * 2.0**-bits
