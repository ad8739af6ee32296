"""What the C library does with memory that a step frees."""

import ctypes
import platform

__all__ = ["keep_freed_memory"]

# <malloc.h>: how much free memory at the end of the heap goes back, and from which size on a block is mapped by itself.
_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3


def keep_freed_memory(*, keep: bool = True) -> bool:
    """Keep freed memory for the next step instead of returning it to the system.

    By glibc's rule large tensors go back to the system when they are freed and come again, zeroed page by page, at
    each operation: a tenth to a third of a step on a processor (benchmarks/audio.py). Results don't change.

    Args:
        keep: False for glibc's own rule, as far as its own adjusting goes.

    Returns:
        Whether the C library took it: glibc does, others have no such rule.
    """
    if platform.libc_ver()[0] != "glibc":
        return False
    library = ctypes.CDLL(None)
    trim, mapped = ((1 << 31) - 1, 1 << 30) if keep else (64 << 20, 32 << 20)
    taken = library.mallopt(_TRIM_THRESHOLD, trim) and library.mallopt(_MMAP_THRESHOLD, mapped)
    if not keep:
        library.malloc_trim(0)
    return bool(taken)
