"""Embedded entropy coder of bit planes: bytes cut after any plane decode to the planes before the cut.

Range asymmetric numeral systems (rANS, arXiv 1311.2540), vectorized over many states in NumPy. The context of a bit is
the higher bits of its number. Each context's probability is one byte, written before the plane. The decoder reads plane
by plane from the first byte; the encoder runs from the last bit to the first.

`export/bitstream/range_coder.py` is independent: it codes one symbol of any alphabet at a time, as an autoregressive
prior requires. This one codes millions of bits at once.
"""

from itertools import accumulate
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

__all__ = ["CodedPlanes", "pack", "unpack"]

Planes = npt.NDArray[np.uint8]
Counts = npt.NDArray[np.int64]

EACH = 1024  # numbers per rANS state
CONTEXT = 5  # number of higher bits in a bit's context
LOW = 1 << 16  # smallest state; renormalization moves words of 16 bits


class CodedPlanes(NamedTuple):
    """Entropy-coded bit planes.

    Attributes:
        data: The bytes.
        ends: Number of bytes needed to decode each plane and those before it.
    """

    data: bytes
    ends: list[int]


def pack(planes: Planes) -> CodedPlanes:
    """Encode planes `(bits, n)` of 0 and 1, most significant first."""
    bits, n = planes.shape
    lanes = _lanes(n)
    state = np.full(lanes, LOW, np.uint64)
    parts: list[bytes] = []
    for bit in reversed(range(bits)):
        contexts, count = _contexts(planes[:bit], n)
        table = _estimate(contexts, planes[bit], count)
        one, zero = _frequencies(table, contexts)
        share, start = (np.where(planes[bit], a, b) for a, b in ((one, zero), (zero, np.zeros_like(zero))))
        words: list[bytes] = []
        for at in reversed(range(0, n, lanes)):
            part, low = share[at : at + lanes], start[at : at + lanes]
            now = state[: len(part)]
            full = now >= part << np.uint64(24)
            words.append(now[full].astype("<u2").tobytes())
            now = np.where(full, now >> np.uint64(16), now)
            # state = state // f * 256 + state % f + start, for a bit of probability f / 256
            state[: len(part)] = (now // part << np.uint64(8)) + now % part + low
        parts.append(table.tobytes() + b"".join(reversed(words)))
    parts = [state.astype("<u4").tobytes(), *reversed(parts)]
    return CodedPlanes(b"".join(parts), list(accumulate(map(len, parts)))[1:])


def unpack(data: bytes, n: int) -> Planes:
    """Decode the bytes of `pack`, whole or cut at one of its `ends`, to planes of n bits.

    Raises:
        ValueError: The bytes are cut within a plane.
    """
    lanes = _lanes(n)
    state = np.frombuffer(data, "<u4", lanes).astype(np.uint64)
    planes, offset = np.zeros((0, n), np.uint8), 4 * lanes
    while offset < len(data):
        contexts, count = _contexts(planes, n)
        one, zero = _frequencies(np.frombuffer(data, np.uint8, count, offset), contexts)
        offset += count
        words = np.frombuffer(data, "<u2", (len(data) - offset) // 2, offset).astype(np.uint64)
        used, plane = 0, np.empty(n, np.uint8)
        for at in range(0, n, lanes):
            first, second = zero[at : at + lanes], one[at : at + lanes]
            now = state[: len(first)]
            slot = now & np.uint64(255)  # below the frequency of a zero: the bit is 0
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
    """Return the number of parallel rANS states for n numbers."""
    return -(-n // EACH)


def _contexts(higher: Planes, n: int) -> tuple[Counts, int]:
    """Return the index of each bit's context, and the number of contexts."""
    contexts = np.zeros(n, np.int64)
    for plane in higher[:CONTEXT]:
        contexts = 2 * contexts + plane
    return contexts, 1 << min(len(higher), CONTEXT)


def _estimate(contexts: Counts, plane: Planes, count: int) -> Planes:
    """Estimate the probability of a one in each context, in 256ths from 1 to 255."""
    seen, ones = np.bincount(contexts, minlength=count), np.bincount(contexts, plane, count)
    return np.rint(256 * (ones + 0.5) / (seen + 1)).clip(1, 255).astype(np.uint8)


def _frequencies(table: Planes, contexts: Counts) -> tuple[npt.NDArray[np.uint64], npt.NDArray[np.uint64]]:
    """Return the probabilities of a one and of a zero for each bit, in 256ths."""
    one = table.astype(np.uint64)[contexts]
    return one, np.uint64(256) - one
