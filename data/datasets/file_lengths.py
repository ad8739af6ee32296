"""A number for each file of a dataset, such as its length: measured once, by several processes, and kept."""

import logging
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import suppress
from itertools import chain
from multiprocessing import get_all_start_methods, get_context
from typing import Any

import numpy as np

from varitok import UserError

from ..decoding.errors import BadSample
from ..permutation import Numbers
from ..storage.file_index import Files
from ..storage.index_cache import alone, cached_path, is_large
from ..storage.members import File

__all__ = ["measure_files"]

_log = logging.getLogger(__name__)
AT_ONCE = 512  # files of a task
_task: Any = None


def measure_files(files: Sequence[File], number: Callable[[File], int], what: str) -> Numbers:
    """Return a number of each file; 0 if it can't be read.

    From 10,000 files on it is computed by one process for each core, once on a machine: the numbers are kept in the
    user's cache until the list of files changes.

    Args:
        files: The files.
        number: Function (file) -> its number; it can be pickled.
        what: What it returns.
    """
    if not isinstance(files, Files) or not is_large(len(files)):
        return np.array(_measure(number, files), np.int64)
    name = f"{files.identity} {what}"
    with alone(name):
        path = cached_path(name, ".npy")
        if path is not None:
            with suppress(OSError, ValueError):
                found: Numbers = np.load(path, allow_pickle=False)
                if found.shape == (len(files),):
                    return found
        found = _measure_all(files, number)
        if path is not None:
            with suppress(OSError):
                partial_path = path.with_suffix(f".{os.getpid()}.partial.npy")
                np.save(partial_path, found, allow_pickle=False)
                partial_path.replace(path)
    return found


def _measure_all(files: Files[Any], number: Callable[[File], int]) -> Numbers:
    """Measure all files, in processes.

    Raises:
        UserError: A process ended.
    """
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    _log.info("measuring %s files, once", f"{len(files):,}")
    parts = [range(at, min(at + AT_ONCE, len(files))) for at in range(0, len(files), AT_ONCE)]
    context = get_context("fork" if "fork" in get_all_start_methods() else None)
    try:
        with ProcessPoolExecutor(cores, context, _begin, (files, number)) as pool:
            return np.fromiter(chain.from_iterable(pool.map(_measure_part, parts)), np.int64, len(files))
    except BrokenProcessPool as error:
        raise UserError(
            f"{files.file_index.root}: a process that measured its files ended, as of a file that crashes its decoder;"
            " pack them without it (varitok shards --drop-bad), or set loader.bucket=0"
        ) from error


def _begin(*task: Any) -> None:
    """Keep what a process measures; it is sent once."""
    global _task  # noqa: PLW0603
    _task = task


def _measure_part(part: range) -> list[int]:
    files, number = _task
    return _measure(number, files[part.start : part.stop])


def _measure(number: Callable[[File], int], files: Sequence[File]) -> list[int]:
    found = []
    for file in files:
        try:
            found.append(number(file))
        except BadSample:
            found.append(0)
    return found
