"""Padding of signals to whole steps of the grid, and causal padding."""

import torch
from torch import Tensor
from torch.nn import functional

__all__ = ["pad_to_grid"]


def pad_to_grid(signal: Tensor, downsample: list[int], causal_pad: int = 0) -> Tensor:
    """Pad each axis of a signal to a multiple of its step; scriptable, with dynamic sizes in an exported graph.

    Audio is padded with zeros. Images and clips are padded with copies of the last frame, row or column. Batches pad
    shorter clips in the same way, so that a clip's tokens don't depend on its batch.

    Args:
        signal: `(b, c, *grid)`.
        downsample: Samples per step of each axis.
        causal_pad: Copies of the first frame before it.
    """
    if len(downsample) == 1:
        return functional.pad(signal, [0, -signal.shape[2] % downsample[0]])
    for axis, step in enumerate(downsample):
        side, before = signal.shape[axis + 2], causal_pad if axis == 0 else 0
        steps = (side + before + step - 1) // step
        indices = torch.arange(steps * step, device=signal.device) - before
        signal = signal.index_select(axis + 2, indices.clamp(0, side - 1))
    return signal
