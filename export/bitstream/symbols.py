"""Codes as a sequence of symbols, and the causal context of each symbol; NumPy only."""

from collections.abc import Sequence
from itertools import pairwise
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from .packing import Codebook, Codes

__all__ = ["ORDERS", "Structure", "Symbols"]

Numbers = npt.NDArray[np.int64]
ORDERS = ("serial", "delayed")


class Structure(NamedTuple):
    """Positions and causal contexts of m symbols, which don't depend on the symbols' values.

    Attributes:
        steps: `(m,)`, step of each symbol.
        kinds: `(m,)`, kind of each symbol: the index of its codebook's digit.
        tokens: `(m,)`, index of its ordered token; 0 for placed tokens.
        sources: `(m, 2 + len(inner))`, indices of the previous symbol, and of the symbols of the same kind one position
            back along each axis of the grid, steps first; -1 if there is none. In the delayed order the previous symbol
            is that of the kind before, at the same position.
        places: `(m,)`, index of each symbol in the digits `(steps, *inner, kinds)`, flattened.
        behind: `(m,)`, number of symbols of its group that precede each symbol; 0 begins a group.
    """

    steps: Numbers
    kinds: Numbers
    tokens: Numbers
    sources: Numbers
    places: Numbers
    behind: Numbers

    @property
    def groups(self) -> list[slice]:
        """The groups of symbols that are decoded together, as consecutive parts of the sequence."""
        begins = [*np.flatnonzero(self.behind == 0).tolist(), len(self.behind)]
        return [slice(*pair) for pair in pairwise(begins)]


