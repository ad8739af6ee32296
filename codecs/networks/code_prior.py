"""A prior over codes: a small causal transformer that computes exact probabilities of the next symbol.

The decoder must compute the encoder's probabilities to the last bit, or everything after the first difference is noise.
Sums of floats depend on the machine, the library and the number of threads. Integer networks (Balle, Johnston and
Minnen, "Integer networks for data compression with latent-variable models", ICLR 2019) are exact anywhere. This one is
trained in floats; its exact form (`Prior.exact`) has the same layers in float64, with weights, activations and logits
rounded to multiples of powers of two, of so few bits that no sum rounds. What isn't a sum is one operation that IEEE
754 rounds in one way only: a division, a square root, a product. So its functions are made of these: squared ReLU
(Primer, arXiv 2109.08668, section 3), a norm without a mean, and `(1 + x / 16) ** 16` for attention's exponential.
"""

import copy
import math

import torch
from torch import Tensor, nn
from torch.nn import functional

from varitok import require_min

__all__ = ["Prior"]

ACTIVATION_BITS, ACTIVATION_BOUND = 12, 64.0  # 19 bits with the sign
WEIGHT_BITS, WEIGHT_BOUND = 14, 4.0  # 17 bits: sums of up to 2^17 products are exact in float64
ATTENTION_BITS = 16
LOGIT_STEPS = 64  # of a nat
BLOCK = 512  # places at once: what attention looks at grows with its square
FAR = -1024.0  # a score of what can't be seen: its weight is 0


