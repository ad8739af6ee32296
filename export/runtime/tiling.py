"""Encode and decode large signals in overlapping windows, which bounds memory by the size of a window (NumPy only).

At a position that two windows cover, the code of the window whose border is farther away is kept, so that the windows'
codes form one grid. Decoded windows are cross-faded where they overlap.

    axis      |-----------------------------------------|
    windows   |------------------|
                           |------------------|
                                     |------------------|
    kept      |---------------|-----------|-------------|

Arrays are coded in tiles of several axes (`encode_tiled`, `decode_tiled`); signals that are too long for memory, in
windows along the first (`encode_windows`, `decode_windows`).
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import reduce
from itertools import product
from typing import Any, NamedTuple, TypeAlias

import numpy as np
import numpy.typing as npt

from varitok import UserError, progress

__all__ = [
    "Passage",
    "Tile",
    "Window",
    "count_windows",
    "decode_tiled",
    "decode_windows",
    "encode_tiled",
    "encode_windows",
    "windows",
]

OVERLAP = 4  # neighboring windows overlap by 1 / OVERLAP of a window, the last two by more if needed

Array = npt.NDArray[Any]
Floats = npt.NDArray[np.float32]
Tile: TypeAlias = int | Sequence[int]
"""Largest height and width of a tile, in pixels: one number for both, or one each."""


class Window(NamedTuple):
    """A window's interval on one axis, in code steps; ends are exclusive.

    Attributes:
        begin: Begin of the window.
        end: End of the window.
        first: Begin of the steps whose codes are kept.
        last: End of the steps whose codes are kept.
    """

    begin: int
    end: int
    first: int
    last: int


def windows(steps: int | Callable[[int], int], size: int, causal: bool = False) -> Iterator[Window]:
    """Split an axis into overlapping windows of at most `size` steps.

    Their kept intervals [first, last) partition the axis.

    Args:
        steps: Number of steps of the axis; or a function that returns it, or any number not below its argument. So a
            signal can be read as its windows proceed.
        size: Maximum number of steps of a window.
        causal: Whether a code depends on nothing after it, so that only a window's begin is a border.

    Example:
        >>> [tuple(window) for window in windows(steps=10, size=8)]
        [(0, 8, 0, 5), (2, 10, 5, 10)]
    """
    reach = steps if callable(steps) else lambda _: steps
    begin = first = 0
    while (reached := reach(begin + _stride(size) + size)) > begin + size:
        follows = min(begin + _stride(size), reached - size)
        last = begin + size if causal else (follows + begin + size) // 2
        yield Window(begin, begin + size, first, last)
        begin, first = follows, last
    yield Window(begin, reached, first, reached)


def count_windows(steps: int, size: int) -> int:
    """Return the number of windows of at most `size` steps."""
    return 1 + max(0, -(-(steps - size) // _stride(size)))


def _stride(size: int) -> int:
    return max(1, size - max(1, size // OVERLAP))


class Passage:
    """A signal that is read from its chunks along axis 2, in order; memory holds the part from the last begin on.

    Args:
        chunks: Consecutive chunks `(1, c, n, ...)`.

    Attributes:
        end: Number of samples or frames read so far.
    """

    def __init__(self, chunks: Iterable[Floats]) -> None:
        self._chunks = iter(chunks)
        self._held: list[Floats] = []
        self._begin = self.end = 0

    @property
    def frame(self) -> tuple[int, ...]:
        """Height and width of the frames; empty for sound."""
        self.reach(1)
        return self._held[0].shape[3:]

    def begins(self, count: int) -> Iterator[int]:
        """Yield where each chunk of `count` samples begins."""
        begin = 0
        while self.reach(begin + 1) > begin:
            yield begin
            begin += count

    def reach(self, end: int) -> int:
        """Read up to `end` samples or more; return the number read so far, less than `end` if there are no more."""
        while self.end < end and (chunk := next(self._chunks, None)) is not None:
            self._held.append(chunk)
            self.end += chunk.shape[2]
        return self.end

    def take(self, begin: int, end: int) -> Floats:
        """Return the samples from `begin` to at most `end`; those before `begin` are dropped."""
        self.reach(end)
        while len(self._held) > 1 and self._begin + self._held[0].shape[2] <= begin:
            self._begin += self._held.pop(0).shape[2]
        parts, at = list[Floats](), self._begin
        for chunk in self._held:
            if at < end:
                parts.append(chunk[:, :, max(0, begin - at) : end - at])
            at += chunk.shape[2]
        return parts[0] if len(parts) == 1 else np.concatenate(parts, axis=2)


def encode_tiled(
    encode: Callable[[Array], Array],
    signal: Array,
    downsample: Sequence[int],
    tile: Tile,
) -> Array:
    """Encode signals `(b, c, ..., *grid)` tile by tile; return the codes of the whole signals.

    Args:
        encode: Encodes signals of a tile's size to codes `(b, codebooks, ..., *grid)`.
        signal: The signals.
        downsample: Downsampling factors of the last axes, those to tile.
        tile: Maximum size of a tile in pixels or samples, the same for all axes or one each.

    Raises:
        UserError: A tile is smaller than two steps.
    """
    steps = [-(-side // step) for side, step in zip(signal.shape[-len(downsample) :], downsample, strict=True)]
    whole: Array | None = None
    for tiles in product(*_split(steps, tile, downsample)):
        pixels = (slice(one.begin * step, one.end * step) for one, step in zip(tiles, downsample, strict=True))
        codes = encode(signal[_last_axes(pixels)])
        if whole is None:
            whole = np.zeros((*codes.shape[: -len(steps)], *steps), codes.dtype)
        kept = _last_axes(slice(one.first - one.begin, one.last - one.begin) for one in tiles)
        whole[_last_axes(slice(one.first, one.last) for one in tiles)] = codes[kept]
    assert whole is not None
    return whole


def decode_tiled(decode: Callable[[Array], Floats], codes: Array, downsample: Sequence[int], tile: Tile) -> Floats:
    """Decode codes `(b, codebooks, ..., *grid)` tile by tile into signals of whole steps.

    Args:
        decode: Decodes the codes of a tile.
        codes: Codes of the whole signals.
        downsample: Downsampling factors of the last axes, those to tile.
        tile: Maximum size of a tile in pixels or samples, the same for all axes or one each.

    Raises:
        UserError: A tile is smaller than two steps.
    """
    steps = codes.shape[-len(downsample) :]
    split = _split(steps, tile, downsample)
    whole: Floats | None = None
    for tiles in product(*split):
        part = decode(np.ascontiguousarray(codes[_last_axes(slice(one.begin, one.end) for one in tiles)]))
        if whole is None:
            sides = (side * step for side, step in zip(steps, downsample, strict=True))
            whole = np.zeros((*part.shape[: -len(steps)], *sides), np.float32)
        fades = [_fade(one, among, step) for one, among, step in zip(tiles, split, downsample, strict=True)]
        place = (slice(one.begin * step, one.end * step) for one, step in zip(tiles, downsample, strict=True))
        whole[_last_axes(place)] += part * reduce(np.multiply.outer, fades)
    assert whole is not None
    return whole


def encode_windows(
    encode: Callable[[Array], Array],
    signal: Passage,
    length: int,
    size: int,
    downsample: int,
    causal_pad: int = 0,
    group: int = 1,
) -> Array:
    """Encode a signal window by window along its first axis t.

    Args:
        encode: Encodes a window to codes `(1, codebooks, t, ...)`.
        signal: The signal.
        length: Its length for the progress bar, perhaps an estimate.
        size: Maximum number of steps of a window, if it isn't less than `group`.
        downsample: Downsampling factor of t.
        causal_pad: Number of samples that a window's first step lacks. That of a causal codec isn't 0.
        group: Steps that share a code. A window and its kept steps begin at multiples of it.

    Returns:
        Codes of the whole signal.
    """
    size, hop = max(1, size // group), downsample * group
    split = windows(
        lambda groups: -(-(signal.reach(groups * hop - causal_pad) + causal_pad) // hop), size, causal_pad > 0
    )
    kept = []
    for window in progress(split, count_windows((length + causal_pad) // hop, size), "windows"):
        codes = encode(signal.take(window.begin * hop, window.end * hop - causal_pad))
        kept.append(codes[:, :, (window.first - window.begin) * group : (window.last - window.begin) * group])
    return np.concatenate(kept, axis=2)


def decode_windows(
    decode: Callable[[Array], Floats], codes: Array, size: int, downsample: int, causal_pad: int = 0, group: int = 1
) -> Iterator[Floats]:
    """Decode codes `(b, codebooks, t, ...)` window by window along t; yield the signal in consecutive parts.

    Args:
        decode: Decodes the codes of a window.
        codes: Codes of the whole signal.
        size: Maximum number of steps of a window, if it isn't less than `group`.
        downsample: Downsampling factor of t.
        causal_pad: Number of samples that a window's first step lacks.
        group: Steps that share a code; windows begin at multiples of it.
    """
    hop = downsample * group
    split = list(windows(-(-codes.shape[2] // group), max(1, size // group)))
    rest: Floats | None = None  # the sum of earlier windows, from the next window's begin on
    for index, window in enumerate(progress(split, len(split), "windows")):
        part = decode(np.ascontiguousarray(codes[:, :, window.begin * group : window.end * group]))
        fade = _fade(window, split[max(0, index - 2) : index + 3], hop, causal_pad)[: part.shape[2]]
        part = part * fade.reshape(-1, *(1 for _ in part.shape[3:]))
        if rest is not None:
            part[:, :, : rest.shape[2]] += rest
        done = part.shape[2]
        if window is not split[-1]:
            done = (split[index + 1].begin - window.begin) * hop
        yield part[:, :, :done]
        rest = part[:, :, done:]


def _last_axes(slices: Iterable[slice]) -> Any:
    """Return the index of a part of an array, given the slices of its last axes."""
    return (..., *slices)


def _split(steps: Sequence[int], tile: Tile, downsample: Sequence[int]) -> list[list[Window]]:
    """Return the windows of each axis."""
    tiles = [tile] * len(steps) if isinstance(tile, int) else tile
    for side, step in zip(tiles, downsample, strict=True):
        if side < 2 * step:
            raise UserError(f"tile={side}: tiles must have at least two steps, {2 * step} pixels")
    return [list(windows(count, side // step)) for count, side, step in zip(steps, tiles, downsample, strict=True)]


def _fade(window: Window, among: Sequence[Window], step: int, causal_pad: int = 0) -> Floats:
    """Return a window's blending weight at each of its samples; the weights of all windows sum to 1."""
    positions = np.arange(window.begin * step, window.end * step - causal_pad, dtype=np.float64) + 0.5
    share = _tent(window, positions, step, causal_pad) / sum(_tent(one, positions, step, causal_pad) for one in among)
    return np.asarray(share, np.float32)


def _tent(window: Window, positions: npt.NDArray[np.float64], step: int, causal_pad: int) -> npt.NDArray[np.float64]:
    """Return a trapezoid: 0 outside the window, rising to 1 within 1 / OVERLAP of it from both ends."""
    begin, end = window.begin * step, window.end * step - causal_pad
    rise = max(1, (window.end - window.begin) // OVERLAP) * step
    return np.clip(np.minimum(positions - begin, end - positions) / rise, 0, 1)
