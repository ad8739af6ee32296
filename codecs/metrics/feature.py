"""How far feature clips are from their originals: one value for each clip, over its own frames.

Feature clips are `(b, c, t, rows, columns)`, floats of any size; where they are standardised, an error of 1 is that of
a codec that knows nothing but the mean.
"""

from collections.abc import Callable
from typing import TypeAlias

import torch
from torch import Tensor
from torch.nn import functional

from varitok import UserError

from ..masking import prefix_mask

__all__ = ["DEFINITIONS", "Comparison", "comparison", "cosine", "mse"]

Comparison: TypeAlias = Callable[[Tensor, Tensor, Tensor], Tensor]
"""(decoded, original, lengths) to one value for each clip."""

DEFINITIONS = {
    "mse": "mean squared error of features, over all channels and positions of a clip's own frames, mean over clips;"
    " the share of the variance that is lost where features are standardised; lower is better",
    "cosine": "cosine similarity of a position's decoded features with its own, mean over positions, then clips",
}
"""What each name means, in the words that go above a table."""


def mse(fake: Tensor, real: Tensor, lengths: Tensor) -> Tensor:
    """Compute the mean squared error of each clip, `(b,)`."""
    return _mean((fake.double() - real.double()).square().mean((1, 3, 4)), lengths)


def cosine(fake: Tensor, real: Tensor, lengths: Tensor) -> Tensor:
    """Compute the mean over positions of the cosine similarity of their features, `(b,)` in [-1, 1]."""
    return _mean(functional.cosine_similarity(fake.double(), real.double(), dim=1).mean((2, 3)), lengths)


def _mean(frames: Tensor, lengths: Tensor) -> Tensor:
    """Average values of frames `(b, t)` over a clip's own."""
    return torch.where(prefix_mask(lengths, frames.shape[1]), frames, 0.0).sum(1) / lengths


def comparison(name: str) -> Comparison:
    """Give the comparison of that name, a key of `DEFINITIONS`.

    Raises:
        UserError: The name is unknown.
    """
    known: dict[str, Comparison] = {"mse": mse, "cosine": cosine}
    if name not in known:
        raise UserError(f"metric {name!r} is unknown; of features there are {', '.join(known)}")
    return known[name]
