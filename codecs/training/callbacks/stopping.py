"""Graceful stopping of a run by a system signal, and the response to updates that the guard refuses."""

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

from varitok import UserError
from varitok.data.batch import Batch

from ...distributed import world_size
from ..base import Refusal, Training
from ..readout import Readout
from .checkpoints import Checkpoints

__all__ = ["Stopping"]

_log = logging.getLogger(__name__)

# Ctrl-C; the signal of schedulers and container engines; SLURM's ahead of a time limit (`--signal=USR1@120`).
SIGNALS = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGUSR1") if hasattr(signal, name)]


class Stopping(pl.Callback):
    """The callback that saves the run and ends all processes after the update in which one received a system signal.

    The exit status is 128 + the signal's number, as if the signal had killed the process: schedulers then don't take
    the run for finished. After SLURM's SIGUSR1 the job is requeued. A second Ctrl-C ends the run at once.

    Lightning's handler starts a collective at the point where the signal interrupts a process, which hangs all of them
    (Lightning issue 20806), and exits with status 0. Its loop also broadcasts before each batch whether rank 0 has a
    SIGTERM, and waits for the answer. Here one all-reduce per update shares the signal's number. Its result is read one
    update later, so that no process waits for it.

    Args:
        checkpoints: Callback that saves the run.
    """

    def __init__(self, checkpoints: Checkpoints) -> None:
        self.checkpoints = checkpoints
        self.received = 0
        self.listening: list[int] = []
        self.agreed: Readout | None = None
        self.recent: dict[int, Batch] = {}  # the last batches by update; a refusal may be known an update late

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Install the signal handlers, which only the main thread can, and turn Lightning's broadcast off."""
        trainer.fit_loop.epoch_loop._broadcast_sigterm_tensor = _broadcast_nothing  # type: ignore[method-assign]
        if threading.current_thread() is not threading.main_thread():
            return
        self.listening = SIGNALS
        for number in SIGNALS:
            signal.signal(number, self._receive)

    def _receive(self, number: int, frame: FrameType | None) -> None:
        if self.received and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.received = number
        if number == signal.SIGINT:
            _log.warning("stopping after this update, with everything saved; press Ctrl-C again to stop at once")

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: object, batch: Batch, batch_idx: int
    ) -> None:
        """Respond to refused updates, and save and exit after a signal."""
        assert isinstance(pl_module, Training)
        if not pl_module.stepped:
            return
        now = pl_module.update
        # Without the signals, for which a GPU may have no room.
        self.recent = {now - 1: self.recent.get(now - 1, batch), now: batch._replace(signal=batch.lengths, features={})}
        while pl_module.refusals:
            self._answer_refusal(trainer, pl_module, pl_module.refusals.pop(0))
        if not (number := self._agree(pl_module.device)):
            return
        if self.checkpoints.saved != pl_module.update:
            self.checkpoints.save(trainer, pl_module)
        self.checkpoints.finish(trainer, pl_module)
        _log.warning("%s: saved after update %d", signal.Signals(number).name, pl_module.update)
        if number == getattr(signal, "SIGUSR1", None) and trainer.is_global_zero:
            _queue_again()
        sys.exit(128 + number)

    def _answer_refusal(self, trainer: pl.Trainer, module: Training, refusal: Refusal) -> None:
        """Log a refused update; after `guard.patience` in a row roll back or end the run."""
        guard, last = module.guard, self.checkpoints.folder / "last.ckpt"
        if trainer.is_global_zero or not refusal.mine:
            names = ", ".join(module.data.names(self.recent[refusal.update]))
            _log.warning("update %d was refused: %s; its batch: %s", refusal.update, refusal.why, names)
        if not guard.exhausted or module.refusals:
            return
        self.checkpoints.finish(trainer, module)
        if trainer.strategy.broadcast(last.is_file()) and guard.goes_back():
            module.go_back(last)
            _log.warning("%d updates in a row were refused: back to the weights of %s", guard.patience, last)
            return
        self.checkpoints.save(trainer, module)
        self.checkpoints.finish(trainer, module)
        raise UserError(
            f"{guard.patience} updates in a row were refused ({refusal.why}); the state before them is saved in {last}:"
            " lower optim.codec.lr or optim.clip, or look at the files that the log names"
        )

    def _agree(self, device: torch.device) -> int:
        """Return the signal that any process has received, the same on all; 0 if none."""
        if world_size() == 1:
            return self.received
        found = 0 if self.agreed is None else int(self.agreed.read()[0])
        received = torch.full((1,), self.received, device=device)  # a kernel: `torch.tensor` would wait for its copy
        dist.all_reduce(received, dist.ReduceOp.MAX)
        self.agreed = Readout(received)
        return found

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Restore the signal handlers, and raise a signal that arrived after the last update's check."""
        self._restore()
        if self.received:
            signal.raise_signal(self.received)

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """Restore the signal handlers."""
        self._restore()

    def _restore(self) -> None:
        """Restore Python's default handlers, not Lightning's, which would hang."""
        for number in self.listening:
            signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)
        self.listening = []


def _broadcast_nothing() -> None:
    """Take the place of Lightning's broadcast of SIGTERM."""


def _queue_again() -> None:
    """Requeue this job if it runs under SLURM."""
    job = os.environ.get("SLURM_JOB_ID")
    if job is None or shutil.which("scontrol") is None:
        return
    done = subprocess.run(["scontrol", "requeue", job], capture_output=True, text=True, check=False)
    if done.returncode:
        _log.warning("SLURM could not queue job %s again (%s)", job, done.stderr.strip())
