"""Codes as bits: each in as few whole bits as its codebook needs, so that a prefix of the bits is a shorter code."""

from bisect import bisect_right
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

__all__ = ["Codebook", "Packing"]

Codes = npt.NDArray[np.int64]


class Codebook(NamedTuple):
    """One codebook of a code.

    Attributes:
        size: Its entries.
        stride: Steps for which one of its codes stands.
    """

    size: int
    stride: int = 1

    @property
    def width(self) -> int:
        """Bits of a code."""
        return (self.size - 1).bit_length()


class Packing:
    """The order and the widths in which codes `(codebooks, steps, *inner)` follow each other.

    Step by step; within a step by position, the last axis fastest; at a position codebook by codebook. A codebook whose
    codes stand for several steps has them where they begin. Each code has its codebook's width, the highest bit first;
    unused bits of the last byte are 0.

    Args:
        codebooks: In their order.
        inner: Sizes of the axes after that of steps.
    """

    def __init__(self, codebooks: Sequence[Codebook], inner: Sequence[int]) -> None:
        self.codebooks = tuple(codebooks)
        self.inner = tuple(inner)
        self.positions = int(np.prod(self.inner, dtype=np.int64))
        self.widths = np.array([codebook.width for codebook in self.codebooks])

    def bits(self, steps: int) -> int:
        """Count the bits of `steps` steps."""
        each = (-(-steps // codebook.stride) * codebook.width for codebook in self.codebooks)
        return self.positions * sum(each)

    def size(self, steps: int) -> int:
        """Count their bytes."""
        return -(-self.bits(steps) // 8)

    def steps(self, size: int, most: int) -> int:
        """Count the steps, `most` at most, that are whole in the first `size` bytes."""
        return bisect_right(range(most + 1), 8 * size, key=self.bits) - 1

    def pack(self, codes: Codes) -> bytes:
        """Pack codes `(codebooks, steps, *inner)`; `steps` begin where all codebooks have a code."""
        flat = np.moveaxis(
            codes.reshape(len(self.codebooks), -1, self.positions), 0, 2
        )  # (steps, positions, codebooks)
        chosen, widths, begins = self._layout(flat.shape[0])
        values, bits = flat[chosen], np.zeros(self.bits(flat.shape[0]), np.uint8)
        for place in range(widths.max(initial=0)):
            there = place < widths
            bits[begins[there] + place] = values[there] >> (widths[there] - 1 - place) & 1
        return np.packbits(bits).tobytes()

    def unpack(self, data: bytes, steps: int) -> Codes:
        """Undo `pack`: int64 `(codebooks, steps, *inner)`.

        Codes are what the bits say, perhaps no entry of their codebook.
        """
        chosen, widths, begins = self._layout(steps)
        bits = np.unpackbits(np.frombuffer(data, np.uint8), count=self.bits(steps))
        values = np.zeros(len(widths), np.int64)
        for place in range(widths.max(initial=0)):
            there = place < widths
            values[there] = values[there] << 1 | bits[begins[there] + place]
        flat = np.zeros(chosen.shape, np.int64)
        flat[chosen] = values
        for number, codebook in enumerate(self.codebooks):  # a code also stands for the steps after it
            flat[:, :, number] = np.repeat(flat[:: codebook.stride, :, number], codebook.stride, axis=0)[:steps]
        return np.moveaxis(flat, 2, 0).reshape(len(self.codebooks), steps, *self.inner)

    def _layout(self, steps: int) -> tuple[npt.NDArray[np.bool_], npt.NDArray[np.int64], npt.NDArray[np.int64]]:
        """Return which codes are written, `(steps, positions, codebooks)`, and their widths and first bits."""
        present = np.arange(steps)[:, None] % [codebook.stride for codebook in self.codebooks] == 0
        chosen = np.repeat(present[:, None], self.positions, axis=1)
        widths = np.broadcast_to(self.widths, chosen.shape)[chosen]
        return chosen, widths, widths.cumsum() - widths
