"""What a bottleneck and a codec return: NamedTuples, since they survive `torch.jit.trace` and `torch.export`."""

from typing import NamedTuple

from torch import Tensor

__all__ = ["Quantized", "Reconstruction"]


class Quantized(NamedTuple):
    """What a bottleneck makes of latents.

    Attributes:
        latents: `(b, n, d)`, the decoder's input, with a straight-through gradient while training.
        codes: int64 `(b, codebooks, n)`.
        penalties: Scalars to be added to the loss, already weighted, by name.
        metrics: Scalars to be logged, by name.
    """

    latents: Tensor
    codes: Tensor
    penalties: dict[str, Tensor]
    metrics: dict[str, Tensor]


class Reconstruction(NamedTuple):
    """A signal after its way through a codec.

    Attributes:
        signal: `(b, c, *grid)` in [-1, 1] (not clamped).
        quantized: What the bottleneck made on the way.
    """

    signal: Tensor
    quantized: Quantized
