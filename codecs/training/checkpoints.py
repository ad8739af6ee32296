"""Checkpoints in the run's folder."""

from pathlib import Path
from typing import Any

import pytorch_lightning as pl
from pytorch_lightning.callbacks import ModelCheckpoint

__all__ = ["Checkpoints"]


class Checkpoints(ModelCheckpoint):
    """Saves `checkpoints/last.ckpt` in the run's folder every so many updates and at the end of the run.

    The run's resolved configuration travels inside as plain data, so that a checkpoint alone can be evaluated and
    exported, and everything in it loads with `weights_only=True`.

    Args:
        config: The run's resolved configuration, plain containers.
        every: Updates between two checkpoints.
    """

    def __init__(self, config: dict[str, Any], every: int) -> None:
        super().__init__(filename="last", save_top_k=1, every_n_train_steps=every, enable_version_counter=False)
        self.config = config

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Learn where the run's folder is."""
        self.dirpath = str(Path(trainer.default_root_dir) / "checkpoints")
        super().setup(trainer, pl_module, stage)

    def on_save_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Put the configuration inside."""
        checkpoint["varitok"] = {"config": self.config}
        super().on_save_checkpoint(trainer, pl_module, checkpoint)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Save the end of the run, whatever number of updates it has."""
        trainer.save_checkpoint(Path(self.dirpath or ".") / "last.ckpt")
