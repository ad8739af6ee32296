"""L1 and L2 losses on pixels or waveform values."""

from torch import Tensor

from ..masking import masked_mean, prefix_mask
from .contract import SignalTerm

__all__ = ["L1", "L2"]


def _mean(values: Tensor, lengths: Tensor) -> Tensor:
    """Average `(b, c, *grid)` over the first `lengths` steps of the grid's first axis, then over the batch."""
    steps = values.flatten(3).mean(3).mean(1) if values.ndim > 3 else values.mean(1)  # (b, c, n, ...) -> (b, n)
    return masked_mean(steps, prefix_mask(lengths, steps.shape[1]))


class L1(SignalTerm):
    """Mean absolute error: `loss = mean |y - x|`."""

    def forward(self, fake: Tensor, real: Tensor, lengths: Tensor) -> Tensor:
        """Compare signals `(b, c, *grid)` in [-1, 1] over their first `lengths` steps."""
        return _mean((fake - real).abs(), lengths)


class L2(SignalTerm):
    """Mean squared error: `loss = mean (y - x)^2`."""

    def forward(self, fake: Tensor, real: Tensor, lengths: Tensor) -> Tensor:
        """Compare signals `(b, c, *grid)` in [-1, 1] over their first `lengths` steps."""
        return _mean((fake - real).square(), lengths)
