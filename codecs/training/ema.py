"""Exponential moving average (EMA) of parameters."""

import copy

import torch
from torch import nn

from ..distributed import local_tensor
from .schedules import averaging_decay

__all__ = ["EMA"]


class EMA(nn.Module):
    """A copy of a codec or prior whose parameters are an exponential moving average of the original's.

    Buffers (codebook statistics, counters) are copied: the average of a counter or of a replaced entry means nothing.
    As a submodule it is part of the checkpoint's state dict.

        averaged <- decay averaged + (1 - decay) current

    Args:
        codec: Module to average.
        decay: Long-run decay of the average, in [0, 1).
    """

    def __init__(self, codec: nn.Module, decay: float) -> None:
        super().__init__()
        self.decay = decay
        self.codec = copy.deepcopy(codec).eval().requires_grad_(False)

    @torch.no_grad()
    def update(self, codec: nn.Module, update: int) -> None:
        """Average in the parameters of `codec` after update number `update`."""
        weight = 1 - averaging_decay(update, self.decay)
        averaged, current = ([local_tensor(p.detach()) for p in each.parameters()] for each in (self.codec, codec))
        torch._foreach_lerp_(averaged, current, weight)
        for mine, theirs in zip(self.codec.buffers(), codec.buffers(), strict=True):
            mine.copy_(theirs)

    def train(self, mode: bool = True) -> "EMA":
        """Stay in evaluation mode."""
        return super().train(False)
