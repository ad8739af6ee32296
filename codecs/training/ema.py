"""The moving average of parameters."""

import copy

import torch
from torch import nn

from ..distributed import local_tensor
from .schedules import averaging_decay

__all__ = ["EMA"]


class EMA(nn.Module):
    """A codec, or a prior, that follows another by an exponential moving average.

    Parameters are averaged; buffers (codebook statistics, counters) are copied, since the average of a counter or of
    a replaced code means nothing. Being a module, it is saved and loaded with the run.

    Args:
        codec: What to follow.
        decay: Long-run decay of the average, in [0, 1).
    """

    def __init__(self, codec: nn.Module, decay: float) -> None:
        super().__init__()
        self.decay = decay
        self.codec = copy.deepcopy(codec).eval().requires_grad_(False)

    @torch.no_grad()
    def update(self, codec: nn.Module, update: int) -> None:
        """Move towards `codec` after its update number `update`."""
        weight = 1 - averaging_decay(update, self.decay)
        averaged, current = ([local_tensor(p.detach()) for p in each.parameters()] for each in (self.codec, codec))
        torch._foreach_lerp_(averaged, current, weight)
        for mine, theirs in zip(self.codec.buffers(), codec.buffers(), strict=True):
            mine.copy_(theirs)

    def train(self, mode: bool = True) -> "EMA":
        """Stay in evaluation mode."""
        return super().train(False)
