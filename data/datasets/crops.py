"""Random crop boxes in any number of dimensions."""

from collections.abc import Sequence

import torch

__all__ = ["random_box"]


def random_box(shape: Sequence[int], size: Sequence[int], generator: torch.Generator) -> list[tuple[int, int]]:
    """Return a box like `decoding.framing.center_box`, but at a uniformly random position."""
    lengths = [min(a, b) for a, b in zip(shape, size, strict=True)]
    return [
        (int(torch.randint(whole - length + 1, (), generator=generator)), length)
        for whole, length in zip(shape, lengths, strict=True)
    ]
