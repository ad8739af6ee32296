"""Masks over the valid steps of padded batches."""

import torch
from torch import Tensor

__all__ = ["masked_mean", "prefix_mask"]


def prefix_mask(lengths: Tensor, total: int) -> Tensor:
    """Mark the valid steps: `(b,)` lengths to bool `(b, total)`, True before each length."""
    return torch.arange(total, device=lengths.device) < lengths[:, None]


def masked_mean(values: Tensor, mask: Tensor) -> Tensor:
    """Average over valid steps, sample by sample, then over the batch.

    Every sample counts the same whatever its length, so that the mean over processes with equal batches is the mean
    over the global batch.

    Args:
        values: `(b, n)`.
        mask: bool `(b, n)`; a sample without a valid step counts as 0. What is masked may be anything.
    """
    per_sample = torch.where(mask, values, 0.0).sum(1) / mask.sum(1).clamp(min=1)
    return per_sample.mean()
