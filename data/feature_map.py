"""Feature maps with their position in the signal, and resampling between their grids."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

__all__ = ["FeatureMap", "resample", "stack_features"]


class FeatureMap(NamedTuple):
    """A batch of feature maps, with their position in the signals.

    Attributes:
        values: Features `(b, c, *grid)`.
        steps: Stride of each grid axis, in samples, frames or pixels of the signal.
        lengths: int64 `(b,)`, valid steps of the first grid axis; None for all.
        offset: Samples by which the first step of the first axis starts before the signal; `(b,)` if signals differ.
        pooled: One vector per signal, `(b, c)`; None if the network has no pooled output.
    """

    values: Tensor
    steps: tuple[float, ...]
    lengths: Tensor | None = None
    offset: int | Tensor = 0
    pooled: Tensor | None = None

    def valid(self) -> Tensor:
        """Return the mask of the valid steps of the first grid axis, bool `(b, n)`."""
        values, count = self.values, self.values.shape[2]
        if self.lengths is None:
            return torch.ones(len(values), count, dtype=torch.bool, device=values.device)
        return torch.arange(count, device=values.device) < self.lengths[:, None]

    def mean(self) -> Tensor:
        """Return the mean of each signal's valid features, `(b, c)`."""
        over_others = self.values.flatten(3).mean(3) if self.values.ndim > 3 else self.values  # (b, c, n)
        mask = self.valid()[:, None]
        return torch.where(mask, over_others, 0.0).sum(2) / mask.sum(2).clamp(min=1)


def resample(features: FeatureMap, like: FeatureMap) -> Tensor:
    """Resample features onto the grid of `like`: `(b, c, *grid)`.

    An output step is the mean of the valid features that overlap it, weighted by overlap; steps after the last valid
    feature repeat it. Steps are matched by their position in the signal, so padding doesn't change the result.

    Raises:
        ValueError: The grids have different numbers of axes.
    """
    if len(features.steps) != len(like.steps):
        raise ValueError(f"the grids have {len(features.steps)} and {len(like.steps)} axes")
    values = features.values
    for axis, (step, wanted) in enumerate(zip(features.steps, like.steps, strict=True)):
        count, valid = values.shape[2 + axis], None if axis else features.valid()
        if axis and (count, step) == (like.values.shape[2 + axis], wanted):
            continue
        offsets = (0, 0) if axis else (like.offset, features.offset)
        begin = [
            torch.arange(number, device=values.device, dtype=torch.float64) * size
            - torch.as_tensor(offset, device=values.device)[..., None]
            for number, size, offset in zip((like.values.shape[2 + axis], count), (wanted, step), offsets, strict=True)
        ]
        mine, theirs = begin[0][..., :, None], begin[1][..., None, :]
        shares = (torch.minimum(mine + wanted, theirs + step) - torch.maximum(mine, theirs)).clamp(min=0)
        if valid is None:
            valid = shares.new_ones(1, count, dtype=torch.bool)
        shares = torch.where(valid[:, None], shares, 0.0)  # (b or 1, n, count)
        last = functional.one_hot((valid.sum(1) - 1).clamp(min=0), count)[:, None]
        whole = shares.sum(2, keepdim=True)
        shares = torch.where(whole > 0, shares / whole.clamp(min=1e-12), last).to(values.dtype)
        # Invalid features may be NaN. Below, r is c and the other grid axes, merged.
        moved = torch.where(valid[..., None], values.movedim(2 + axis, 1).flatten(2), 0.0)  # (b, count, r)
        rest = values.movedim(2 + axis, 1).shape[2:]
        values = (shares @ moved).reshape(len(values), -1, *rest).movedim(1, 2 + axis)  # (b, n, r) -> (b, c, *grid)
    return values


def stack_features(found: Sequence[FeatureMap]) -> FeatureMap:
    """Stack feature maps of batch size 1 into a batch; pad the first grid axis with zeros."""
    lengths = torch.tensor([one.values.shape[2] for one in found])
    others = (0, 0) * (found[0].values.ndim - 3)
    values = [functional.pad(one.values, (*others, 0, int(lengths.max()) - one.values.shape[2])) for one in found]
    offsets = torch.tensor([float(one.offset) for one in found])
    pooled = [one.pooled for one in found if one.pooled is not None]
    return FeatureMap(torch.cat(values), found[0].steps, lengths, offsets, torch.cat(pooled) if pooled else None)
