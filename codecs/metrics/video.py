"""How far a clip is from its original: metrics of images, frame by frame, and what changes from frame to frame.

Clips are `(b, 3, t, h, w)`, uint8: a codec is judged by the pixels that it would write to a file.
"""

from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from ..masking import prefix_mask
from . import image
from .metric import Builder, Comparison, Metric, stateless

__all__ = ["METRICS", "flicker", "seam_error"]

FRAMES = 64  # that are compared at once


def flicker(fake: Tensor, real: Tensor, lengths: Tensor) -> Tensor:
    """Compute the error of the changes from frame to frame, in 8-bit levels; NaN for clips of one frame."""
    error = (fake.float() - real.float()).diff(dim=2).abs().mean((1, 3, 4))
    pairs = (lengths - 1).clamp(min=0)
    return torch.where(prefix_mask(pairs, error.shape[1]), error, 0.0).sum(1) / pairs  # 0 / 0 is NaN


def seam_error(fake: Tensor, real: Tensor, chunk: int) -> Tensor:
    """Compute how much more a clip flickers where chunks meet than within them, in 8-bit levels; 0 if none is seen.

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


def _each_frame(build: Builder, device: torch.device, sample_rate: int) -> Comparison:
    """Build the comparison of images, and return its mean over each clip's own frames."""
    compare = build(device, sample_rate)

    def each_frame(fake: Tensor, real: Tensor, lengths: Tensor) -> Tensor:
        valid = prefix_mask(lengths, fake.shape[2])
        blocks = zip(*(torch.split(side.transpose(1, 2)[valid], FRAMES) for side in (fake, real)), strict=True)
        values = torch.zeros(valid.shape, dtype=torch.float64, device=fake.device)
        values[valid] = torch.cat([compare(one, other, lengths).double() for one, other in blocks])
        return values.sum(1) / lengths

    return each_frame


def _of_frames(metric: Metric) -> Metric:
    """Turn a metric of images into one of clips."""
    assert metric.build is not None
    definition = f"of each frame, mean over a clip; {metric.definition}"
    return replace(metric, definition=definition, build=partial(_each_frame, metric.build))


FLICKER = Metric(
    "flicker",
    "flicker",
    "{:.2f}",
    definition="mean over clips of more than one frame; mean absolute difference of the changes from frame to frame,"
    " RGB, in 8-bit levels; 0 if motion is right though pixels are not; lower is better",
    higher_is_better=False,
    build=stateless(flicker),
)
METRICS = (*map(_of_frames, image.METRICS), FLICKER)