class Symbols:
    """Conversion of codes `(codebooks, steps, *inner)` to a symbol sequence, and back.

    The serial order is that of `Packing`; each symbol is a group of its own. In the delayed order, the symbol of kind q
    at step t and position (i, j) is in group t + i + j + q, and the sequence is sorted by group. No symbol depends on
    others of its group. Along time this is MusicGen's pattern (arXiv 2306.05284, section 2.2); on a grid, groups are
    diagonals.

    A code of a large codebook becomes several digits, the highest first, each of an alphabet of at most `limit`
    symbols. The *kinds* are all digits of all codebooks; the vocabulary concatenates their alphabets.

    Args:
        codebooks: The codebooks, in order.
        ordered: Axis of the ordered tokens, not counting that of codebooks: 0 for images, 1 for blocks of a clip; None
            for placed tokens.
        limit: Maximum size of an alphabet.
        order: One of `ORDERS`.

    Example:
        >>> symbols = Symbols([Codebook(4), Codebook(64)], ordered=None, limit=8)  # 64 entries are 2 digits of base 8
        >>> row = symbols.row(np.array([[3, 0], [63, 8]]))  # (codebooks, steps)
        >>> row.tolist(), symbols.codes(row, 2, 2, ()).tolist()
        ([3, 11, 19, 0, 5, 12], [[3, 0], [63, 8]])
    """

    def __init__(self, codebooks: Sequence[Codebook], ordered: int | None, limit: int, order: str = "serial") -> None:
        self.codebooks = tuple(codebooks)
        self.ordered = ordered
        self.order = order
        self.radices = [_radices(codebook.size, limit) for codebook in self.codebooks]
        self.sizes = np.array([radix for digits in self.radices for radix in digits])
        self.offsets = np.cumsum(self.sizes) - self.sizes
        self.vocabulary = int(self.sizes.sum())
        self._strides = np.repeat([codebook.stride for codebook in codebooks], [len(digits) for digits in self.radices])

    def structure(self, num_codebooks: int, steps: int, inner: Sequence[int]) -> Structure:
        """Compute the structure of codes of shape `(num_codebooks, steps, *inner)`."""
        written = self._mark_written(num_codebooks, steps, inner)
        at = np.argwhere(written)  # (m, 2 + len(inner))
        places, behind = np.flatnonzero(written), np.zeros(len(at), np.int64)
        index = np.full(written.shape, -1)  # position of each digit in the sequence
        if self.order == "delayed":
            groups = at.sum(axis=1)
            chosen = np.argsort(groups, kind="stable")
            at, places, groups = at[chosen], places[chosen], groups[chosen]
            behind = np.arange(len(at)) - np.searchsorted(groups, groups)
        index.reshape(-1)[places] = np.arange(len(at))
        sources = [np.arange(len(at)) - 1] if self.order == "serial" else [_step_back(at, index, -1, np.array(1))]
        for axis in range(written.ndim - 1):
            sources.append(_step_back(at, index, axis, np.array(1) if axis else self._strides[at[:, -1]]))
        tokens = np.zeros(len(at), np.int64) if self.ordered is None else at[:, self.ordered]
        return Structure(at[:, 0], at[:, -1], tokens, np.stack(sources, axis=1), places, behind)

    def contexts(self, structure: Structure, row: Numbers) -> Numbers:
        """Return the prior's input for each symbol, `(m, 2 + sources)`; in the delayed order `(m, 3 + sources)`.

        The columns are kind, token index, in the delayed order the number of earlier symbols of its group, and sources.
        A source is a symbol of the vocabulary plus 1; 0 stands for none.

        Args:
            structure: Structure of the sequence.
            row: Symbols `(m,)`, or a prefix of them; sources beyond it are 0.
        """
        known = np.zeros(len(structure.kinds) + 1, np.int64)  # index -1: no source
        known[: len(row)] = row + 1
        return np.concatenate([self.fixed(structure), known[structure.sources]], axis=1)

    def fixed(self, structure: Structure) -> Numbers:
        """Return the columns of the contexts before the sources, which don't depend on symbols."""
        columns = [structure.kinds, structure.tokens, *([structure.behind] if self.order == "delayed" else [])]
        return np.stack(columns, axis=1)

    def row(self, codes: Codes) -> Numbers:
        """Convert codes `(codebooks, steps, *inner)` to symbols of the vocabulary, `(m,)`."""
        digits: list[Numbers] = []
        for rest, radices in zip(codes, self.radices, strict=False):
            found = []
            for radix in reversed(radices):
                found.append(rest % radix)
                rest = rest // radix  # noqa: PLW2901 (the higher digits)
            digits += reversed(found)
        flat = np.stack(digits, axis=-1) + self.offsets[: len(digits)]
        num_codebooks, steps, *inner = codes.shape
        return np.asarray(flat.reshape(-1)[self.structure(num_codebooks, steps, inner).places])

    def codes(self, row: Numbers, num_codebooks: int, steps: int, inner: Sequence[int]) -> Codes:
        """Undo `row`: int64 `(num_codebooks, steps, *inner)`. Codes may exceed their codebook's size: check them."""
        kinds = sum(map(len, self.radices[:num_codebooks]))
        flat = np.zeros((steps, *inner, kinds), np.int64)
        flat.reshape(-1)[self.structure(num_codebooks, steps, inner).places] = row
        found, at = np.zeros((num_codebooks, steps, *inner), np.int64), 0
        for number, codebook in enumerate(self.codebooks[:num_codebooks]):
            for radix in self.radices[number]:
                found[number] = found[number] * radix + flat[..., at] - self.offsets[at]
                at += 1
            found[number] = np.repeat(found[number, :: codebook.stride], codebook.stride, axis=0)[:steps]
        return found

    def _mark_written(self, num_codebooks: int, steps: int, inner: Sequence[int]) -> npt.NDArray[np.bool_]:
        """Return the mask of written digits `(steps, *inner, kinds)`: those at multiples of their codebook's stride."""
        kinds = sum(map(len, self.radices[:num_codebooks]))
        begins = np.arange(steps)[:, None] % self._strides[:kinds] == 0
        return np.broadcast_to(begins.reshape(steps, *(1 for _ in inner), kinds), (steps, *inner, kinds))


def _step_back(at: Numbers, index: Numbers, axis: int, by: Numbers) -> Numbers:
    """Return the sequence index of the symbol `by` positions back along an axis from each of `at`; -1 if none."""
    back = at.copy()
    back[:, axis] -= by
    found = index[tuple(np.maximum(back, 0).T)]
    return np.where(back[:, axis] >= 0, found, -1)


def _radices(size: int, limit: int) -> list[int]:
    """Return the digits' bases for a codebook, equal except for the first; powers of two if the size is one."""
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
