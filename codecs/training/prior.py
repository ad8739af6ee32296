"""Training a prior on the codes of a frozen tokenizer."""

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
    """Codes of a batch of signals as rows of symbols.

    Attributes:
        contexts: int64 `(b, n, 2 + sources)`, inputs of the prior.
        row: int64 `(b, n)`, the symbols.
        valid: bool `(b, n)`, symbols of the signal's valid part.
        entries: int64, the valid codes as entries of the counted alphabets, alphabet after alphabet.
        bits: Bits of these, whole bits for each.
    """

    contexts: Tensor
    row: Tensor
    valid: Tensor
    entries: Tensor
    bits: int


class Source(Protocol):
    """A frozen tokenizer (`varitok.export.exporters.prior.Tokenizer`).

    Attributes:
        axis: The axis of variable length: "tokens" for ordered tokens, else "codebooks".
        most: Largest length along it.
        counted: Entries of each alphabet that is counted: each codebook, or each digit of a very large one.
        sizes: Symbols of each kind.
        places: Numbers of tokens.
        sources: Symbols that each sees by name.
    """

    axis: str
    most: int
    counted: list[int]
    sizes: list[int]
    places: int
    sources: int

    def rows(self, signal: Tensor, lengths: Tensor, kept: int | None = None) -> Rows:
        """Encode signals, and keep `kept` tokens or codebooks; all if None."""
        ...


class PriorTraining(Training):
    """Trains a `Prior`; every other batch has fewer tokens, or codebooks, a number drawn anew for each.

    Args:
        prior: What is trained.
        source: Makes the codes.
        optimizer: Makes the prior's optimizer from parameter groups.
        options: See `Training`.
    """

    prior: Prior
    counts: Tensor

    def __init__(self, prior: Prior, source: Source, optimizer: MakeOptimizer, **options: object) -> None:
        super().__init__("prior", prior, optimizer, **options)  # type: ignore[arg-type]
        self.source = source
        # How often each entry was seen: what a model needs that knows nothing else.
        self.register_buffer("counts", torch.zeros(sum(source.counted), dtype=torch.int64))

    @property
    def evaluated(self) -> Prior:
        """The prior to evaluate and to export: the averaged one if there is one."""
        found: Prior = self.average.codec if self.average else self.prior  # type: ignore[assignment]
        return found

    def training_step(self, batch: Batch, batch_idx: int) -> STEP_OUTPUT:
        """Train on one batch."""
        chance = torch.Generator().manual_seed(hash((self.seed, self.global_rank, self.batch)) & (2**63 - 1))
        kept = None if self.batch % 2 else int(torch.randint(1, self.source.most + 1, (), generator=chance))
        with torch.no_grad():
            rows = self.source.rows(normalize(batch.signal), batch.lengths, kept)
            self.counts += sum_over_ranks([torch.bincount(rows.entries, minlength=len(self.counts))])[0]
        due = self.begin_batch()
        factor = self.factor(self.update)
        with self.recompute:
            nats = self.prior.nats(rows.contexts, rows.row)[rows.valid]
        loss = nats.mean()
        self.learn(self.learning, loss)
        values = {"loss": loss, "loss/of_packed": nats.sum() / (rows.bits * math.log(2))}
        if due:
            values["grad_norm"] = self.end_update(factor)
        self.log_values(values, factor)
        return None
