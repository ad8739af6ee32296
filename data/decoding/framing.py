"""The position of a centered crop in an image or frame, and the size to which a frame is resized for it."""

from collections.abc import Sequence

__all__ = ["center_box", "covering"]


def center_box(shape: Sequence[int], size: Sequence[int]) -> list[tuple[int, int]]:
    """Return (start, length) along each axis of a box of `size`, centered in `shape`.

    Along an axis where `shape` is shorter than the box, the box is the whole axis.
    """
    lengths = [min(a, b) for a, b in zip(shape, size, strict=True)]
    return [((whole - length) // 2, length) for whole, length in zip(shape, lengths, strict=True)]


def covering(frame: tuple[int, int], crop: Sequence[int], scale: float = 1.0) -> tuple[int, int]:
    """Return the height and width to which a frame is resized, so that a crop has `scale` of the largest's sides.

    Args:
        frame: Height and width of the frame.
        crop: Height and width of the crop.
        scale: In (0, 1]; 1: the resized frame just covers the crop.
    """
    fit = max(crop[0] / frame[0], crop[1] / frame[1]) / scale
    return max(crop[0], round(frame[0] * fit)), max(crop[1], round(frame[1] * fit))
