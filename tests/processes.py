"""Processes beside the test's own: each that is started loads torch anew, which takes seconds."""

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.multiprocessing as mp

__all__ = ["READS_PEAKS", "in_two", "peak_memory"]

Work = Callable[[int, Path], None]
# Not by getrusage: what a process forks begins with its own peak, and pytest's is large.
PEAK = """
import sys
from pathlib import Path
from varitok.export.cli.main import main
main(sys.argv[1:])
print(Path("/proc/self/status").read_text().partition("VmHWM:")[2].split()[0])
"""
READS_PEAKS = pytest.mark.skipif(not Path("/proc/self/status").is_file(), reason="the peak is read as Linux reports it")


def peak_memory(words: list[object]) -> int:
    """Run the command varitok in a process of its own, and return its peak memory in bytes."""
    command = [sys.executable, "-c", PEAK, *map(str, words)]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    return 1024 * int(done.stdout.split()[-1])


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
