"""How far feature clips are from their originals: one value for each clip, over its own frames.

Feature clips are `(b, c, t, rows, columns)`, floats of any range; if they are standardized, an error of 1 is that of
predicting the mean.
"""

import torch
from torch import Tensor
from torch.nn import functional

from ..masking import prefix_mask
from .metric import Metric, stateless

__all__ = ["METRICS", "cosine", "mse"]


def mse(fake: Tensor, real: Tensor, lengths: Tensor) -> Tensor:
    """Compute the mean squared error of each clip, `(b,)`."""
    return _mean((fake.double() - real.double()).square().mean((1, 3, 4)), lengths)


def cosine(fake: Tensor, real: Tensor, lengths: Tensor) -> Tensor:
    """Compute the mean over positions of the cosine similarity of their features, `(b,)` in [-1, 1]."""
    return _mean(functional.cosine_similarity(fake.double(), real.double(), dim=1).mean((2, 3)), lengths)


def _mean(frames: Tensor, lengths: Tensor) -> Tensor:
    """Average values of frames `(b, t)` over a clip's own."""
    return torch.where(prefix_mask(lengths, frames.shape[1]), frames, 0.0).sum(1) / lengths


METRICS = (
    Metric(
        "mse",
        "MSE",
        "{:.4f}",
        label="mean squared error",
        definition="mean squared error of features, over all channels and positions of a clip's own frames, mean over"
        " clips; the share of the variance that is lost where features are standardized; lower is better",
        higher_is_better=False,
        build=stateless(mse),
    ),
    Metric(
        "cosine",
        "cosine",
        "{:.4f}",
        label="cosine similarity",
        definition="cosine similarity of a position's decoded features with its own, mean over positions, then clips",
        build=stateless(cosine),
    ),
)
