"""Pack codes into fixed-width bits per codebook, so that a prefix of the bits holds the first steps."""

from bisect import bisect_right
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

__all__ = ["Codebook", "Packing"]

Codes = npt.NDArray[np.int64]


class Codebook(NamedTuple):
    """Size and stride of a codebook.

    Attributes:
        size: Number of entries.
        stride: Number of steps that share one code.
    """

    size: int
    stride: int = 1

    @property
    def width(self) -> int:
        """Bits per code, ceil(log2(size))."""
        return (self.size - 1).bit_length()


class Packing:
    """Bit layout of codes `(codebooks, steps, *inner)`.

    The order is by step, then position (last axis fastest), then codebook. A codebook of stride s has codes only at
    the steps 0, s, 2s, ... Each code has its codebook's width, the highest bit first. Zero bits pad the last byte.

    Args:
        codebooks: The codebooks, in order.
        inner: Sizes of the axes after that of steps.

    Example:
        >>> packing = Packing([Codebook(1024), Codebook(7)], inner=())  # 10 + 3 bits per step
        >>> data = packing.pack(np.array([[1, 2, 1023], [0, 6, 3]]))  # (codebooks, steps)
        >>> len(data), packing.unpack(data, steps=3).tolist()
        (5, [[1, 2, 1023], [0, 6, 3]])
    """

    def __init__(self, codebooks: Sequence[Codebook], inner: Sequence[int]) -> None:
        self.codebooks = tuple(codebooks)
        self.inner = tuple(inner)
        self.positions = int(np.prod(self.inner, dtype=np.int64))
        self.widths = np.array([codebook.width for codebook in self.codebooks])

    def bits(self, steps: int) -> int:
        """Return the number of bits of `steps` steps."""
        each = (-(-steps // codebook.stride) * codebook.width for codebook in self.codebooks)
        return self.positions * sum(each)

    def size(self, steps: int) -> int:
        """Return the number of bytes of `steps` steps."""
        return -(-self.bits(steps) // 8)

    def steps(self, size: int, most: int) -> int:
        """Return how many of `most` steps are complete in the first `size` bytes."""
        return bisect_right(range(most + 1), 8 * size, key=self.bits) - 1

    def pack(self, codes: Codes) -> bytes:
        """Pack codes `(codebooks, steps, *inner)`; all codebooks have a code at the first step."""
        # (codebooks, steps, *inner) -> (steps, positions, codebooks)
        flat = np.moveaxis(codes.reshape(len(self.codebooks), -1, self.positions), 0, 2)
        chosen, widths, begins = self._layout(flat.shape[0])
        values, bits = flat[chosen], np.zeros(self.bits(flat.shape[0]), np.uint8)
        for place in range(widths.max(initial=0)):
            there = place < widths
            bits[begins[there] + place] = values[there] >> (widths[there] - 1 - place) & 1
        return np.packbits(bits).tobytes()

    def unpack(self, data: bytes, steps: int) -> Codes:
        """Undo `pack`: int64 `(codebooks, steps, *inner)`. Codes may exceed their codebook's size: check them."""
        chosen, widths, begins = self._layout(steps)
        bits = np.unpackbits(np.frombuffer(data, np.uint8), count=self.bits(steps))
        values = np.zeros(len(widths), np.int64)
        for place in range(widths.max(initial=0)):
            there = place < widths
            values[there] = values[there] << 1 | bits[begins[there] + place]
        flat = np.zeros(chosen.shape, np.int64)
        flat[chosen] = values
        for number, codebook in enumerate(self.codebooks):  # repeat each code for the `stride` steps that share it
            flat[:, :, number] = np.repeat(flat[:: codebook.stride, :, number], codebook.stride, axis=0)[:steps]
        # (steps, positions, codebooks) -> (codebooks, steps, *inner)
        return np.moveaxis(flat, 2, 0).reshape(len(self.codebooks), steps, *self.inner)

    def _layout(self, steps: int) -> tuple[npt.NDArray[np.bool_], npt.NDArray[np.int64], npt.NDArray[np.int64]]:
        """Return the mask of written codes `(steps, positions, codebooks)`, and their widths and bit offsets."""
        present = np.arange(steps)[:, None] % [codebook.stride for codebook in self.codebooks] == 0
        chosen = np.repeat(present[:, None], self.positions, axis=1)
        widths = np.broadcast_to(self.widths, chosen.shape)[chosen]
        return chosen, widths, widths.cumsum() - widths
