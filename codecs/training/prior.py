"""Training of a prior on the codes of a frozen tokenizer."""

import math
from typing import NamedTuple, Protocol

import torch
from pytorch_lightning.utilities.types import STEP_OUTPUT
from torch import Tensor

from varitok.data.batch import Batch, normalize

from ..distributed import sum_over_ranks
from ..networks.code_prior import Prior
from .base import MakeOptimizer, Training

__all__ = ["PriorTraining", "Rows", "Source"]


class Rows(NamedTuple):
    """The codes of a batch, serialized into one symbol sequence per signal.

    Attributes:
        contexts: int64 `(b, n, 2 + sources)`, the prior's input: kind, token number and source symbols.
        row: int64 `(b, n)`, symbols, the prior's targets.
        valid: bool `(b, n)`, True for symbols of the signal's valid part; None if all are.
        entries: int64 `(m,)`, valid codes as indices into the concatenated counted alphabets.
        bits: Packed size of the valid codes, in bits.
    """

    contexts: Tensor
    row: Tensor
    valid: Tensor | None
    entries: Tensor
    bits: int


class Source(Protocol):
    """A frozen tokenizer (`varitok.export.exporters.prior.Tokenizer`).

    Attributes:
        axis: Axis of variable length: "tokens" for ordered tokens, else "codebooks".
        most: Maximum length along it.
        counted: Size of each alphabet whose symbols are counted: a codebook, or a digit of a very large one.
        sizes: Number of symbols of each kind.
        places: Number of ordered tokens; 1 for placed tokens.
        sources: Number of earlier symbols that are inputs of each symbol.
    """

    axis: str
    most: int
    counted: list[int]
    sizes: list[int]
    places: int
    sources: int

    def rows(self, signal: Tensor, lengths: Tensor | None, kept: int | None = None) -> Rows:
        """Encode signals `(b, c, *grid)`, and keep `kept` tokens or codebooks; all if None.

        `lengths` are their valid steps, int64 `(b,)`; None for all.
        """
        ...


class PriorTraining(Training):
    """The training module of a `Prior`; every other batch is cut to a random number of tokens or codebooks.

        loss = mean over valid symbols of -log p(symbol | context)

    Args:
        prior: Prior to train.
        source: Frozen tokenizer that encodes the batches.
        optimizer: Builds the prior's optimizer from parameter groups.
        options: See `Training`.
    """

    prior: Prior
    counts: Tensor

    def __init__(self, prior: Prior, source: Source, optimizer: MakeOptimizer, **options: object) -> None:
        super().__init__("prior", prior, optimizer, **options)  # type: ignore[arg-type]
        self.source = source
        # Number of occurrences of each entry, the parameters of an order-0 model.
        self.register_buffer("counts", torch.zeros(sum(source.counted), dtype=torch.int64))

    @property
    def evaluated(self) -> Prior:
        """The prior to evaluate and to export: its EMA if there is one."""
        self.settle()
        found: Prior = self.average.codec if self.average else self.prior  # type: ignore[assignment]
        return found

    def training_step(self, batch: Batch, batch_idx: int) -> STEP_OUTPUT:
        """Train on one batch."""
        chance = torch.Generator().manual_seed(hash((self.seed, self.global_rank, self.batch)) & (2**63 - 1))
        kept = None if self.batch % 2 else int(torch.randint(1, self.source.most + 1, (), generator=chance))
        with torch.no_grad():
            rows = self.source.rows(normalize(batch.signal), None if batch.whole else batch.lengths, kept)
            # Not torch.bincount, which waits for the largest entry.
            seen = torch.zeros_like(self.counts).index_add_(0, rows.entries, torch.ones_like(rows.entries))
            self.counts += sum_over_ranks([seen])[0]
        due = self.begin_batch()
        factor = self.factor(self.update)
        with self.recompute:
            nats = self.prior.nats(rows.contexts, rows.row)
        nats = nats.flatten() if rows.valid is None else nats[rows.valid]
        loss = nats.mean()
        self.learn(self.learning, loss)
        values = {"loss": loss, "loss/of_packed": nats.sum() / (rows.bits * math.log(2))}
        if due:
            values["grad_norm"] = self.end_update(factor)
        self.log_values(values, factor)
        return None
