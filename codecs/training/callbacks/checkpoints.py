"""Checkpoints in the run's folder: atomic writes, an archive of older ones, and the best by a metric."""

import contextlib
import logging
import os
import shutil
import time
from pathlib import Path
from typing import Annotated, Any

import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import Checkpoint
from pytorch_lightning.plugins.io import TorchCheckpointIO

from varitok import UserError

from ...metrics.rate import USE
from ...modalities.registry import BITS, METRICS, lower_is_better
from ..base import Training

__all__ = ["Checkpoints", "WholeFiles"]

_log = logging.getLogger(__name__)

PATIENCE = 3  # failed saves in a row that end the run


class WholeFiles(TorchCheckpointIO):
    """Checkpoint I/O that writes to a file beside the target, reads it back, and renames it.

    Lightning's own writes through the system's temporary folder. If that is on another disk, as on clusters, a full
    disk or a kill leaves neither the new checkpoint nor the old one (Lightning issue 21253).

    Attributes:
        failures: Number of failed saves in a row; the checkpoint before them is kept.
        reason: Reason of the last failure.
        figures: Seconds and megabytes of the last successful save, by their names in the log.
    """

    def __init__(self) -> None:
        super().__init__()
        self.failures = 0
        self.reason = ""
        self.figures: dict[str, float] = {}

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None) -> None:
        """Write a checkpoint; a failure is counted and logged, not raised, since other processes wait for this one."""
        began, target = time.monotonic(), Path(path)
        partial = target.with_name(f"{target.name}.partial")
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            with partial.open("wb") as file:
                torch.save(checkpoint, file)
                file.flush()
                os.fsync(file.fileno())
            # A file that a resume could not read must not replace a good one.
            torch.load(partial, weights_only=True, mmap=True, map_location="meta")
            size = partial.stat().st_size
            partial.replace(target)
            _sync(target.parent)
        except (OSError, RuntimeError) as error:  # torch raises RuntimeError for a full disk
            with contextlib.suppress(OSError):
                partial.unlink(missing_ok=True)
            self.failures += 1
            self.reason = (getattr(error, "strerror", None) or str(error)).splitlines()[0]
            _log.warning("%s: could not be saved (%s); the last checkpoint is kept", target, self.reason)
            return
        self.failures = 0
        self.figures = {"checkpoint/seconds": time.monotonic() - began, "checkpoint/megabytes": size / 1e6}


def _sync(folder: Path) -> None:
    """Flush a folder's entries to disk, so that a rename survives a power failure."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


class Checkpoints(Checkpoint):
    """The callback that saves `checkpoints/last.ckpt` in the run's folder, periodically and after the last update.

    A checkpoint has the complete state of a run: a resumed run takes the same steps to the bit. It includes the
    resolved configuration as plain data, so a checkpoint alone can be evaluated and exported, and loads with
    `weights_only=True`.

    Args:
        config: Resolved configuration of the run, plain containers.
        files: The trainer's checkpoint I/O.
        every: Updates between two checkpoints.
        archive: Updates between two archived checkpoints, such as `update_0001000.ckpt`; null: none.
        keep: Number of archived checkpoints to keep, the newest; null: all.
        best: Logged metric of an evaluation, such as `val/psnr@64`, whose best value `best.ckpt` has; null: none.

    Raises:
        UserError: `archive` is no multiple of `every`, or no evaluation measures `best`.
    """

    def __init__(
        self,
        config: dict[str, Any],
        files: WholeFiles,
        *,
        every: int,
        archive: Annotated[int | None, "[1, inf)", "null archives none"] = None,
        keep: Annotated[int | None, "[1, inf)", "null keeps all"] = 3,
        best: str | None = None,
    ) -> None:
        if archive is not None and archive % every:
            raise UserError(f"checkpoint.archive={archive}: must be a multiple of checkpoint.every={every}")
        metric = "" if best is None else best.partition("/")[2].partition("@")[0]
        if best is not None and metric not in (*METRICS, *USE, BITS):
            raise UserError(f"checkpoint.best={best}: no evaluation logs it; give one that does, such as val/psnr@64")
        self.config = config
        self.files = files
        self.every = every
        self.archive = archive
        self.keep = keep
        self.best = best
        self.lower = lower_is_better(metric)
        self.reached: float | None = None
        self.saved = -1  # update of the last save
        self.folder = Path()

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Set the folder, and remove partial files that a killed run left."""
        self.folder = Path(trainer.default_root_dir) / "checkpoints"
        if trainer.is_global_zero:
            for partial in self.folder.glob("*.partial"):
                partial.unlink(missing_ok=True)

    def on_save_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Add the configuration to a checkpoint."""
        checkpoint["varitok"] = {"config": self.config}

    def state_dict(self) -> dict[str, Any]:
        """Return the best value of the metric so far."""
        return {"reached": self.reached}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the best value."""
        self.reached = state_dict["reached"]

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Count the update that the run starts from as saved."""
        assert isinstance(pl_module, Training)
        self.saved = pl_module.update

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: object) -> None:
        """Save if a checkpoint is due."""
        assert isinstance(pl_module, Training)
        if not pl_module.stepped or pl_module.update == self.saved:
            return
        self._follow_best(trainer, pl_module)
        last = pl_module.update == pl_module.total
        if not last and pl_module.update % self.every:
            return
        pl_module.settle()
        # No checkpoint after a refused update: a rollback needs one from before the refusals.
        if last or not pl_module.guard.why:
            self.save(trainer, pl_module)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Save the best checkpoint if the final evaluation found it."""
        assert isinstance(pl_module, Training)
        self._follow_best(trainer, pl_module)

    def save(self, trainer: pl.Trainer, module: Training) -> None:
        """Save the state after a complete update; every process must call it.

        Raises:
            UserError: `PATIENCE` saves in a row have failed.
        """
        last = self.folder / "last.ckpt"
        trainer.save_checkpoint(last)
        self.saved = module.update
        failures, reason = trainer.strategy.broadcast((self.files.failures, self.files.reason))
        if failures >= PATIENCE:
            raise UserError(
                f"{last}: could not be saved {failures} times in a row ({reason}); free disk space, then resume"
            )
        if failures or not trainer.is_global_zero:
            return
        for logger in trainer.loggers:
            logger.log_metrics(self.files.figures, step=module.update)
        if self.archive and module.update % self.archive == 0:
            _link(last, self.folder / f"update_{module.update:07d}.ckpt")
            archived = sorted(self.folder.glob("update_*.ckpt"))
            for old in archived[: -self.keep] if self.keep else []:
                old.unlink(missing_ok=True)

    def _follow_best(self, trainer: pl.Trainer, module: Training) -> None:
        """Save `best.ckpt` if this update's evaluation improved on the best value."""
        if self.best is None or module.evaluation.get("update") != module.update:
            return
        if self.best not in module.evaluation:
            known = ", ".join(name for name in module.evaluation if name != "update")
            raise UserError(f"checkpoint.best={self.best}: no evaluation logs it; they log {known}")
        value = module.evaluation[self.best]
        if self.reached is None or (value < self.reached if self.lower else value > self.reached):
            self.reached = value
            trainer.save_checkpoint(self.folder / "best.ckpt")


def _link(file: Path, name: Path) -> None:
    """Hard-link a file under another name; copy it if the file system has no links."""
    name.unlink(missing_ok=True)
    try:
        name.hardlink_to(file)
    except OSError:
        shutil.copyfile(file, name)
