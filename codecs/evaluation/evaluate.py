"""Evaluate a codec at each length of its codes, for all modalities, in training and in `varitok evaluate`."""

from collections.abc import Iterable, Mapping, Sequence
from itertools import pairwise

import torch
import torch.distributed as dist
import torchmetrics

import varitok
from varitok import UserError
from varitok.data.batch import Batch, normalize

from ..metrics import frechet, rate
from ..modalities.base import Modality
from ..modalities.registry import modality_of
from .ladder import Evaluable, Ladder
from .robustness import evaluation_mode
from .table import Row, Table

__all__ = ["evaluate", "versions"]


@torch.inference_mode()
def evaluate(
    codec: Evaluable,
    batches: Iterable[Batch],
    keeps: Sequence[int] | None = None,
    metrics: Sequence[str] | None = None,
    header: Mapping[str, str] | None = None,
    modality: Modality | None = None,
) -> Table:
    """Measure the quality and the bitrate of prefixes of codes.

    >>> from varitok.data.batch import Sample, collate
    >>> images = [torch.full((3, 64, 64), 20 * i, dtype=torch.uint8) for i in range(4)]
    >>> table = evaluate(codec, [collate([Sample(image) for image in images])], keeps=[1, 8])
    >>> [(row["k"], row["bytes"]) for row in table.rows]
    [(1, 2.0), (8, 12.0)]

    Each batch is encoded once, and decoded at each kept number of tokens, if they are ordered, else of codebooks.
    Signals are rounded as in a file before they are compared. Under torch.distributed this is a collective: every
    process calls it with its own shard of the signals and gets the table of all.

    Args:
        codec: Codec to evaluate, on its own device, in evaluation mode; its training modes are restored.
        batches: Batches of signals `(b, c, *grid)` and lengths; images have the size that the codec decodes to. Empty
            batches are skipped.
        keeps: Numbers of tokens or codebooks to keep, in any order; 1, 2, 4, ... and all if None.
        metrics: Names of the modality's metrics; None for its two `shown`.
        header: Entries above the table, before the definitions.
        modality: Modality whose metrics are measured; None for the codec's.

    Raises:
        UserError: A number is out of range, a metric unknown or without its weights, the signals too small or of
            another size than the codec's, or none could be read.
    """
    with evaluation_mode(codec) as device:
        tally = _Tally(codec, modality or modality_of(codec), keeps, metrics, device)
        for batch in batches:
            tally.add(batch)
    tally.gather()
    rounding = {"rounding": tally.modality.rounding}
    return Table(tally.rows(), dict(header or {}) | rounding | tally.definitions() | versions())


