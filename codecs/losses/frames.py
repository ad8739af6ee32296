"""Losses of clips: image losses applied to frames, and the temporal difference."""

from typing import Annotated

import torch
from torch import Tensor

from ..masking import masked_mean, prefix_mask
from .contract import Guidance, SignalTerm

__all__ = ["PerFrame", "TemporalDifference"]


class PerFrame(SignalTerm):
    """Image loss averaged over the valid frames of clips.

    Args:
        module: Loss of images `(n, c, h, w)`.
        frames: Number of the batch's valid frames to sample at each call; None for all.
    """

    def __init__(self, module: SignalTerm, frames: Annotated[int | None, "[1, inf)", "null takes all"] = None) -> None:
        super().__init__()
        self.module = module
        self.frames = frames

    def compare(self, fake: Tensor, guidance: Guidance) -> Tensor:
        """Return the loss of clips; if none is padded, frames are sampled without waiting for the device."""
        whole = guidance.lengths is None
        return self._compare(fake, guidance.real, None) if whole else super().compare(fake, guidance)

    def forward(self, fake: Tensor, real: Tensor, lengths: Tensor) -> Tensor:
        """Compare clips `(b, c, t, h, w)` in [-1, 1] over their first `lengths` frames."""
        return self._compare(fake, real, prefix_mask(lengths, fake.shape[2]).flatten().nonzero()[:, 0])

    def _compare(self, fake: Tensor, real: Tensor, valid: Tensor | None) -> Tensor:
        # (b, c, t, h, w) -> (b * t, c, h, w)
        fake, real = fake.transpose(1, 2).flatten(0, 1), real.transpose(1, 2).flatten(0, 1)
        count = len(fake) if valid is None else len(valid)
        chosen = valid
        if self.frames is not None and count > self.frames:
            # Drawn by the CPU's generator, so that all devices sample the same frames.
            drawn = torch.randperm(count)[: self.frames].to(fake.device, non_blocking=True)
            chosen = drawn if valid is None else valid[drawn]
        if chosen is not None and len(chosen) < len(fake):
            fake, real = fake[chosen], real[chosen]
        heights = torch.full((len(fake),), fake.shape[2], device=fake.device)
        return self.module(fake, real, heights)  # type: ignore[no-any-return]


class TemporalDifference(SignalTerm):
    """Temporal difference loss: penalizes flicker; static regions contribute zero.

        loss = mean |(y[t + 1] - y[t]) - (x[t + 1] - x[t])|

    The loss of a clip of one frame is 0.
    """

    def forward(self, fake: Tensor, real: Tensor, lengths: Tensor) -> Tensor:
        """Compare clips `(b, c, t, h, w)` in [-1, 1] over their first `lengths` frames."""
        if fake.shape[2] == 1:
            return fake.new_zeros(())
        change = (fake - real).diff(dim=2).abs().mean((1, 3, 4))  # (b, t - 1)
        return masked_mean(change, prefix_mask((lengths - 1).clamp(min=0), change.shape[1]))
