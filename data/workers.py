"""The processes that read and decode, and the error when one dies."""

import signal
import threading
from collections.abc import Iterator, Sequence
from multiprocessing.util import Finalize
from typing import Any

import torch
from torch.utils.data import DataLoader, get_worker_info

from varitok import UserError

from .batch import Sample
from .storage.members import File

__all__ = ["WorkerLoader", "WorkerProgress", "ignore_signals", "name_of"]

SIGNALS = ("SIGINT", "SIGTERM", "SIGUSR1")
CAUSES = {
    "SIGKILL": "was memory short? give fewer loader.workers, or a smaller loader.batch_size",
    "SIGBUS": "is /dev/shm full? give fewer loader.workers, or a smaller loader.batch_size",
}
CRASH = "take that file away: what decodes it crashed"


class WorkerProgress:
    """What each worker is reading, in memory that it shares with the main process."""

    def __init__(self) -> None:
        self._indices = torch.empty(0, dtype=torch.int64)

    def prepare(self, workers: int) -> None:
        """Allocate a slot for each worker, before they start."""
        self._indices = torch.full((workers,), -1).share_memory_()  # type: ignore[no-untyped-call]

    def read(self, index: int) -> None:
        """Note what this worker reads now; the main process needs no note."""
        worker = get_worker_info()
        if worker is not None:
            self._indices[worker.id] = index

    def __getitem__(self, worker: int) -> int:
        """Return the index that a worker was reading; below 0: none yet."""
        return int(self._indices[worker])


def name_of(files: Sequence[File], index: int) -> str:
    """Name a signal by its file, or by its number if the data have no files."""
    return str(files[index]) if files else f"signal {index}"


class WorkerLoader(DataLoader[Sample]):
    """A loader whose workers, where one dies, end the run in one line that names what it was reading.

    torch itself raises wherever the main process is when it hears of a death, in the middle of a save perhaps.
    Here the error is raised when the next batch is requested.
    """

    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]
        """Return batches.

        Raises:
            UserError: A worker was killed, or ended.
        """
        main = threading.current_thread() is threading.main_thread()
        child = getattr(signal, "SIGCHLD", None) if main else None
        before = signal.getsignal(child) if child else None
        batches: Any = super().__iter__()
        if child and before is not None:
            signal.signal(child, before)
        workers = list(getattr(batches, "_workers", []))
        if workers:  # ended with the batches, or before Python waits for its children
            Finalize(batches, _end, (workers,), exitpriority=0)
        return self._watch(batches, workers) if workers else batches

    def _watch(self, batches: Iterator[Any], workers: list[Any]) -> Iterator[Any]:
        try:
            yield from batches
        except RuntimeError as error:
            told = self._explain(workers)
            if told is None:
                raise
            raise UserError(told) from error

    def _explain(self, workers: list[Any]) -> str | None:
        """Explain which worker died of what, and over which file; None if all live."""
        for number, worker in enumerate(workers):
            if worker.exitcode:
                name = _cause(worker.exitcode)
                data: Any = self.dataset
                index = data.workplaces[number]
                reading = f" while it read {name_of(data.dataset.files, index)}" if index >= 0 else ""
                return f"a worker (process {worker.pid}) ended by {name}{reading}; {CAUSES.get(name, CRASH)}"
        return None


def _cause(status: int) -> str:
    try:
        return signal.Signals(-status).name
    except ValueError:
        return f"exit status {status}"


def ignore_signals(worker: int) -> None:
    """Leave it to the main process to answer a signal that comes to all of a run's processes.

    Ignored rather than blocked: a thread that a library began before this one would still take a blocked signal.
    """
    for name in SIGNALS:
        if hasattr(signal, name):
            signal.signal(getattr(signal, name), signal.SIG_IGN)


def _end(workers: list[Any]) -> None:
    """End those that nobody has told that no more batches are wanted; Python asks by SIGTERM, which they ignore."""
    for worker in workers:
        if worker.is_alive():
            worker.kill()
