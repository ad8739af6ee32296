"""Random crop boxes in any number of dimensions, and the shape of a signal's crop."""

import math
from collections.abc import Sequence

import torch

__all__ = ["closest_shape", "random_box"]


def random_box(shape: Sequence[int], size: Sequence[int], generator: torch.Generator) -> list[tuple[int, int]]:
    """Return a box like `decoding.framing.center_box`, but at a uniformly random position."""
    lengths = [min(a, b) for a, b in zip(shape, size, strict=True)]
    return [
        (int(torch.randint(whole - length + 1, (), generator=generator)), length)
        for whole, length in zip(shape, lengths, strict=True)
    ]


def closest_shape(shapes: Sequence[Sequence[int]], size: Sequence[int]) -> int:
    """Return the index of the shape closest to an image or clip in aspect ratio, of equals the largest.

    Among equals, the longest that a clip fills comes first.

    Args:
        shapes: Height and width of each shape, of clips after the frames.
        size: Size of the image or clip.
    """
    *length, rows, columns = size

    def unlike(number: int) -> tuple[float, bool, list[int], int]:
        *frames, height, width = shapes[number]
        form = abs(math.log(height / width * columns / rows))
        short = frames > length
        return round(form, 2), short, [count if short else -count for count in frames], -height * width

    return min(range(len(shapes)), key=unlike)
