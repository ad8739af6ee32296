"""What a run says while it goes on."""

import logging
import time
from typing import Any

import pytorch_lightning as pl
from pytorch_lightning.callbacks import RichProgressBar

from ..base import Training

__all__ = ["Progress"]

_log = logging.getLogger(__name__)


class Progress(RichProgressBar):
    """A bar with rate and remaining time on a terminal, a line at each reading of the log elsewhere."""

    def __init__(self) -> None:
        super().__init__(refresh_rate=5)
        self._began = (0.0, 0)
        self._said = 0

    def get_metrics(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule
    ) -> dict[str, int | str | float | dict[str, float]]:
        """Show the last reading: the loss and its terms."""
        assert isinstance(pl_module, Training)
        return {name: value for name, value in pl_module.latest.items() if name.startswith("loss")}

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Start the bar, or the clock for the lines."""
        assert isinstance(pl_module, Training)
        self._began = (time.monotonic(), pl_module.update)
        super().on_train_start(trainer, pl_module)
        if self._console is not None and not self._console.is_terminal:  # None on processes but the first
            self.disable()

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *args: Any) -> None:
        """Move the bar, or say a line where a reading has been made."""
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
