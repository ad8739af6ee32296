"""Codes as a sequence of symbols, and the causal context of each symbol; NumPy only."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from .packing import Codebook, Codes

__all__ = ["Structure", "Symbols"]

Numbers = npt.NDArray[np.int64]


class Structure(NamedTuple):
    """What is known of m symbols before any of them is.

    Attributes:
        steps: `(m,)`, step of each symbol.
        kinds: `(m,)`, kind of each symbol: a digit of a codebook.
        tokens: `(m,)`, number of its ordered token; 0 for placed tokens.
        sources: `(m, 2 + axes after that of steps)`, indices of the symbol before it and of those of its own kind
            one step back along each axis of the grid; -1 if there is none.
    """

    steps: Numbers
    kinds: Numbers
    tokens: Numbers
    sources: Numbers


class Symbols:
    """Codes `(codebooks, steps, *inner)` as a row of symbols, in the order in which they are packed.

    A code of a codebook of many entries is written as several digits, the highest first: an alphabet of at most `limit`
    symbols each. All digits of all codebooks together, the *kinds*, have one vocabulary, each a stretch of its own.

    Args:
        codebooks: In their order.
        ordered: The axis after that of codebooks that numbers tokens: 0 for images, 1 for clips of blocks, None for
            placed tokens.
        limit: The most symbols of an alphabet.
    """

    def __init__(self, codebooks: Sequence[Codebook], ordered: int | None, limit: int) -> None:
        self.codebooks = tuple(codebooks)
        self.ordered = ordered
        self.radices = [_radices(codebook.size, limit) for codebook in self.codebooks]
        self.sizes = np.array([radix for digits in self.radices for radix in digits])
        self.offsets = np.cumsum(self.sizes) - self.sizes
        self.vocabulary = int(self.sizes.sum())
        self._strides = np.repeat([codebook.stride for codebook in codebooks], [len(digits) for digits in self.radices])

    def structure(self, num_codebooks: int, steps: int, inner: Sequence[int]) -> Structure:
        """Compute the structure of codes `(num_codebooks, steps, *inner)`, which doesn't depend on their values."""
        written = self._mark_written(num_codebooks, steps, inner)
        at = np.argwhere(written)  # (m, axes + 1), in their order
        index = np.cumsum(written).reshape(written.shape) - 1  # of each in the row
        sources = [np.arange(len(at)) - 1]
        for axis in range(written.ndim - 1):
            back = at.copy()
            back[:, axis] -= 1 if axis else self._strides[at[:, -1]]
            sources.append(np.where(back[:, axis] >= 0, index[tuple(np.maximum(back, 0).T)], -1))
        tokens = np.zeros(len(at), np.int64) if self.ordered is None else at[:, self.ordered]
        return Structure(at[:, 0], at[:, -1], tokens, np.stack(sources, axis=1))

    def contexts(self, structure: Structure, row: Numbers) -> Numbers:
        """Return the prior's input for each symbol: kind, number of the token, sources; `(m, 2 + sources)`.

        Sources are symbols of the vocabulary, 1 added; 0 stands for none.

        Args:
            structure: Structure of the sequence.
            row: Symbols `(m,)`, or the first of them; unknown sources are 0.
        """
        known = np.zeros(len(structure.kinds) + 1, np.int64)  # at -1 there is none
        known[: len(row)] = row + 1
        return np.concatenate([structure.kinds[:, None], structure.tokens[:, None], known[structure.sources]], axis=1)

    def row(self, codes: Codes) -> Numbers:
        """Write codes `(codebooks, steps, *inner)` as symbols of the vocabulary, `(m,)`."""
        digits: list[Numbers] = []
        for rest, radices in zip(codes, self.radices, strict=False):
            found = []
            for radix in reversed(radices):
                found.append(rest % radix)
                rest = rest // radix  # noqa: PLW2901 (the higher digits)
            digits += reversed(found)
        flat = np.stack(digits, axis=-1) + self.offsets[: len(digits)]
        num_codebooks, steps, *inner = codes.shape
        return np.asarray(flat[self._mark_written(num_codebooks, steps, inner)])

    def codes(self, row: Numbers, num_codebooks: int, steps: int, inner: Sequence[int]) -> Codes:
        """Undo `row`: int64 `(num_codebooks, steps, *inner)`.

        Codes are what the digits say, perhaps no entry of their codebook.
        """
        written = self._mark_written(num_codebooks, steps, inner)
        flat = np.zeros(written.shape, np.int64)
        flat[written] = row
        found, at = np.zeros((num_codebooks, steps, *inner), np.int64), 0
        for number, codebook in enumerate(self.codebooks[:num_codebooks]):
            for radix in self.radices[number]:
                found[number] = found[number] * radix + flat[..., at] - self.offsets[at]
                at += 1
            found[number] = np.repeat(found[number, :: codebook.stride], codebook.stride, axis=0)[:steps]
        return found

    def _mark_written(self, num_codebooks: int, steps: int, inner: Sequence[int]) -> npt.NDArray[np.bool_]:
        """Return which digits are in the row, `(steps, *inner, kinds)`: those of codebooks with an own code."""
        kinds = sum(map(len, self.radices[:num_codebooks]))
        begins = np.arange(steps)[:, None] % self._strides[:kinds] == 0
        return np.broadcast_to(begins.reshape(steps, *(1 for _ in inner), kinds), (steps, *inner, kinds))


def _radices(size: int, limit: int) -> list[int]:
    """Divide a codebook into digits, all but the highest of as many symbols; by powers of two where its size is one."""
    count = 1
    while limit**count < size:
        count += 1
    if count == 1:
        return [size]
    radix = next(radix for radix in range(2, limit + 1) if radix**count >= size)
    if size & (size - 1) == 0:
        radix = 1 << (radix - 1).bit_length()
    highest = -(-size // radix ** (count - 1))
    return [highest, *[radix] * (count - 1)]
