"""How one-dimensional convolutions treat the ends of a signal: ours, and those of published codecs.

Published weights are right only with the padding that they were trained with.
"""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from varitok import UserError

__all__ = ["EDGES", "Edges", "edges_of", "pad_ends"]


class Edges(NamedTuple):
    """Treatment of a signal's ends.

    Attributes:
        fill: What a convolution reads beyond the ends: `zeros`, `reflect` or `replicate`.
        early: Whether the larger part of an odd padding is at the start; else at the end.
        partial: Whether each layer completes its own last step. Else the signal is padded to whole steps, once.
        norm_first: Whether a transposed convolution is normalized before it is cropped.
        shortens: Whether a transposed convolution of odd stride lacks its last step.
        resample: Name of the edges of the convolution that resamples latents; empty for the same.
    """

    fill: str = "zeros"
    early: bool = False
    partial: bool = False
    norm_first: bool = False
    shortens: bool = False
    resample: str = ""


EDGES = {
    "zeros": Edges(),
    "encodec": Edges("reflect", early=True, partial=True, norm_first=True),
    "dac": Edges(early=True, shortens=True),
    "snac": Edges(early=True),
    "mimi": Edges(partial=True, resample="mimi_resample"),
    "mimi_resample": Edges("replicate", partial=True),
}


def edges_of(name: str, dims: int = 1) -> Edges:
    """Return the edges of a name in `EDGES`.

    Raises:
        UserError: There is no such name, or it isn't `zeros` and there is more than one axis.
    """
    if name not in EDGES:
        raise UserError(f"edges={name}: should be one of {', '.join(EDGES)}")
    if dims > 1 and name != "zeros":
        raise UserError(f"edges={name}: is for one axis; give zeros")
    return EDGES[name]


def pad_ends(x: Tensor, left: int, right: int, fill: str, lengths: Tensor | None = None, stride: int = 1) -> Tensor:
    """Pad `(b, c, t)` to `(b, c, left + t + right)`; scriptable.

    A reflection of more steps than there are continues with zeros, as in EnCodec.

    Args:
        x: The signal.
        left: Steps before it.
        right: Steps after it.
        fill: See `Edges`.
        lengths: int64 `(b, 1)` or `(1, 1)`, valid steps of each sample, which is reflected at its own end; all if None.
        stride: Steps that the lengths are completed to a multiple of.
    """
    if fill == "zeros":
        return functional.pad(x, [left, right])
    if fill == "replicate":
        first, last = x[:, :, :1].expand(-1, -1, left), x[:, :, -1:].expand(-1, -1, right)
        x = torch.cat([first, x, last], dim=2)
        if lengths is None:
            return x
        places = torch.minimum(torch.arange(x.shape[2], device=x.device).unsqueeze(0), left + lengths - 1)
        return x.gather(2, places.unsqueeze(1).expand(x.shape[0], x.shape[1], -1))
    if lengths is not None:
        return _reflect_each(x, left, right, lengths, stride)
    t = x.shape[2]
    least = max(left, right) + 1
    if t < least:
        x = functional.pad(x, [0, least - t])
    return functional.pad(x, [left, right], mode="reflect")[:, :, : left + t + right]


def _reflect_each(x: Tensor, left: int, right: int, lengths: Tensor, stride: int) -> Tensor:
    """Reflect each sample at its own end."""
    t = x.shape[2]
    places = (torch.arange(left + t + right, device=x.device) - left).abs().unsqueeze(0)
    whole = (lengths + (stride - 1)) // stride * stride
    ends = torch.maximum(lengths, whole - lengths + (right + 1)).clamp(min=left + 1)
    places = torch.where(places >= ends, 2 * (ends - 1) - places, places)
    inside = ((places >= 0) & (places < lengths)).unsqueeze(1)
    places = places.clamp(0, t - 1)
    if lengths.shape[0] == 1:
        found = x.index_select(2, places[0])
    else:
        found = x.gather(2, places.unsqueeze(1).expand(x.shape[0], x.shape[1], -1))
    return torch.where(inside, found, torch.zeros_like(found))
