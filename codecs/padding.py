"""Padding of signals to whole steps, at their beginning and their ends."""

import torch
from torch import Tensor
from torch.nn import functional

__all__ = ["pad_to_grid"]


def pad_to_grid(signal: Tensor, downsample: list[int], causal_pad: int = 0) -> Tensor:
    """Fill up the last steps of a signal; scriptable, and its sizes stay free in an exported graph.

    A sound ends in silence. Frames are followed, and pixels of a last row or column, by copies of themselves: so a
    clip that ends within a step gives what one gives that a batch has filled up.

    Args:
        signal: `(b, c, *grid)`.
        downsample: Samples of each axis to a step.
        causal_pad: Copies of the first frame that go before it.
    """
    if len(downsample) == 1:
        return functional.pad(signal, [0, -signal.shape[2] % downsample[0]])
    for axis, step in enumerate(downsample):
        side, before = signal.shape[axis + 2], causal_pad if axis == 0 else 0
        steps = (side + before + step - 1) // step
        indices = torch.arange(steps * step, device=signal.device) - before
        signal = signal.index_select(axis + 2, indices.clamp(0, side - 1))
    return signal
