"""Random and centered crop boxes in any number of dimensions."""

from collections.abc import Sequence

import torch

__all__ = ["center_box", "random_box"]


def center_box(shape: Sequence[int], size: Sequence[int]) -> list[tuple[int, int]]:
    """Return (start, length) along each axis of a box of `size`, centered in `shape`.

    Along an axis where `shape` is shorter than the box, the box is the whole axis.
    """
    lengths = [min(a, b) for a, b in zip(shape, size, strict=True)]
    return [((whole - length) // 2, length) for whole, length in zip(shape, lengths, strict=True)]


def random_box(shape: Sequence[int], size: Sequence[int], generator: torch.Generator) -> list[tuple[int, int]]:
    """Return a box like `center_box`, but at a uniformly random position."""
    lengths = [min(a, b) for a, b in zip(shape, size, strict=True)]
    return [
        (int(torch.randint(whole - length + 1, (), generator=generator)), length)
        for whole, length in zip(shape, lengths, strict=True)
    ]
