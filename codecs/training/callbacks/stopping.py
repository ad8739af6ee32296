"""Ending a run on a signal or on the guard's refusal: it saves at the end of the update, and exits."""

import logging
import os
import shutil
import signal
import subprocess
import sys
import threading
from types import FrameType

import pytorch_lightning as pl
import torch
import torch.distributed as dist
from torch import Tensor

from varitok import UserError
from varitok.data.batch import Batch

from ...distributed import world_size
from ..base import Training
from .checkpoints import Checkpoints

__all__ = ["Stopping"]

_log = logging.getLogger(__name__)

# Ctrl-C; what schedulers and container engines send; and what SLURM sends ahead of a time limit (`--signal=USR1@120`).
SIGNALS = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGUSR1") if hasattr(signal, name)]


class Stopping(pl.Callback):
    """Saves the run at the end of the update in which a signal came to any of its processes, and ends all of them.

    The exit status is 128 and the signal's number, as of a process that the signal itself ended, so that schedulers
    don't take the run for finished; after SLURM's SIGUSR1 the job is queued again. A second Ctrl-C ends it at once.

    Lightning's own handler starts a collective wherever the signal finds a process, which hangs all of them (its issue
    20806), and ends with status 0. Here the processes agree once an update on what came to any of them, and look at the
    answer an update later: none waits for it.

    Args:
        checkpoints: What saves.
    """

    def __init__(self, checkpoints: Checkpoints) -> None:
        self.checkpoints = checkpoints
        self.heard = 0
        self.listening: list[int] = []
        self.agreed: Tensor | None = None

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Listen."""
        if threading.current_thread() is not threading.main_thread():
            return
        self.listening = SIGNALS
        for number in SIGNALS:
            signal.signal(number, self._hear)

    def _hear(self, number: int, frame: FrameType | None) -> None:
        if self.heard and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.heard = number
        if number == signal.SIGINT:
            _log.warning("stopping after this update, with everything saved; press Ctrl-C again to stop at once")

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: object, batch: Batch, batch_idx: int
    ) -> None:
        """Save and exit, if a signal came or the guard says so."""
        assert isinstance(pl_module, Training)
        if not pl_module.stepped:
            return
        if pl_module.guard.why:
            self._answer_refusal(trainer, pl_module, batch)
        if not (number := self._agree(pl_module.device)):
            return
        if self.checkpoints.saved != pl_module.update:
            self.checkpoints.save(trainer, pl_module)
        _log.warning("%s: saved after update %d", signal.Signals(number).name, pl_module.update)
        if number == getattr(signal, "SIGUSR1", None) and trainer.is_global_zero:
            _queue_again()
        sys.exit(128 + number)

    def _answer_refusal(self, trainer: pl.Trainer, module: Training, batch: Batch) -> None:
        """Log a refused update; roll back or end the run after too many."""
        guard, last = module.guard, self.checkpoints.folder / "last.ckpt"
        if trainer.is_global_zero or not guard.mine:
            names = ", ".join(module.data.names(batch))
            _log.warning("update %d was refused: %s; its batch: %s", module.update, guard.why, names)
        if not guard.exhausted:
            return
        if trainer.strategy.broadcast(last.is_file()) and guard.goes_back():
            module.go_back(last)
            _log.warning("%d updates in a row were refused: back to the weights of %s", guard.patience, last)
            return
        self.checkpoints.save(trainer, module)
        raise UserError(
            f"{guard.patience} updates in a row were refused ({guard.why}); the state before them is saved in {last}:"
            " lower optim.codec.lr or optim.clip, or look at the files that the log names"
        )

    def _agree(self, device: torch.device) -> int:
        """Return the signal that any process has received, the same on all of them."""
        if world_size() == 1:
            return self.heard
        found = 0 if self.agreed is None else int(self.agreed)
        self.agreed = torch.tensor(self.heard, device=device)
        dist.all_reduce(self.agreed, dist.ReduceOp.MAX)
        return found

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Listen no longer: all updates are done and saved."""
        self._restore()
        if self.heard:
            signal.raise_signal(self.heard)

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """Listen no longer."""
        self._restore()

    def _restore(self) -> None:
        """Let signals end the process, as they do outside of a run; Lightning's handler would hang."""
        for number in self.listening:
            signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)
        self.listening = []


def _queue_again() -> None:
    """Ask SLURM to start this job again, if it is one."""
    job = os.environ.get("SLURM_JOB_ID")
    if job is None or shutil.which("scontrol") is None:
        return
    done = subprocess.run(["scontrol", "requeue", job], capture_output=True, text=True, check=False)
    if done.returncode:
        _log.warning("SLURM could not queue job %s again (%s)", job, done.stderr.strip())
