"""Bit planes as bytes: an entropy coder whose bytes, cut after any plane, decode to the planes before the cut.

Asymmetric numeral systems (arXiv 1311.2540, range variant): a bit's probability depends on the higher bits of its
number. It is a byte for each of these contexts, written before its plane. Many states run in parallel in numpy. The
decoder reads a plane after the other, from the first byte on; the coder goes from the last bit to the first.

`export/bitstream/range_coder.py` shares no arithmetic with it: that one takes symbols of any alphabet one by one, as a
prior that has seen those before needs it, and this one millions of bits at once.
"""

from itertools import accumulate
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

__all__ = ["CodedPlanes", "pack", "unpack"]

Planes = npt.NDArray[np.uint8]
Counts = npt.NDArray[np.int64]

EACH = 1024  # numbers to a state
CONTEXT = 5  # higher bits on which a bit's chance hangs
LOW = 1 << 16  # least state; it goes to and from the stream by words of 16 bits


class CodedPlanes(NamedTuple):
    """Bit planes as bytes.

    Attributes:
        data: The bytes.
        ends: After how many of them each plane is known.
    """

    data: bytes
    ends: list[int]


def pack(planes: Planes) -> CodedPlanes:
    """Code planes `(bits, n)` of 0 and 1, the most significant first."""
    bits, n = planes.shape
    lanes = _lanes(n)
    state = np.full(lanes, LOW, np.uint64)
    parts: list[bytes] = []
    for bit in reversed(range(bits)):
        contexts, count = _contexts(planes[:bit], n)
        table = _chances(contexts, planes[bit], count)
        one, zero = _shares(table, contexts)
        share, start = (np.where(planes[bit], a, b) for a, b in ((one, zero), (zero, np.zeros_like(zero))))
        words: list[bytes] = []
        for at in reversed(range(0, n, lanes)):
            part, low = share[at : at + lanes], start[at : at + lanes]
            now = state[: len(part)]
            full = now >= part << np.uint64(24)
            words.append(now[full].astype("<u2").tobytes())
            now = np.where(full, now >> np.uint64(16), now)
            state[: len(part)] = (now // part << np.uint64(8)) + now % part + low
        parts.append(table.tobytes() + b"".join(reversed(words)))
    parts = [state.astype("<u4").tobytes(), *reversed(parts)]
    return CodedPlanes(b"".join(parts), list(accumulate(map(len, parts)))[1:])


def unpack(data: bytes, n: int) -> Planes:
    """Decode what `pack` made of planes of n bits, or its beginning up to one of its `ends`.

    Raises:
        ValueError: The bytes end elsewhere.
    """
    lanes = _lanes(n)
    state = np.frombuffer(data, "<u4", lanes).astype(np.uint64)
    planes, offset = np.zeros((0, n), np.uint8), 4 * lanes
    while offset < len(data):
        contexts, count = _contexts(planes, n)
        one, zero = _shares(np.frombuffer(data, np.uint8, count, offset), contexts)
        offset += count
        words = np.frombuffer(data, "<u2", (len(data) - offset) // 2, offset).astype(np.uint64)
        used, plane = 0, np.empty(n, np.uint8)
        for at in range(0, n, lanes):
            first, second = zero[at : at + lanes], one[at : at + lanes]
            now = state[: len(first)]
            slot = now & np.uint64(255)
            bit = slot >= first
            now = np.where(bit, second, first) * (now >> np.uint64(8)) + slot - first * bit
            empty = now < LOW
            more = int(empty.sum())
            if used + more > len(words):
                raise ValueError("the bytes end within a plane")
            now[empty] = now[empty] << np.uint64(16) | words[used : used + more]
            used += more
            state[: len(first)], plane[at : at + lanes] = now, bit
        offset += 2 * used
        planes = np.concatenate([planes, plane[None]])
    return planes


def _lanes(n: int) -> int:
    return -(-n // EACH)


def _contexts(higher: Planes, n: int) -> tuple[Counts, int]:
    """Number each bit's context, and count the contexts that there can be."""
    contexts = np.zeros(n, np.int64)
    for plane in higher[:CONTEXT]:
        contexts = 2 * contexts + plane
    return contexts, 1 << min(len(higher), CONTEXT)


def _chances(contexts: Counts, plane: Planes, count: int) -> Planes:
    """Count the ones in each context, in 256ths; neither none nor all."""
    seen, ones = np.bincount(contexts, minlength=count), np.bincount(contexts, plane, count)
    return np.rint(256 * (ones + 0.5) / (seen + 1)).clip(1, 255).astype(np.uint8)


def _shares(table: Planes, contexts: Counts) -> tuple[npt.NDArray[np.uint64], npt.NDArray[np.uint64]]:
    """Return the 256ths of a one and of a zero for each bit."""
    one = table.astype(np.uint64)[contexts]
    return one, np.uint64(256) - one
