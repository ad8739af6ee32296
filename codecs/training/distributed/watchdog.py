"""A watchdog for distributed runs: if a process dies or hangs, all others end and report which one.

torchrun's agent ends all processes if one dies, but reports it in a page of log, and waits for a stopped one. srun
waits for both; Lightning's launcher kills without a message. Each acts on its own processes only.
"""

import contextlib
import logging
import os
import signal
import socket
import threading
import time
from collections.abc import Mapping
from typing import Annotated, Any

import pytorch_lightning as pl
import torch
import torch.distributed as dist
from torch.distributed.distributed_c10d import PrefixStore, _get_default_store

from varitok import UserError

from ...distributed import world_size
from ..config.launch import detect_launch

__all__ = ["Watchdog"]

_log = logging.getLogger(__name__)

BEAT = 0.5  # seconds between two heartbeats, in runs of up to CROWD processes
CROWD = 64  # in larger ones heartbeats are rarer: each process reads those of all from one store
EVIDENCE = 4.0  # seconds of silence after which a process counts as gone if a collective has failed
STARTER = "VARITOK_STARTER"
GRACE = 4.0  # seconds in which a process may end by itself, with its own error message


class Watchdog(pl.Callback):
    """The callback that ends all processes if one was killed or hangs, instead of waiting for it forever.

    Each process sends a heartbeat twice a second to the process group's store, more rarely if there are more than 64.
    If one fails or is silent for too long, the others end too, within seconds after a failed collective. They report
    its rank, and exit with its status or 1. A silent process on the same machine is killed, since it could wake up
    after the run was restarted without it.

    Args:
        silence: Seconds without a heartbeat after which a process counts as gone.
    """

    def __init__(self, silence: Annotated[float, "[2, inf)"] = 120.0) -> None:
        self.silence = silence
        self.failed = threading.Event()  # set when a collective has failed
        self.leaving = threading.Event()
        self.threads: list[threading.Thread] = []
        self.met = threading.Event()
        if os.environ.get("LOCAL_RANK", "0") == "0" or detect_launch().launcher:
            os.environ[STARTER] = str(os.getpid())  # parent of the processes that Lightning starts
        elif STARTER in os.environ:
            threading.Thread(target=self._follow, args=(int(os.environ[STARTER]),), name="follow", daemon=True).start()

    def _follow(self, starter: int) -> None:
        """End this process if its parent dies before the process group is set up."""
        while not self.met.wait(BEAT):
            if os.getppid() != starter:
                os._exit(1)

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Start the watchdog's threads once the process group is set up."""
        if world_size() == 1:
            return
        self.rank, self.world = trainer.global_rank, trainer.world_size
        self.interval = BEAT * max(1, self.world / CROWD)
        # Lightning sends SIGKILL to all processes in this list if one fails, so it is emptied.
        started: list[Any] = getattr(trainer.strategy.launcher, "procs", [])
        self.children = dict(enumerate([*started], trainer.global_rank - trainer.local_rank + 1))
        started.clear()
        # A separate connection to the store, which no collective blocks.
        self.store = PrefixStore("watch", _get_default_store().clone())
        self.beats = 0
        self._tell("alive")
        dist.barrier()
        self.met.set()
        now = time.monotonic()
        self.words = {rank: (self.store.get(str(rank)).decode(), now) for rank in range(self.world)}
        self.reached, self.lost = now, False  # time of the store's last answer, and whether the store is gone
        # In threads of their own: if the store's host hangs, so does every call to the store.
        for target, name in ((self._beat, "beat"), (self._look, "watch")):
            self.threads.append(threading.Thread(target=target, name=name, daemon=True))
            self.threads[-1].start()

    def _tell(self, word: str) -> None:
        """Store this process's state: "alive", "done" or an exit status."""
        self.beats += 1
        self.store.set(str(self.rank), f"{word} {self.beats} {os.getpid()} {socket.gethostname()}")

    def _beat(self) -> None:
        """Send heartbeats, and read those of the others."""
        while not self.leaving.wait(self.interval):
            try:
                self._tell("alive")
                found = self.store.multi_get([str(rank) for rank in self.words])
            except (RuntimeError, dist.DistError):
                self.lost = True
                return
            self.reached = time.monotonic()
            for rank, said in enumerate(found):
                if said.decode() != self.words[rank][0]:
                    self.words[rank] = said.decode(), self.reached

    def _look(self) -> None:
        """Check the others until this process leaves, and end it if one of them is gone."""
        since: float | None = None
        while not self.leaving.wait(BEAT):
            gone = self._gone()
            since = (since or time.monotonic()) if gone else None
            # The first process to end, by a signal or an error, reports it itself.
            if since is not None and (self.failed.is_set() or time.monotonic() - since > GRACE):
                self._end(gone)

    def _gone(self) -> dict[int, tuple[int, str]]:
        """Return the lost processes by rank: exit status for the others, and description."""
        now = time.monotonic()
        limit = min(max(EVIDENCE, 4 * self.interval), self.silence) if self.failed.is_set() else self.silence
        if self.rank and (self.lost or now - self.reached > limit):  # the others' states are outdated
            return {0: (1, "is gone" if self.lost else _silent(now - self.reached))}
        found = {}
        for rank, (word, since) in self.words.items():
            state = word.partition(" ")[0]
            status = self.children[rank].poll() if rank in self.children else None
            if rank == self.rank or state == "done":
                continue
            if status is not None and status < 0:
                found[rank] = 1, f"was ended by {signal.Signals(-status).name}"
            elif status or state != "alive":
                found[rank] = status or int(state), f"ended with status {status or state}"
            elif now - since > limit:
                found[rank] = 1, _silent(now - since)
        return found

    def _end(self, gone: Mapping[int, tuple[int, str]]) -> None:
        """End this process; the lowest remaining rank logs why."""
        if self.rank == min(set(range(self.world)) - set(gone)):
            text = "; ".join(f"process {rank} of {self.world} {how}" for rank, (_, how) in sorted(gone.items()))
            _log.error("%s: the others end too; start the run again to resume from its last checkpoint", text)
        for rank in gone:
            word, _, number, host = self.words[rank][0].split(maxsplit=3)
            if word == "alive" and host == socket.gethostname():
                with contextlib.suppress(OSError):
                    os.kill(int(number), signal.SIGKILL)
        os._exit(max(status for status, _ in gone.values()) or 1)

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """Wait for evidence that a lost process caused the error; without it leave with this process's own error."""
        if not self.threads:
            return
        lost = isinstance(exception, RuntimeError) and not isinstance(exception, torch.OutOfMemoryError)
        if lost:  # collectives raise it; the thread ends this process if one is lost
            self.failed.set()
            self.leaving.wait(EVIDENCE + 4 * BEAT)
        self._leave(str(_status(exception)))

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Leave at the end of the run."""
        if self.threads:
            self._leave("done")

    def _leave(self, word: str) -> None:
        self.leaving.set()
        # At exit, Python kills daemon threads that return from C++, here the store's, which would abort the process.
        for thread in self.threads:
            thread.join(EVIDENCE)  # no longer, because the store may hang
        self.threads = []
        with contextlib.suppress(RuntimeError, dist.DistError):  # the store may be gone already
            self._tell(word)


def _silent(seconds: float) -> str:
    return f"has given no sign of life for {seconds:.0f} s"


def _status(exception: BaseException) -> int:
    """Return the exit status that an exception leads to."""
    if isinstance(exception, SystemExit):
        return exception.code if isinstance(exception.code, int) else 1
    return {UserError: 2, torch.OutOfMemoryError: 2, KeyboardInterrupt: 130}.get(type(exception), 1)
