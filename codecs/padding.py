"""Signals brought to whole steps: what lies before their beginning and behind their ends."""

import torch
from torch import Tensor
from torch.nn import functional

__all__ = ["filled"]


def filled(signal: Tensor, hop: list[int], lead: int = 0) -> Tensor:
    """Fill up the last steps of a signal; scriptable, and its sizes stay free in an exported graph.

    A sound ends in silence. Frames are followed, and pixels of a last row or column, by copies of themselves: so a
    clip that ends within a step gives what one gives that a batch has filled up.

    Args:
        signal: `(b, c, *grid)`.
        hop: Samples of each axis to a step.
        lead: Copies of the first frame that go before it.
    """
    if len(hop) == 1:
        return functional.pad(signal, [0, -signal.shape[2] % hop[0]])
    for axis, step in enumerate(hop):
        side, before = signal.shape[axis + 2], lead if axis == 0 else 0
        steps = (side + before + step - 1) // step
        places = torch.arange(steps * step, device=signal.device) - before
        signal = signal.index_select(axis + 2, places.clamp(0, side - 1))
    return signal