class _Tally:
    """Sums over signals, which processes add up, and the table computed from them."""

    def __init__(
        self,
        codec: Evaluable,
        modality: Modality,
        keeps: Sequence[int] | None,
        metrics: Sequence[str] | None,
        device: torch.device,
    ) -> None:
        self.ladder = Ladder(codec, keeps)
        self.modality = modality
        self.meanings: dict[str, str] = getattr(codec, "meanings", {})
        self.device = device
        self.metrics = list(self.modality.shown if metrics is None else metrics)
        networks = {name: build for name in self.metrics if (build := self.modality.metric(name).network)}
        self.names = [name for name in self.metrics if name not in networks]
        self.comparisons = [self.modality.comparison(name, device) for name in self.names]
        rungs = len(self.ladder.keeps)
        # Sum and number of the finite values: a metric may be undefined for a signal.
        self.sums = torch.zeros(2, rungs, len(self.names), dtype=torch.float64, device=device)
        self.prices = torch.zeros(rungs, 2, dtype=torch.float64)  # bits, bytes
        self.amount = torch.zeros(1, dtype=torch.float64)
        self.seen = torch.zeros(3, dtype=torch.int64)  # signals, unreadable files, sum of shortest sides
        self.first_bad = ""
        # For each rung, the codes that it adds to the rung below; empty for a continuous codec.
        self.codebook_sizes: tuple[int, ...] = codec.bottleneck.codebook_sizes
        self.counts = (
            [rate.CodeCounts(self.codebook_sizes, device, self.ladder.layers) for _ in range(rungs)]
            if self.codebook_sizes
            else []
        )
        self.networks = {name: build(device) for name, build in networks.items()}
        # One for each rung, then one for the originals.
        self.moments = {
            name: [frechet.Moments(network.width) for _ in range(rungs + 1)] for name, network in self.networks.items()
        }

    def add(self, batch: Batch) -> None:
        """Evaluate a batch and accumulate its sums."""
        self.seen[1] += len(batch.bad)
        self.first_bad = self.first_bad or next(iter(batch.bad), "")
        if not len(batch.signal):
            return
        signal, lengths = normalize(batch.signal.to(self.device)), batch.lengths.to(self.device)
        real = self.modality.as_written(signal)
        self.seen += torch.tensor([len(real), 0, len(real) * min(real.shape[2:][-2:])])
        self.amount += self.modality.amount(real, batch.lengths)
        code = self.ladder.encode(signal, lengths)
        for name, network in self.networks.items():
            self.moments[name][-1].add(network.features(real, lengths))
        for rung, (start, keep) in enumerate(pairwise([0, *self.ladder.keeps])):
            self.prices[rung] += torch.tensor(self.ladder.price(code, keep), dtype=torch.float64)
            if self.counts:
                self.counts[rung].add(self.ladder.flat(code), self.ladder.cut(code, start, keep))
            fake = self.modality.as_written(self.ladder.decode(code, keep))
            if fake.shape != real.shape:
                there, back = (" x ".join(map(str, reversed(side.shape[2:]))) for side in (real, fake))
                raise UserError(
                    f"{self.modality.plural} of {there} samples, but the codec decodes to {back}: evaluate at the size"
                    " that it was trained at"
                )
            for column, compare in enumerate(self.comparisons):
                values = compare(fake, real, lengths).double().to(self.sums.device, non_blocking=True)
                self.sums[:, rung, column] += torch.stack([values.nansum(), values.isfinite().sum()])
            for name, network in self.networks.items():
                self.moments[name][rung].add(network.features(fake, lengths))

    def gather(self) -> None:
        """Sum over processes.

        Raises:
            UserError: There is no signal.
        """
        if dist.is_available() and dist.is_initialized():
            all_moments = (moment for rungs in self.moments.values() for moment in rungs)
            moments = [sums for moment in all_moments for sums in (moment.count, moment.sum, moment.outer)]
            for values in [self.sums, self.prices, self.amount, self.seen, *moments]:
                shared = values.to(self.device, copy=True)  # NCCL needs device tensors
                dist.all_reduce(shared)
                values.copy_(shared)
            for counts in self.counts:
                counts.gather()
        if not self.seen[0]:
            failed = f"; the first that failed: {self.first_bad}" if self.first_bad else ""
            raise UserError(f"no {self.modality.noun} to evaluate{failed}")

    def rows(self) -> list[Row]:
        """Return a row for each rung."""
        count = int(self.seen[0])
        used = rate.CodeCounts(self.codebook_sizes, self.device, self.ladder.layers)
        rows: list[Row] = []
        for rung, keep in enumerate(self.ladder.keeps):
            bits, packed = self.prices[rung].tolist()
            row: Row = {
                self.ladder.axis: keep,
                "bits": bits / count,
                "bytes": packed / count,
                self.modality.rate.name: bits / float(self.amount),
            }
            total, number = self.sums[:, rung]
            row |= dict(zip(self.names, (total / number).tolist(), strict=True))
            for name, moments in self.moments.items():
                row[name] = frechet.frechet_distance(moments[rung], moments[-1])
            if self.counts:
                used.include(self.counts[rung].rows())
                used.shared = self.counts[rung].shared
                row |= _use(used, self.ladder.kept_layers(keep))
            rows.append(row | {self.modality.plural: count})
        # Rows with fewer codebooks have fewer columns; fill up with NaN.
        columns = dict.fromkeys(name for row in reversed(rows) for name in row)
        return [{name: row.get(name, float("nan")) for name in columns} for row in rows]

    def definitions(self) -> dict[str, str]:
        """Return the definitions of the columns, and the number of unreadable files."""
        side = int(self.seen[2]) // int(self.seen[0])
        meanings = rate.definitions(self.modality.noun, self.ladder.axis, bool(self.counts), self.ladder.runs)
        meanings |= (
            self.meanings
            | {self.modality.rate.name: self.modality.rate.definition}
            | self.modality.definitions(self.metrics, side)
        )
        notes = {"unreadable files left out": str(int(self.seen[1]))} if self.seen[1] else {}
        return notes | {f"column {name}": meaning for name, meaning in meanings.items()}


def _use(counts: rate.CodeCounts, kept: int) -> Row:
    """Return the usage, entropy and perplexity of the first `kept` layers: means, and each one's own if several."""
    codebooks = list(zip(counts.summary(), counts.codebook_sizes, strict=True))[:kept]
    measures = {
        "usage": [codebook.entries / size for codebook, size in codebooks],
        "entropy": [codebook.entropy for codebook, _ in codebooks],
        "perplexity": [codebook.perplexity for codebook, _ in codebooks],
    }
    row: Row = {}
    for name, values in measures.items():
        row[name] = sum(values) / len(values)
        if len(counts.codebook_sizes) > 1:
            row |= {f"{name}_{codebook}": value for codebook, value in enumerate(values)}
    return row


def versions() -> dict[str, str]:
    """Return the versions that results depend on."""
    return {
        "versions": f"varitok {varitok.__version__}, torch {torch.__version__}, torchmetrics {torchmetrics.__version__}"
    }
