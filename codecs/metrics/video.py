"""Video metrics: image metrics averaged over frames, flicker, and the error at chunk seams.

Clips are uint8 `(b, 3, t, h, w)`, as a codec would write them to a file.
"""

from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from ..masking import prefix_mask
from . import image
from .metric import Builder, Comparison, Metric, stateless

__all__ = ["METRICS", "flicker", "seam_error"]

FRAMES = 64  # compared at once


def flicker(fake: Tensor, real: Tensor, lengths: Tensor) -> Tensor:
    """Compute flicker, `mean |(y[t + 1] - y[t]) - (x[t + 1] - x[t])|`, in 8-bit levels; NaN for clips of one frame."""
    error = (fake.float() - real.float()).diff(dim=2).abs().mean((1, 3, 4))  # (b, t - 1)
    pairs = (lengths - 1).clamp(min=0)
    return torch.where(prefix_mask(pairs, error.shape[1]), error, 0.0).sum(1) / pairs  # 0 / 0 is NaN


def seam_error(fake: Tensor, real: Tensor, chunk: int) -> Tensor:
    """Compute the flicker at chunk boundaries minus that within chunks, `(b,)`, in 8-bit levels; 0 without seams.

    A codec with lookahead codes the chunks of a long clip independently, which may leave seams; a causal streaming
    codec has none.

    Args:
        fake: uint8 `(b, 3, t, h, w)`, decoded chunk by chunk and concatenated.
        real: Originals of the same shape.
        chunk: Frames per chunk, at least 2 and fewer than t.
    """
    error = (fake.float() - real.float()).diff(dim=2).abs().mean((1, 3, 4))
    seams = torch.arange(1, error.shape[1] + 1, device=error.device) % chunk == 0
    return error[:, seams].mean(1) - error[:, ~seams].mean(1)


def _each_frame(build: Builder, device: torch.device, sample_rate: int) -> Comparison:
    """Build an image comparison, and return its mean over each clip's valid frames."""
    compare = build(device, sample_rate)

    def each_frame(fake: Tensor, real: Tensor, lengths: Tensor) -> Tensor:
        valid = prefix_mask(lengths, fake.shape[2])
        # (b, 3, t, h, w) -> (valid frames, 3, h, w)
        blocks = zip(*(torch.split(side.transpose(1, 2)[valid], FRAMES) for side in (fake, real)), strict=True)
        values = torch.zeros(valid.shape, dtype=torch.float64, device=fake.device)
        values[valid] = torch.cat([compare(one, other, lengths).double() for one, other in blocks])
        return values.sum(1) / lengths

    return each_frame


def _of_frames(metric: Metric) -> Metric:
    """Turn an image metric into a video metric, its mean over frames."""
    assert metric.build is not None
    definition = f"of each frame, mean over a clip; {metric.definition}"
    return replace(metric, definition=definition, build=partial(_each_frame, metric.build))


FLICKER = Metric(
    "flicker",
    "flicker",
    "{:.2f}",
    definition="mean over clips of more than one frame; mean absolute difference of the changes from frame to frame,"
    " RGB, in 8-bit levels; 0 if those changes are right, whatever the pixels; lower is better",
    higher_is_better=False,
    build=stateless(flicker),
)
METRICS = (*map(_of_frames, image.METRICS), FLICKER)