class Prior(nn.Module):
    """Chances of each symbol of a code's row, from those before it.

    The input of a symbol is its kind (digit and codebook), the number of its token if tokens are ordered, the
    symbol before it, those of its kind one position back along each axis of the grid, and through attention the last
    `window` positions of the row, with their distances. Before the row there are zeros.

    Args:
        sizes: Symbols of each kind; together they are the vocabulary.
        places: Numbers of ordered tokens; 1 for placed tokens.
        sources: Number of earlier symbols that are inputs of each.
        width: Width of a position.
        depth: Layers.
        heads: Attention heads; scores are scaled by a power of two, so four times a power of them should be the width.
        window: Positions that attention reaches back, its own included.

    Raises:
        UserError: A number is out of range.
    """

    def __init__(
        self,
        sizes: list[int],
        places: int,
        sources: int,
        *,
        width: int = 128,
        depth: int = 3,
        heads: int = 4,
        window: int = 128,
    ) -> None:
        super().__init__()
        require_min({"prior.heads": (heads, 1), "prior.depth": (depth, 0), "prior.window": (window, 2)})
        require_min({"prior.width": (width, heads)})
        self.sizes = tuple(sizes)
        self.window = window
        self.rounds = False
        vocabulary = sum(sizes)
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
        """Shape of one row's memory: `(layers, 2, window - 1, width)`."""
        return len(self.layers), 2, self.window - 1, self.kind.embedding_dim

    def forward(self, contexts: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        """Compute the logits of the next symbols of rows.

        Args:
            contexts: int64 `(b, n, 2 + sources)`: kind, number of the token, symbols of the vocabulary, 1 added, 0 for
                none.
            state: `(b, *state_shape)`, zeros at the start.

        Returns:
            Logits `(b, n, vocabulary)`, meaningful only for the symbol's kind; in the exact form
            integers, 64 to a nat. And the memory after these positions.
        """
        x = self.kind(contexts[..., 0]) + self.place(contexts[..., 1])
        for number, table in enumerate(self.sources):
            x = x + table(contexts[..., 2 + number])
        memories = []
        for number, layer in enumerate(self.layers):
            x, memory = layer(x, state[:, number], self.rounds)
            memories.append(memory)
        logits = _linear(_norm(x, self.rounds), self.head, self.rounds)
        after = torch.stack(memories, dim=1) if memories else state
        return (torch.round(logits * LOGIT_STEPS) if self.rounds else logits), after

    def nats(self, contexts: Tensor, row: Tensor) -> Tensor:
        """Compute the cost of each symbol of rows `(b, n)`, in nats `(b, n)`."""
        state = self.head.weight.new_zeros(len(row), *self.state_shape)
        kinds = torch.arange(len(self.sizes), device=row.device)
        kind_of = kinds.repeat_interleave(torch.tensor(self.sizes, device=row.device))
        found = []
        for part, symbols in zip(torch.split(contexts, BLOCK, 1), torch.split(row, BLOCK, 1), strict=True):
            logits, state = self(part, state)
            logits = logits.masked_fill(kind_of != part[..., :1], -math.inf)
            found.append(functional.cross_entropy(logits.transpose(1, 2).float(), symbols, reduction="none"))
        return torch.cat(found, dim=1)

    def exact(self) -> "Prior":
        """Return the form whose every number is the same on every machine; for evaluation only, on the CPU."""
        found = copy.deepcopy(self).cpu().double().eval().requires_grad_(False)
        found.rounds = True
        for module in found.modules():
            for name, weight in module.named_parameters(recurse=False):
                linear = isinstance(module, nn.Linear) and name == "weight"
                bits, bound = (WEIGHT_BITS, WEIGHT_BOUND) if linear else (ACTIVATION_BITS, ACTIVATION_BOUND)
                weight.copy_(_grid(weight, bits, bound))
        return found


class _Layer(nn.Module):
    """Attention to the last places of a row, and a network at each of them."""

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

    def forward(self, x: Tensor, memory: Tensor, rounds: bool) -> tuple[Tensor, Tensor]:
        """Go on by `(b, n, width)`; the memory `(b, 2, window - 1, width)` has the keys and values before them."""
        queries, keys, values = _linear(_norm(x, rounds), self.project, rounds).chunk(3, dim=-1)
        seen = torch.cat([memory, torch.stack([keys, values], dim=1)], dim=2)
        x = x + _linear(self._attend(queries, seen[:, 0], seen[:, 1], rounds), self.back, rounds)
        hidden = functional.relu(_linear(_norm(x, rounds), self.widen, rounds)).square()
        x = _round_to_grid(x + _linear(_round_to_grid(hidden, rounds), self.narrow, rounds), rounds)
        return x, seen[:, :, seen.shape[2] - self.window + 1 :]

    def _attend(self, queries: Tensor, keys: Tensor, values: Tensor, rounds: bool) -> Tensor:
        b, n, width = queries.shape
        q, k, v = (
            each.reshape(b, -1, self.heads, width // self.heads).transpose(1, 2) for each in (queries, keys, values)
        )
        places, reached = torch.arange(n, device=q.device), torch.arange(n + self.window - 1, device=q.device)
        back = places[:, None] + (self.window - 1) - reached  # 0: itself
        sees = (back >= 0) & (back < self.window)
        distance = self.distance(back.clamp(0, self.window - 1)).permute(2, 0, 1)
        scores = q @ k.transpose(2, 3) * self.scale + distance
        scores = torch.where(sees, scores, torch.full_like(scores, FAR))
        weights = functional.relu(1 + (scores - scores.amax(dim=-1, keepdim=True)) / 16)
        weights = _grid(weights.square().square().square().square(), ATTENTION_BITS, 1.0) if rounds else weights**16
        shares = weights / weights.sum(dim=-1, keepdim=True)
        shares = _grid(shares, ATTENTION_BITS, 1.0) if rounds else shares
        return _round_to_grid((shares @ v).transpose(1, 2).reshape(b, n, width), rounds)


def _norm(x: Tensor, rounds: bool) -> Tensor:
    """Scale to a mean square of 1."""
    size = x.square().sum(dim=-1, keepdim=True) / x.shape[-1] + 2.0**-10
    return _round_to_grid(x / size.sqrt(), rounds)


def _linear(x: Tensor, layer: nn.Linear, rounds: bool) -> Tensor:
    found = x @ layer.weight.T
    return _round_to_grid(found if layer.bias is None else found + layer.bias, rounds)


def _round_to_grid(x: Tensor, rounds: bool) -> Tensor:
    """Round activations, in the exact form."""
    return _grid(x, ACTIVATION_BITS, ACTIVATION_BOUND) if rounds else x


def _grid(x: Tensor, bits: int, bound: float) -> Tensor:
    """Round to multiples of 2 ** -bits, between -bound and bound."""
    return (x * 2.0**bits).round().clamp(-bound * 2.0**bits, bound * 2.0**bits) * 2.0**-bits
