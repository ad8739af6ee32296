"""Tiled encoding and decoding of large frames, which bounds memory by the size of a tile (NumPy only).

Tiles overlap. At a position that two tiles cover, the code of the tile whose border is farther away is kept, so that
the tiles' codes form one grid. Decoded tiles are cross-faded where they overlap.
"""

from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from varitok import UserError

__all__ = ["Window", "decode_tiled", "encode_tiled", "windows"]

OVERLAP = 4  # neighboring tiles overlap by 1 / OVERLAP of a tile, the last two by more if needed

Array = npt.NDArray[Any]


class Window(NamedTuple):
    """A tile's interval on one axis, in code steps; ends are exclusive.

    Attributes:
        begin: Begin of the tile.
        end: End of the tile.
        first: Begin of the steps whose codes are kept.
        last: End of the steps whose codes are kept.
    """

    begin: int
    end: int
    first: int
    last: int


def windows(steps: int, tile: int) -> list[Window]:
    """Split an axis into overlapping windows of at most `tile` steps.

    Their kept intervals [first, last) partition [0, steps).

    Example:
        >>> [tuple(window) for window in windows(steps=10, tile=8)]
        [(0, 8, 0, 5), (2, 10, 5, 10)]
    """
    tile = min(tile, steps)
    stride = max(1, tile - max(1, tile // OVERLAP))
    begins = [*range(0, steps - tile, stride), steps - tile]
    cuts = [0, *((b + a + tile) // 2 for a, b in pairwise(begins)), steps]
    return [Window(b, b + tile, cuts[i], cuts[i + 1]) for i, b in enumerate(begins)]


def encode_tiled(
    encode: Callable[[Array], Array], frames: Array, axes: tuple[int, int], downsample: Sequence[int], tile: int
) -> Array:
    """Encode clips tile by tile.

    Args:
        encode: Encodes clips of a tile's size to codes `(b, codebooks, t, h, w)`.
        frames: Clips of any layout.
        axes: The axes of height and width.
        downsample: Downsampling factors of height and width.
        tile: Maximum height and width of a tile in pixels.

    Returns:
        Codes of the whole frames `(b, codebooks, t, h, w)`.

    Raises:
        UserError: A tile is smaller than two steps.
    """
    sides = [frames.shape[axis] for axis in axes]
    rows, columns = (
        windows(-(-side // step), _steps(tile, step)) for side, step in zip(sides, downsample, strict=True)
    )
    lines = []
    for row in rows:
        line = []
        for column in columns:
            index: list[slice] = [slice(None)] * frames.ndim
            for axis, window, step in zip(axes, (row, column), downsample, strict=True):
                index[axis] = slice(window.begin * step, window.end * step)
            codes = encode(frames[tuple(index)])
            line.append(
                codes[
                    ...,
                    row.first - row.begin : row.last - row.begin,
                    column.first - column.begin : column.last - column.begin,
                ]
            )
        lines.append(np.concatenate(line, axis=-1))
    return np.concatenate(lines, axis=-2)


def decode_tiled(
    decode: Callable[[Array], npt.NDArray[np.float32]], codes: Array, downsample: Sequence[int], tile: int
) -> npt.NDArray[np.float32]:
    """Decode codes `(b, codebooks, t, h, w)` tile by tile into clips `(b, c, t, h, w)` of whole steps.

    Args:
        decode: Decodes the codes of a tile.
        codes: Codes of the whole frames.
        downsample: Downsampling factors of height and width.
        tile: Maximum height and width of a tile in pixels.

    Raises:
        UserError: A tile is smaller than two steps.
    """
    rows, columns = (windows(side, _steps(tile, step)) for side, step in zip(codes.shape[-2:], downsample, strict=True))
    whole: npt.NDArray[np.float32] | None = None
    for row in rows:
        for column in columns:
            part = decode(np.ascontiguousarray(codes[..., row.begin : row.end, column.begin : column.end]))
            if whole is None:
                sides = [side * step for side, step in zip(codes.shape[-2:], downsample, strict=True)]
                whole = np.zeros((*part.shape[:-2], *sides), np.float32)
            weight = _fade(row, rows, downsample[0])[:, None] * _fade(column, columns, downsample[1])
            whole[
                ...,
                row.begin * downsample[0] : row.end * downsample[0],
                column.begin * downsample[1] : column.end * downsample[1],
            ] += part * weight
    assert whole is not None
    return whole


def _steps(tile: int, step: int) -> int:
    if tile < 2 * step:
        raise UserError(f"tile={tile}: tiles must have at least two steps, {2 * step} pixels")
    return tile // step


def _fade(window: Window, among: Sequence[Window], step: int) -> npt.NDArray[np.float32]:
    """Return a window's blending weight at each of its pixels; the weights of all windows sum to 1."""
    positions = np.arange(window.begin * step, window.end * step, dtype=np.float32) + np.float32(0.5)
    share: npt.NDArray[np.float32] = _tent(window, positions, step) / sum(
        _tent(other, positions, step) for other in among
    )
    return share


def _tent(window: Window, positions: npt.NDArray[np.float32], step: int) -> npt.NDArray[np.float32]:
    """Return a trapezoid: 0 outside the window, rising to 1 within 1 / OVERLAP of it from both ends."""
    rise = np.float32(max(1, (window.end - window.begin) // OVERLAP) * step)
    inside = np.minimum(positions - window.begin * step, window.end * step - positions)
    return np.clip(inside / rise, 0, 1)
