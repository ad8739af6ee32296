"""How far a clip is from its original: metrics of images, frame by frame, and what changes from frame to frame.

Clips are `(b, 3, t, h, w)`, uint8: a codec is judged by the pixels that it would write to a file.
"""

from collections.abc import Callable
from typing import TypeAlias

import torch
from torch import Tensor

from ..masking import prefix_mask
from . import image

__all__ = ["BASIC", "DEFINITIONS", "Comparison", "available", "comparison", "flicker", "seam_error"]

Comparison: TypeAlias = Callable[[Tensor, Tensor, Tensor], Tensor]
"""(decoded, original, lengths) to one value for each clip, NaN where it has none."""

BASIC = (*image.BASIC, "flicker")
FRAMES = 64  # that are compared at once

DEFINITIONS = {name: f"of each frame, mean over a clip; {text}" for name, text in image.DEFINITIONS.items()}
DEFINITIONS["flicker"] = (
    "mean over clips of more than one frame; mean absolute difference of the changes from frame to frame, RGB, in 8-bit"
    " levels; 0 where motion is right though pixels are not; lower is better"
)
"""What each name means, in the words that go above a table; `{scales}` depends on the frames' size."""


def flicker(fake: Tensor, real: Tensor, lengths: Tensor) -> Tensor:
    """Compute the error of the changes from frame to frame, in 8-bit levels; NaN for clips of one frame."""
    error = (fake.float() - real.float()).diff(dim=2).abs().mean((1, 3, 4))
    pairs = (lengths - 1).clamp(min=0)
    return torch.where(prefix_mask(pairs, error.shape[1]), error, 0.0).sum(1) / pairs  # 0 / 0 is NaN


def seam_error(fake: Tensor, real: Tensor, chunk: int) -> Tensor:
    """Compute how much more a clip flickers where chunks meet than within them, in 8-bit levels; 0 where none is seen.

    A codec that looks ahead has to code long clips as chunks of their own; one that goes chunk by chunk has no seams.

    Args:
        fake: uint8 `(b, 3, t, h, w)`, coded as chunks and put together.
        real: The originals.
        chunk: Frames of a chunk, at least 2 and fewer than t.

    Returns:
        `(b,)`.
    """
    error = (fake.float() - real.float()).diff(dim=2).abs().mean((1, 3, 4))
    seams = torch.arange(1, error.shape[1] + 1, device=error.device) % chunk == 0
    return error[:, seams].mean(1) - error[:, ~seams].mean(1)


def available() -> tuple[str, ...]:
    """List the names that can be computed on this machine."""
    return (*image.available(), "flicker")


def comparison(name: str, device: torch.device) -> Comparison:
    """Make the comparison of that name, a key of `DEFINITIONS`.

    Raises:
        UserError: The name is unknown, or its weights aren't on this machine.
    """
    if name == "flicker":
        return flicker
    compare = image.comparison(name, device)

    def each_frame(fake: Tensor, real: Tensor, lengths: Tensor) -> Tensor:
        valid = prefix_mask(lengths, fake.shape[2])
        blocks = zip(*(torch.split(side.transpose(1, 2)[valid], FRAMES) for side in (fake, real)), strict=True)
        values = torch.zeros(valid.shape, dtype=torch.float64, device=fake.device)
        values[valid] = torch.cat([compare(one, other).double() for one, other in blocks])
        return values.sum(1) / lengths

    return each_frame
