"""Checkpoints in the run's folder: atomic writes, an archive of older ones, and the best by a metric."""

import contextlib
import copy
import logging
import os
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import Checkpoint
from pytorch_lightning.plugins.io import TorchCheckpointIO
from torch import Tensor

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

    For a GPU it writes in a thread, from copies on the host, while training goes on; the next save waits for it. When
    read, a checkpoint is mapped into memory, or each process of a node would read all of it into the node's memory.

    Args:
        on_gpu: Whether the run's tensors are on a GPU.

    Attributes:
        failures: Number of failed saves in a row; the checkpoint before them is kept.
        reason: Reason of the last failure.
        figures: Seconds and megabytes of the last successful save that wasn't logged yet, by their names in the log.
        then: What to do once the next checkpoint is in place.
    """

    def __init__(self, *, on_gpu: bool = False) -> None:
        super().__init__()
        self.on_gpu = on_gpu
        self.failures = 0
        self.reason = ""
        self.figures: dict[str, float] = {}
        self.then: Callable[[], None] | None = None
        self._thread = ThreadPoolExecutor(1, "checkpoint")
        self._writing: Future[None] | None = None

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None) -> None:
        """Write a checkpoint; a failure is counted and logged, not raised, since other processes wait for this one."""
        self.finish()
        then, self.then = self.then, None
        if not self.on_gpu:
            self._write(checkpoint, Path(path), then)
            return
        copied, ready = _copy_to_host(checkpoint)

        def write() -> None:
            if ready is not None:
                ready.synchronize()
            self._write(copied, Path(path), then)

        self._writing = self._thread.submit(write)

    def finish(self) -> None:
        """Wait until the last checkpoint is in place, or has failed."""
        writing, self._writing = self._writing, None
        if writing is not None:
            writing.result()

    def _write(self, checkpoint: dict[str, Any], target: Path, then: Callable[[], None] | None) -> None:
        began = time.monotonic()
        half = target.with_name(f"{target.name}.partial")
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            with half.open("wb") as file:
                torch.save(checkpoint, file)
                file.flush()
                os.fsync(file.fileno())
            # A file that a resume could not read must not replace a good one.
            torch.load(half, weights_only=True, mmap=True, map_location="meta")
            size = half.stat().st_size
            half.replace(target)
            _sync(target.parent)
        except (OSError, RuntimeError) as error:  # torch raises RuntimeError for a full disk
            with contextlib.suppress(OSError):
                half.unlink(missing_ok=True)
            self.failures += 1
            self.reason = (getattr(error, "strerror", None) or str(error)).splitlines()[0]
            _log.warning("%s: could not be saved (%s); the last checkpoint is kept", target, self.reason)
            return
        self.failures = 0
        self.figures = {"checkpoint/seconds": time.monotonic() - began, "checkpoint/megabytes": size / 1e6}
        if then is not None:
            then()

    def load_checkpoint(
        self, path: str | Path, map_location: Any = "cpu", weights_only: bool | None = True
    ) -> dict[str, Any]:
        """Read a checkpoint."""
        state: dict[str, Any] = torch.load(
            path, map_location=map_location, mmap=self.on_gpu, weights_only=weights_only is not False
        )
        return state


def _copy_to_host(checkpoint: dict[str, Any]) -> tuple[dict[str, Any], torch.cuda.Event | None]:
    """Copy a checkpoint, which the next updates change in place; tensors of a GPU to pinned memory.

    Returns:
        The copy, and the event that the GPU has made it; None without a GPU. Later kernels are behind the copies.
    """
    on_gpu = {id(tensor): tensor for tensor in _tensors(checkpoint) if tensor.is_cuda}
    copies = {key: tensor.to("cpu", non_blocking=True) for key, tensor in on_gpu.items()}
    event = torch.cuda.Event() if copies else None  # type: ignore[no-untyped-call]
    if event is not None:
        event.record()
    return copy.deepcopy(checkpoint, dict(copies)), event


def _tensors(values: Any) -> Iterator[Tensor]:
    """List the tensors in nested containers."""
    if isinstance(values, Tensor):
        yield values
    elif isinstance(values, Mapping | list | tuple):
        for value in values.values() if isinstance(values, Mapping) else values:
            yield from _tensors(value)


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
        """Save the best checkpoint if the final evaluation found it, and wait for it."""
        assert isinstance(pl_module, Training)
        self._follow_best(trainer, pl_module)
        self.finish(trainer, pl_module)

    def save(self, trainer: pl.Trainer, module: Training) -> None:
        """Save the state after a complete update; every process must call it.

        Raises:
            UserError: `PATIENCE` saves in a row have failed.
        """
        if self.archive and module.update % self.archive == 0:
            self.files.then = partial(self._archive, module.update)
        trainer.save_checkpoint(self.folder / "last.ckpt")
        self.saved = module.update
        self._report(trainer, module)

    def finish(self, trainer: pl.Trainer, module: Training) -> None:
        """Wait until the last save is on disk; every process must call it.

        Raises:
            UserError: `PATIENCE` saves in a row have failed.
        """
        self.files.finish()
        self._report(trainer, module)

    def _report(self, trainer: pl.Trainer, module: Training) -> None:
        """Log the figures of the last save that has ended, and end the run if too many have failed."""
        failures, reason = trainer.strategy.broadcast((self.files.failures, self.files.reason))
        if failures >= PATIENCE:
            raise UserError(
                f"{self.folder / 'last.ckpt'}: could not be saved {failures} times in a row ({reason}); free disk"
                " space, then resume"
            )
        if failures or not trainer.is_global_zero:
            return
        figures, self.files.figures = self.files.figures, {}
        for logger in trainer.loggers if figures else []:
            logger.log_metrics(figures, step=module.update)

    def _archive(self, update: int) -> None:
        """Keep the last checkpoint under the name of its update, and delete the oldest of the archive."""
        _link(self.folder / "last.ckpt", self.folder / f"update_{update:07d}.ckpt")
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
