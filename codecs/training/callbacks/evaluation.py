"""The quality at each length of a code, measured while a run goes on and at its end."""

import logging
from collections.abc import Sequence
from pathlib import Path

import pytorch_lightning as pl

from varitok import at_least
from varitok.data.datamodule import DataModule

from ...evaluation.evaluate import evaluate
from ...evaluation.table import Table
from ...metrics.rate import USE
from ...modalities.registry import modality_of
from ..module import CodecTraining

__all__ = ["Evaluation"]

_log = logging.getLogger(__name__)


class Evaluation(pl.Callback):
    """Evaluates every so many updates and at the end of the run, with the loop that `varitok evaluate` uses.

    The last table goes to `evaluation/evaluation.csv` and `.png` in the run's folder and is printed; all of them go to
    the loggers, quality as `val/psnr@k`, k being the kept number.

    Args:
        every: Updates between two evaluations.
        metrics: What is measured on the way, None for the two that are drawn; at the end it is all that can be measured
            on this machine.
        keeps: The numbers of tokens or books that are kept; 1, 2, 4, ... and all where None.
    """

    def __init__(self, every: int, metrics: Sequence[str] | None = None, keeps: Sequence[int] | None = None) -> None:
        at_least({"callbacks.evaluation.every": (every, 1)})
        self.every = every
        self.metrics = metrics
        self.keeps = keeps

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: object) -> None:
        """Evaluate when it is due."""
        assert isinstance(pl_module, CodecTraining)
        update = pl_module.update
        if update and update % self.every == 0 and update < pl_module.total and pl_module.stepped:
            self._evaluate(trainer, pl_module, self.metrics)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Evaluate the end of the run; print the table, write it, draw it."""
        assert isinstance(pl_module, CodecTraining)
        table = self._evaluate(trainer, pl_module, modality_of(pl_module.codec).available())
        if trainer.is_global_zero:
            folder = Path(trainer.default_root_dir) / "evaluation"
            table.print()
            try:
                table.write_csv(folder / "evaluation.csv")
                table.plot(folder / "evaluation.png")
            except OSError as error:  # a full disk
                _log.warning("%s: can't be written (%s)", folder, error.strerror)
            else:
                _log.info("evaluation: %s", folder)

    def _evaluate(self, trainer: pl.Trainer, module: CodecTraining, metrics: Sequence[str] | None) -> Table:
        data: DataModule = trainer.datamodule  # type: ignore[attr-defined]
        table = evaluate(module.evaluated, data.val_dataloader(), self.keeps, metrics, data.splits.about)
        shown = modality_of(module.codec).shown
        values = {f"val/{name}@{row[table.axis]:.0f}": row[name] for row in table.rows for name in shown if name in row}
        last = table.rows[-1]  # a continuous codec has no books to use
        values |= {f"val/{name}": last[name] for name in USE if name in last}
        module.evaluation = values | {"update": module.update}
        for logger in trainer.loggers:
            logger.log_metrics(values, step=module.update)
        return table
