"""Progress of a run: a bar on a terminal, log lines elsewhere."""

import logging
import time
from typing import Any

import pytorch_lightning as pl
from pytorch_lightning.callbacks import RichProgressBar

from ..base import Training

__all__ = ["Progress"]

_log = logging.getLogger(__name__)


class Progress(RichProgressBar):
    """A progress bar with rate and remaining time on a terminal; elsewhere a line at each log reading."""

    def __init__(self) -> None:
        super().__init__(refresh_rate=5)
        self._began = (0.0, 0)
        self._said = 0

    def get_metrics(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule
    ) -> dict[str, int | str | float | dict[str, float]]:
        """Return the loss and its terms from the last log reading."""
        assert isinstance(pl_module, Training)
        return {name: value for name, value in pl_module.latest.items() if name.startswith("loss")}

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Start the bar, and the clock for the lines."""
        assert isinstance(pl_module, Training)
        self._began = (time.monotonic(), pl_module.update)
        super().on_train_start(trainer, pl_module)
        if self._console is not None and not self._console.is_terminal:  # None on all ranks but 0
            self.disable()

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *args: Any) -> None:
        """Advance the bar, or log a line after a log reading."""
        super().on_train_batch_end(trainer, pl_module, *args)
        assert isinstance(pl_module, Training)
        update = pl_module.update
        if not self.is_disabled or not pl_module.latest or update == self._said or not trainer.is_global_zero:
            return
        if update % max(1, pl_module.record.every // pl_module.accumulate):
            return
        self._said = update
        elapsed, total = time.monotonic() - self._began[0], pl_module.total
        rate = (update - self._began[1]) / elapsed
        left = (total - update) / rate
        line = f"update {update}/{total}  loss {pl_module.latest['loss']:.4f}  {rate:.2f} updates/s"
        _log.info("%s  %d:%02d left", line, left // 60, left % 60)
