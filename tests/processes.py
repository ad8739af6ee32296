"""Two processes, the test's own and one more: each that is started loads torch anew, which takes seconds."""

from collections.abc import Callable
from pathlib import Path

import torch
import torch.multiprocessing as mp

__all__ = ["in_two"]

Work = Callable[[int, Path], None]


def in_two(work: Work, folder: Path) -> None:
    """Run `work(rank, folder)` here as rank 0 and in a new process as rank 1, each on one thread."""
    other = mp.get_context("spawn").Process(target=_on_one_thread, args=(work, 1, folder))
    other.start()
    try:
        _on_one_thread(work, 0, folder)
        other.join()
    finally:
        other.kill()
    assert other.exitcode == 0


def _on_one_thread(work: Work, rank: int, folder: Path) -> None:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        work(rank, folder)
    finally:
        torch.set_num_threads(threads)
