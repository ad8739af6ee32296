"""The base of callbacks that act periodically and at the end of a run."""

from abc import abstractmethod

import pytorch_lightning as pl

from ..base import Training

__all__ = ["Periodic"]


class Periodic(pl.Callback):
    """A callback that acts every `every` updates, and once at the end of the run.

    Args:
        every: Updates between two actions.
    """

    def __init__(self, every: int) -> None:
        self.every = every

    @abstractmethod
    def act(self, trainer: pl.Trainer, module: Training, last: bool) -> None:
        """Act; every process calls it. `last` is True at the end of the run."""

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: object) -> None:
        """Act if an action is due."""
        assert isinstance(pl_module, Training)
        if pl_module.stepped and pl_module.update % self.every == 0 and pl_module.update < pl_module.total:
            self.act(trainer, pl_module, last=False)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Act at the end of the run."""
        assert isinstance(pl_module, Training)
        self.act(trainer, pl_module, last=True)
