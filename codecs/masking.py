"""Masks over the valid steps of padded batches."""

import torch
from torch import Tensor

__all__ = ["masked_mean", "prefix_mask"]


def prefix_mask(lengths: Tensor, total: int) -> Tensor:
    """Return a bool mask `(b, total)`, True before each of the lengths `(b,)`."""
    return torch.arange(total, device=lengths.device) < lengths[:, None]


def masked_mean(values: Tensor, mask: Tensor) -> Tensor:
    """Return `mean_b(sum_n(mask * values) / sum_n(mask))`: averages of each sample, averaged over the batch.

    Every sample has equal weight whatever its length. The mean over ranks of equal batch size is therefore the mean
    over the global batch.

    Args:
        values: `(b, n)`; masked values may be anything, NaN too.
        mask: bool `(b, n)`; a sample without a valid step contributes 0.
    """
    per_sample = torch.where(mask, values, 0.0).sum(1) / mask.sum(1).clamp(min=1)
    return per_sample.mean()
