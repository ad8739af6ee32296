"""Settings of the allocators of host and GPU for memory that a training step frees."""

import ctypes
import os
import platform

__all__ = ["keep_freed_memory", "let_segments_grow"]

ALLOCATOR = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF")  # torch's environment variable, and its older name

# <malloc.h>: free bytes at the heap's top that are returned to the system, and the block size from which mmap is used.
_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3


def keep_freed_memory(*, keep: bool = True) -> bool:
    """Keep freed memory for the next step instead of returning it to the system.

    By default glibc returns large freed blocks, and each operation maps and zeroes them again. That costs a tenth to a
    third of a training step on a CPU (benchmarks/audio.py). Results don't change.

    Args:
        keep: False restores glibc's default, at the limits of its dynamic thresholds.

    Returns:
        True if the C library accepted the settings; only glibc has them.
    """
    if platform.libc_ver()[0] != "glibc":
        return False
    library = ctypes.CDLL(None)
    trim, mapped = ((1 << 31) - 1, 1 << 30) if keep else (64 << 20, 32 << 20)
    taken = library.mallopt(_TRIM_THRESHOLD, trim) and library.mallopt(_MMAP_THRESHOLD, mapped)
    if not keep:
        library.malloc_trim(0)
    return bool(taken)


def let_segments_grow() -> None:
    """Let the GPU's allocator grow its segments, unless the environment configures it; before it is first used.

    If batches differ in length, freed blocks of one size don't fit the next: the memory falls into pieces.
    """
    if not any(name in os.environ for name in ALLOCATOR):
        os.environ[ALLOCATOR[0]] = "expandable_segments:True"
