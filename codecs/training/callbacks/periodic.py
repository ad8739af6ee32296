"""Actions at regular intervals and at the end of a run."""

from abc import abstractmethod

import pytorch_lightning as pl

from varitok import require_min

from ..base import Training

__all__ = ["Periodic"]


class Periodic(pl.Callback):
    """Acts every `every` updates, and once more at the end of the run.

    Args:
        every: Updates between two; checked under the key `callbacks.NAME.every`.
        name: What the callback is called in the configuration.
    """

    def __init__(self, every: int, name: str) -> None:
        require_min({f"callbacks.{name}.every": (every, 1)})
        self.every = every

    @abstractmethod
    def act(self, trainer: pl.Trainer, module: Training, last: bool) -> None:
        """Act; every process calls it. `last` says that the run ends."""

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: object) -> None:
        """Act when it is due."""
        assert isinstance(pl_module, Training)
        if pl_module.stepped and pl_module.update % self.every == 0 and pl_module.update < pl_module.total:
            self.act(trainer, pl_module, last=False)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Act for the last time."""
        assert isinstance(pl_module, Training)
        self.act(trainer, pl_module, last=True)
