"""Evaluation of a codec at each kept length, during training and at the end of a run."""

import logging
from collections.abc import Sequence
from pathlib import Path

import pytorch_lightning as pl

from varitok.data.datamodule import DataModule

from ...evaluation.evaluate import evaluate
from ...metrics.rate import USE
from ...modalities.registry import modality_of
from ..base import Training
from ..module import CodecTraining
from .periodic import Periodic

__all__ = ["Evaluation"]

_log = logging.getLogger(__name__)


class Evaluation(Periodic):
    """The callback that evaluates periodically and at the end of the run, with the loop of `varitok evaluate`.

    All evaluations are logged, quality as `val/psnr@k` with k the kept number. The last one is also printed, and
    written to `evaluation/evaluation.csv` and `.png` in the run's folder.

    Args:
        every: Updates between two evaluations.
        metrics: Metrics during training; None: the modality's two plotted ones. The final evaluation measures all that
            are available on this machine.
        keeps: Numbers of tokens or codebooks to keep; None: 1, 2, 4, ... and all.
    """

    def __init__(self, every: int, metrics: Sequence[str] | None = None, keeps: Sequence[int] | None = None) -> None:
        super().__init__(every)
        self.metrics = metrics
        self.keeps = keeps

    def act(self, trainer: pl.Trainer, module: Training, last: bool) -> None:
        """Evaluate; at the end print, write and plot the table."""
        assert isinstance(module, CodecTraining)
        data: DataModule = trainer.datamodule  # type: ignore[attr-defined]
        modality = modality_of(module.codec)
        metrics = modality.available() if last else self.metrics
        table = evaluate(module.evaluated, data.val_dataloader(), self.keeps, metrics, data.splits.about)
        values = {
            f"val/{name}@{row[table.axis]:.0f}": row[name]
            for row in table.rows
            for name in modality.shown
            if name in row
        }
        final = table.rows[-1]  # a continuous codec has no codebooks to use
        module.log_evaluation(values | {f"val/{name}": final[name] for name in USE if name in final})
        if not last or not trainer.is_global_zero:
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
