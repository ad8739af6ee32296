"""Exponential moving average (EMA) of parameters."""

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

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
        # This rank's shards of the averaged and of the current parameters: listing them takes longer than averaging.
        self._shards: list[list[Tensor]] = []

    @torch.no_grad()
    def update(self, codec: nn.Module, update: int) -> None:
        """Average in the parameters of `codec` after update number `update`."""
        if not self._shards:
            self._shards = [[local_tensor(p.detach()) for p in each.parameters()] for each in (self.codec, codec)]
        averaged, current = self._shards
        torch._foreach_lerp_(averaged, current, 1 - averaging_decay(update, self.decay))
        if buffers := list(codec.buffers()):
            torch._foreach_copy_(list(self.codec.buffers()), buffers)

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> "EMA":
        self._shards = []  # the parameters move
        return super()._apply(fn, recurse)  # type: ignore[no-untyped-call, no-any-return]

    def train(self, mode: bool = True) -> "EMA":
        """Stay in evaluation mode."""
        return super().train(False)
