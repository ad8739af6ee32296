"""Metrics of feature clips: one value per clip, over its valid frames.

Feature clips are `(b, c, t, h, w)`, floats of any range. If they are standardized, predicting the mean has an MSE of 1.
"""

import torch
from torch import Tensor
from torch.nn import functional

from ..masking import prefix_mask
from .metric import Metric, stateless

__all__ = ["METRICS", "cosine", "mse"]


def mse(fake: Tensor, real: Tensor, lengths: Tensor) -> Tensor:
    """Compute each clip's mean squared error, `(b,)`: `mean (y - x)^2`."""
    return _mean((fake.double() - real.double()).square().mean((1, 3, 4)), lengths)


def cosine(fake: Tensor, real: Tensor, lengths: Tensor) -> Tensor:
    """Compute each clip's cosine similarity over channels, averaged over positions: `(b,)` in [-1, 1]."""
    return _mean(functional.cosine_similarity(fake.double(), real.double(), dim=1).mean((2, 3)), lengths)


def _mean(frames: Tensor, lengths: Tensor) -> Tensor:
    """Average values `(b, t)` over each clip's valid frames."""
    return torch.where(prefix_mask(lengths, frames.shape[1]), frames, 0.0).sum(1) / lengths


METRICS = (
    Metric(
        "mse",
        "MSE",
        "{:.4f}",
        label="mean squared error",
        definition="mean squared error of features, over channels and positions of a clip's valid frames, mean over"
        " clips; the share of the variance lost if features are standardized; lower is better",
        higher_is_better=False,
        build=stateless(mse),
    ),
    Metric(
        "cosine",
        "cosine",
        "{:.4f}",
        label="cosine similarity",
        definition="cosine similarity of decoded and original features at a position, mean over positions, then clips",
        build=stateless(cosine),
    ),
)
