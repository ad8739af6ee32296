"""Results of bottlenecks and codecs: NamedTuples, which `torch.jit.trace` and `torch.export` support."""

from collections.abc import Mapping
from types import MappingProxyType
from typing import NamedTuple

from torch import Tensor

__all__ = ["Quantized", "Reconstruction"]


class Quantized(NamedTuple):
    """Result of a bottleneck.

    Attributes:
        latents: Quantized latents `(b, n, d)`, the decoder's input, with a straight-through gradient.
        codes: int64 `(b, codebooks, n)`.
        penalties: Weighted scalar losses, by name.
        metrics: Scalars to log, by name.
    """

    latents: Tensor
    codes: Tensor
    penalties: dict[str, Tensor]
    metrics: dict[str, Tensor]


class Reconstruction(NamedTuple):
    """Result of a codec.

    Attributes:
        signal: Reconstructed signal `(b, c, *grid)`, in [-1, 1] up to errors (not clamped).
            In training, a generative decoder gives an estimate instead (`GenerativeDecoder.loss`).
        quantized: Result of the bottleneck.
        penalties: The decoder's own losses, scalars by name; of a deterministic one, none.
    """

    signal: Tensor
    quantized: Quantized
    penalties: Mapping[str, Tensor] = MappingProxyType({})
