"""Convert a trained continuous codec to a discrete one, without training (TokenBridge)."""

import copy
from collections.abc import Iterable

import torch
from torch import Tensor

from varitok import UserError

from .bottlenecks.bins import DimensionBins
from .bottlenecks.continuous import KLBottleneck
from .codec import Codec

__all__ = ["bridge"]


@torch.no_grad()
def bridge(codec: Codec, signals: Iterable[Tensor], bins: int = 64, reach: float = 5.0) -> Codec:
    """Return a discrete copy of a trained KL codec, without training (TokenBridge, arXiv 2503.16430).

    Args:
        codec: Codec with a `KLBottleneck`; it is not changed.
        signals: Batches in [-1, 1], from whose latents each dimension's mean and deviation are measured.
        bins: Bins per dimension.
        reach: Standard deviations at which the Gaussian is truncated.

    Raises:
        UserError: The codec is not a KL codec.
    """
    if not isinstance(codec.bottleneck, KLBottleneck):
        raise UserError(f"bridge: needs a codec with a KL bottleneck, this one has {type(codec.bottleneck).__name__}")
    codec = copy.deepcopy(codec).eval()
    assert isinstance(codec.bottleneck, KLBottleneck)
    discrete = DimensionBins(codec.bottleneck, bins, reach)
    discrete.measure(torch.cat([codec.bottleneck.encode(codec.latents(signal)) for signal in signals]))
    codec.bottleneck = discrete
    return codec.eval()
