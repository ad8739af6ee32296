"""Evaluation of a codec at each kept length, during training and at the end of a run."""

import logging
from collections.abc import Sequence
from pathlib import Path

import pytorch_lightning as pl

from ...evaluation.evaluate import evaluate
from ...evaluation.table import Table
from ...metrics.rate import USE
from ...modalities.registry import modality_of
from ..base import Training
from ..module import CodecTraining
from .periodic import Periodic

__all__ = ["Evaluation"]

_log = logging.getLogger(__name__)


class Evaluation(Periodic):
    """The callback that evaluates periodically and at the end of the run, with the loop of `varitok evaluate`.

    All evaluations are logged, quality as `val/psnr@k` with k the kept number. The last one is of all validation
    signals. It is also printed, and written to `evaluation/evaluation.csv` and `.png` in the run's folder.

    Args:
        every: Updates between two evaluations.
        metrics: Metrics during training; None: the modality's two plotted ones. The final evaluation measures all that
            are available on this machine.
        keeps: Numbers of tokens or codebooks to keep; None: 1, 2, 4, ... and all.
        limit: Number of signals during training, evenly spaced in the validation split; None: all.
    """

    def __init__(
        self,
        every: int,
        metrics: Sequence[str] | None = None,
        keeps: Sequence[int] | None = None,
        limit: int | None = None,
    ) -> None:
        super().__init__(every)
        self.limit = limit
        self.metrics = metrics
        self.keeps = keeps

    def act(self, trainer: pl.Trainer, module: Training, last: bool) -> None:
        """Evaluate; at the end print, write and plot the table."""
        assert isinstance(module, CodecTraining)
        if not last:
            module.log_evaluation(_values(self._table(module, self.limit, self.metrics), module))
            return
        # The best checkpoint is chosen by values of the same signals.
        limited = self.limit is not None and self.limit < len(module.data.splits.val)
        compared = _values(self._table(module, self.limit, self.metrics), module) if limited else None
        table = self._table(module, None, modality_of(module.codec).available())
        module.log_evaluation(_values(table, module), compared)
        if not trainer.is_global_zero:
            return
        folder = Path(trainer.default_root_dir) / "evaluation"
        table.print()
        try:
            table.write_csv(folder / "evaluation.csv")
            table.plot(folder / "evaluation.png")
        except OSError as error:  # a full disk
            _log.warning("%s: can't be written (%s)", folder, error.strerror)
        else:
            _log.info("evaluation: %s", folder)

    def _table(self, module: CodecTraining, limit: int | None, metrics: Sequence[str] | None) -> Table:
        batches = module.data.val_dataloader(limit)
        return evaluate(module.evaluated, batches, self.keeps, metrics, module.data.splits.about)


def _values(table: Table, module: CodecTraining) -> dict[str, float]:
    """Return a table's values by their names in the log."""
    shown = modality_of(module.codec).shown
    values = {f"val/{name}@{row[table.axis]:.0f}": row[name] for row in table.rows for name in shown if name in row}
    final = table.rows[-1]  # a continuous codec has no codebooks to use
    return values | {f"val/{name}": final[name] for name in USE if name in final}
