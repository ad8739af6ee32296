"""The quality at each length of a code, measured while a run goes on and at its end."""

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
    """Evaluates periodically and at the end of the run, with the loop of `varitok evaluate`.

    The last table goes to `evaluation/evaluation.csv` and `.png` in the run's folder and is printed; all of them go to
    the loggers, quality as `val/psnr@k`, k being the kept number.

    Args:
        every: Updates between two evaluations.
        metrics: What is measured on the way, None for the two that are drawn; at the end it is all that can be measured
            on this machine.
        keeps: The numbers of tokens or codebooks that are kept; 1, 2, 4, ... and all if None.
    """

    def __init__(self, every: int, metrics: Sequence[str] | None = None, keeps: Sequence[int] | None = None) -> None:
        super().__init__(every, "evaluation")
        self.metrics = metrics
        self.keeps = keeps

    def act(self, trainer: pl.Trainer, module: Training, last: bool) -> None:
        """Evaluate; at the end print the table, write it, draw it."""
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
