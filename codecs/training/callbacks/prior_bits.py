"""Bits of the validation codes under a prior, measured during its training and at the end."""

import logging
import math
from collections.abc import Sequence
from pathlib import Path

import pytorch_lightning as pl
import torch
from rich.table import Table
from torch import Tensor

from varitok.data.batch import Batch, normalize
from varitok.data.datamodule import DataModule

from ...distributed import sum_over_ranks
from ...evaluation.table import wide_console, write_rows
from ..base import Training
from ..prior import PriorTraining
from .periodic import Periodic

__all__ = ["PriorBits", "order_zero"]

_log = logging.getLogger(__name__)


class PriorBits(Periodic):
    """The callback that measures the validation codes' bits periodically and at the end of the run.

    The last table is printed and written to `evaluation/bits.csv` in the run's folder. It has a row for each kept
    number of tokens or codebooks: mean bits per signal packed, under an order-0 model of the training codes, and under
    the prior. All measurements are logged as `val/bits@k`.

    Args:
        every: Updates between two measurements.
        keeps: Numbers of tokens or codebooks to keep; None: 1, 2, 4, ... and all.
    """

    def __init__(self, every: int, keeps: Sequence[int] | None = None) -> None:
        super().__init__(every)
        self.keeps = keeps

    @torch.inference_mode()
    def act(self, trainer: pl.Trainer, module: Training, last: bool) -> None:
        """Measure; at the end print and write the table."""
        assert isinstance(module, PriorTraining)
        data: DataModule = trainer.datamodule  # type: ignore[attr-defined]
        most = module.source.most
        keeps = sorted(self.keeps or {*(1 << power for power in range(most.bit_length())), most})
        sums = torch.zeros(len(keeps), 4, dtype=torch.float64, device=module.device)
        for batch in data.val_dataloader():
            for index, kept in enumerate(keeps):
                sums[index] += _bits(module, batch, kept)
        (sums,) = sum_over_ranks([sums])
        rows = []
        for kept, (signals, packed, order, learned) in zip(keeps, sums.tolist(), strict=True):
            found = {"kept": kept, "packed": packed / signals, "order_0": order / signals, "prior": learned / signals}
            saved = {
                "percent_saved": 100 * (1 - learned / packed),
                "percent_of_order_0_saved": 100 * (1 - learned / order),
            }
            rows.append(found | saved)
        module.log_evaluation({f"val/bits@{row['kept']}": row["prior"] for row in rows})
        if not last or not trainer.is_global_zero:
            return
        folder = Path(trainer.default_root_dir) / "evaluation"
        about = {"bits": "of a signal, mean of the validation split; of the prior as it is trained, in floats"}
        write_rows(folder / "bits.csv", data.splits.about | about, rows)
        table = Table(*rows[0], box=None)
        for row in rows:
            table.add_row(*(f"{value:.0f}" if name == "kept" else f"{value:.2f}" for name, value in row.items()))
        wide_console().print(table)
        _log.info("evaluation: %s", folder)


def _bits(module: PriorTraining, batch: Batch, kept: int) -> Tensor:
    """Return float64 `(4,)`: number of signals, and their codes' bits packed, by order 0 and by the prior."""
    if not len(batch.signal):
        return torch.zeros(4, dtype=torch.float64, device=module.device)
    signal = normalize(batch.signal.to(module.device))
    rows = module.source.rows(signal, None if batch.whole else batch.lengths, kept)
    nats = module.evaluated.nats(rows.contexts, rows.row)
    nats = (nats.flatten() if rows.valid is None else nats[rows.valid]).double().sum()
    order = order_zero(module.counts, module.source.counted)[rows.entries].sum()
    found = [len(signal), rows.bits, order / math.log(2), nats / math.log(2)]
    return torch.stack([torch.as_tensor(each, dtype=torch.float64, device=module.device) for each in found])


def order_zero(counts: Tensor, sizes: Sequence[int]) -> Tensor:
    """Compute each entry's cost under add-one smoothed counts, in nats, float64 `(sum of sizes,)`.

        cost_i = -log((count_i + 1) / sum_j (count_j + 1)), j over the alphabet of i

    Args:
        counts: int64 `(sum of sizes,)`, the alphabets' counts concatenated.
        sizes: Sizes of the alphabets.
    """
    parts = torch.split(counts.double() + 1, list(sizes))
    return torch.cat([-(part / part.sum()).log() for part in parts])
