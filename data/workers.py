"""Data loader workers, and the error when one dies."""

import pickle
import signal
import threading
from collections.abc import Iterator, Sequence
from multiprocessing import get_all_start_methods, get_context
from multiprocessing.util import Finalize
from typing import Any

import torch
from threadpoolctl import threadpool_limits
from torch.utils.data import DataLoader, get_worker_info

from varitok import UserError

from .batch import Sample
from .storage.members import File

__all__ = ["WorkerLoader", "WorkerProgress", "name_of", "start_method", "start_worker"]

SERVER = "forkserver"
SIGNALS = ("SIGINT", "SIGTERM", "SIGUSR1")
CAUSES = {
    "SIGKILL": "out of memory? set fewer workers (loader.workers), or a smaller batch (loader.batch_size)",
    "SIGBUS": "is /dev/shm full? set fewer workers (loader.workers), or a smaller batch (loader.batch_size)",
}
CRASH = "remove that file: its decoder crashed"


class WorkerProgress:
    """Index of the sample that each worker reads, in memory shared with the main process."""

    def __init__(self) -> None:
        self._indices = torch.empty(0, dtype=torch.int64)

    def prepare(self, workers: int) -> None:
        """Allocate one entry per worker, before they start."""
        self._indices = torch.full((workers,), -1).share_memory_()  # type: ignore[no-untyped-call]

    def read(self, index: int) -> None:
        """Record the sample that this worker reads; do nothing in the main process."""
        worker = get_worker_info()
        if worker is not None:
            self._indices[worker.id] = index

    def __getitem__(self, worker: int) -> int:
        """Return the index of the sample that a worker reads; -1 before its first."""
        return int(self._indices[worker])


def name_of(files: Sequence[File], index: int) -> str:
    """Return the name of a signal: its file, or its index if the dataset has no files."""
    return str(files[index]) if files else f"signal {index}"


class WorkerLoader(DataLoader[Sample]):
    """A `DataLoader` that raises a one-line error if a worker dies, with the file that it was reading.

    Its dataset has `workplaces`, a `WorkerProgress`, and `name(index)`, the name of a signal.

    torch raises from its SIGCHLD handler, wherever the main process is, perhaps while it saves a checkpoint.
    Here the error is raised when the next batch is requested.
    """

    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]
        """Return batches.

        Raises:
            UserError: A worker was killed or exited.
        """
        main = threading.current_thread() is threading.main_thread()
        child = getattr(signal, "SIGCHLD", None) if main else None
        before = signal.getsignal(child) if child else None
        started = getattr(self, "_iterator", None) is not None
        batches: Any = super().__iter__()
        if child and before is not None:
            signal.signal(child, before)
        workers = list(getattr(batches, "_workers", []))
        if workers and not started:  # kills them once `batches` is freed, or before Python joins its children at exit
            Finalize(batches, _end, (workers,), exitpriority=0)
        return self._watch(batches, workers) if workers else batches

    def _watch(self, batches: Iterator[Any], workers: list[Any]) -> Iterator[Any]:
        try:
            yield from batches
        except RuntimeError as error:
            message = self._explain(workers)
            if message is None:
                raise
            raise UserError(message) from error

    def _explain(self, workers: list[Any]) -> str | None:
        """Return the message for a dead worker: its signal, its file, and a remedy; None if all are alive."""
        for number, worker in enumerate(workers):
            if worker.exitcode:
                name = _cause(worker.exitcode)
                data: Any = self.dataset
                index = data.workplaces[number]
                reading = f" while it read {data.name(index)}" if index >= 0 else ""
                return f"a worker (process {worker.pid}) ended by {name}{reading}; {CAUSES.get(name, CRASH)}"
        return None


def _cause(status: int) -> str:
    try:
        return signal.Signals(-status).name
    except ValueError:
        return f"exit status {status}"


def start_method(dataset: object) -> str | None:
    """Return how workers are started: by a server where this process uses a GPU; None for the system's own way.

    NCCL may hang in a process that forks once it has started, and a fork copies the page tables of all that CUDA maps.
    A dataset that can't be pickled is forked all the same.
    """
    if not torch.cuda.is_available() or SERVER not in get_all_start_methods():
        return None
    try:
        pickle.dumps(dataset)
    except (pickle.PicklingError, AttributeError, TypeError):
        return None
    get_context(SERVER).set_forkserver_preload([__name__.replace("workers", "datamodule")])  # once, not by each worker
    return SERVER


def start_worker(worker: int) -> None:
    """Prepare a worker process: one thread for NumPy, and no reaction to signals that all processes of a run receive.

    torch limits its own threads. Those of NumPy's BLAS, which resampling uses, would compete in all workers.
    Signals are ignored rather than blocked: a thread that a library started earlier would still receive a blocked one.
    """
    threadpool_limits(1)
    for name in SIGNALS:
        if hasattr(signal, name):
            signal.signal(getattr(signal, name), signal.SIG_IGN)


def _end(workers: list[Any]) -> None:
    """Kill the workers that still run; they ignore SIGTERM, by which Python would end them."""
    for worker in workers:
        if worker.is_alive():
            worker.kill()
