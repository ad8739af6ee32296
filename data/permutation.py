"""Random numbers and permutations as functions of an index, which need no state and no memory."""

from typing import Any

import numpy as np
import numpy.typing as npt

__all__ = ["Permutation", "uniform"]

Numbers = npt.NDArray[np.int64]

ROUNDS = 8  # even, so that both halves have their width again
LEAST_BITS = 6  # narrower networks mix badly
GOLDEN = 0x9E3779B97F4A7C15
MASK = (1 << 64) - 1


class Permutation:
    """A pseudorandom permutation of `range(length)`; each element is computed by itself.

    A Feistel network (Luby and Rackoff, 1988) permutes a range of a power of two. What leaves `range(length)` is
    permuted again until it is back (cycle walking: Black and Rogaway, 2002), on average less than once more.

    Args:
        length: Number of elements.
        key: Integers that choose the permutation.

    Example:
        >>> import numpy as np
        >>> order = Permutation(10**8, 0, 3)
        >>> order(np.arange(3)).tolist()
        [56955147, 36653881, 16820556]
    """

    def __init__(self, length: int, *key: int) -> None:
        self.length = length
        bits = max(LEAST_BITS, (length - 1).bit_length())
        self._bits = bits // 2, bits - bits // 2
        self._keys = [np.uint64(_mix_one(_state(key) + number * GOLDEN)) for number in range(ROUNDS)]

    def __call__(self, places: Numbers) -> Numbers:
        """Return the elements at places in [0, length)."""
        found = self._permute(np.asarray(places).astype(np.uint64))
        while len(outside := np.flatnonzero(found >= self.length)):
            found[outside] = self._permute(found[outside])
        elements: Numbers = found.astype(np.int64)
        return elements

    def _permute(self, values: Any) -> Any:
        """Permute the network's whole range."""
        high, low = self._bits
        for key in self._keys:
            left, right = values >> np.uint64(low), values & np.uint64((1 << low) - 1)
            left ^= _mix(right ^ key) >> np.uint64(64 - high)
            values = (right << np.uint64(high)) | left
            high, low = low, high
        return values


def uniform(places: Numbers, *key: int) -> npt.NDArray[np.float64]:
    """Return the random numbers in [0, 1) of given places; `key` chooses the sequence."""
    drawn = _mix(np.asarray(places).astype(np.uint64) * np.uint64(GOLDEN) + np.uint64(_state(key)))
    numbers: npt.NDArray[np.float64] = (drawn >> np.uint64(11)) * 2.0**-53
    return numbers


def _state(key: tuple[int, ...]) -> int:
    """Return 64 bits that depend on all integers of a key and on their order."""
    state = len(key)
    for number in key:
        state = _mix_one((state + GOLDEN) ^ _mix_one(number))
    return state


def _mix(values: Any) -> Any:
    """Mix 64 bits (Stafford's variant 13 of MurmurHash3's finalizer, as in SplitMix64)."""
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))


def _mix_one(number: int) -> int:
    return int(_mix(np.array([number & MASK], np.uint64))[0])
