"""Turn a trained continuous codec into a discrete one, without training (TokenBridge)."""

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
    """Turn a trained KL codec into a discrete one, without training (TokenBridge, arXiv 2503.16430).

    Args:
        codec: With a `KLBottleneck`; it stays as it is.
        signals: Batches in [-1, 1] whose latents show each dimension's mean and deviation.
        bins: To a dimension.
        reach: Deviations at which the Gaussian is cut off.

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
