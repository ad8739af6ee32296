"""How far an image coded in tiles is from the whole, measured with a bundle's graphs."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
from torch import Tensor
from torch.nn import functional

from ..runtime.bundle import Array
from ..runtime.images import ImageBundle
from ..runtime.tiling import OVERLAP, windows
from .parity import SIGNAL_ERROR

__all__ = ["TiledParity", "measure_tiles"]


class TiledParity(NamedTuple):
    """The agreement of tiles with the whole image at the tiles' centers, half as high and as wide as a tile.

    A convolution sees no border from there if the tile is large enough; norms over positions, such as group norms, and
    attention depend on the whole tile.

    Attributes:
        side: Height and width of a tile, in pixels.
        codes_equal: Share of equal codes; continuous latents are equal within 1e-5 of their peak.
        signal_error: Largest difference of the signals that are decoded from the whole's codes.
    """

    side: int
    codes_equal: float
    signal_error: float


def measure_tiles(bundle: ImageBundle, image: Tensor, side: int) -> TiledParity:
    """Compare an image of two tiles in each direction with the whole.

    Args:
        bundle: A bundle of images on a grid.
        image: An image `(1, c, h, w)`, which is enlarged or shrunk.
        side: Height and width of a tile, in pixels; whole steps are taken, at least `OVERLAP` of them.
    """
    hop = max(bundle.hops)
    tile = max(side // hop, OVERLAP) * hop
    steps = [tile // step for step in bundle.hops]
    grid = [2 * count - count // OVERLAP for count in steps]
    sides = [count * step for count, step in zip(grid, bundle.hops, strict=True)]
    values = functional.interpolate(image, sides, mode="bicubic").clamp(-1, 1).numpy()
    whole, tiled = (bundle.encode_values(values, tile=most) for most in (max(sides), tile))
    near = np.abs(tiled - whole) <= (0 if bundle.codebook_sizes else SIGNAL_ERROR * max(1, np.abs(whole).max()))
    off = np.abs(np.subtract(*(bundle.decode(whole, tile=most) for most in (max(sides), tile))))
    centers = _centers(grid, steps)
    pixels = np.kron(centers, np.ones(bundle.hops, bool))
    return TiledParity(tile, float(near[..., centers].mean()), float(off[..., pixels].max()))


def _centers(grid: Sequence[int], steps: Sequence[int]) -> npt.NDArray[np.bool_]:
    """Return which positions of a grid are in the middle half of a tile, in both directions."""
    marked: list[Array] = []
    for count, size in zip(grid, steps, strict=True):
        marks = np.zeros(count, bool)
        for window in windows(count, size):
            marks[window.begin + size // 4 : window.end - size // 4] = True
        marked.append(marks)
    rows, columns = marked
    return np.logical_and.outer(rows, columns)
