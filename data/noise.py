"""Gaussian noise as a function of a seed and a position, so that a decoder that samples is a function too.

It is defined by integers of 64 bits and by operations on float64, which NumPy and a browser have alike. torch reads the
array.
"""

import math
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from .permutation import uniform

__all__ = ["gaussian"]


def gaussian(shape: Sequence[int], seed: int) -> npt.NDArray[np.float32]:
    """Return standard normal noise for a signal of a shape `(c, *grid)`.

    Each channel has a sequence of its own, whose numbers fill the grid row by row. So noise of a longer signal begins
    with that of a shorter one. From the uniform numbers u and v of `permutation.uniform`, number i of channel c is
    (Box and Muller, 1958):

        sqrt(-2 ln(1 - u[2i])) cos(2 pi u[2i + 1]),   u = uniform(., seed, c)

    Args:
        shape: Channels, and steps of each axis of the grid.
        seed: Chooses the noise; at least 0.

    Example:
        >>> np.round(gaussian((1, 3), seed=0).astype(float), 4).tolist()
        [[0.2018, -1.3904, -0.9339]]
    """
    channels, *grid = shape
    even = 2 * np.arange(math.prod(grid))
    found = [
        np.sqrt(-2 * np.log(1 - uniform(even, seed, channel))) * np.cos(2 * math.pi * uniform(even + 1, seed, channel))
        for channel in range(channels)
    ]
    return np.stack(found).astype(np.float32).reshape(shape)
