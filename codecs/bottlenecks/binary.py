"""Binary quantization: each dimension is quantized to its sign, one bit."""

import math
from typing import Annotated, TypeAlias

import torch
from torch import Tensor
from torch.nn import functional

from ..masking import masked_mean
from ..result import Quantized
from .contract import straight_through
from .entropy import entropy_groups, grid_entropies
from .grid import Grid, GridQuantizer
from .statistics import Annealed

__all__ = ["BernoulliQuantizer", "BinarySphericalQuantizer", "LookupFreeQuantizer", "SignGrid"]

Bits: TypeAlias = Annotated[int, "[1, 62]"]
"""Dimensions of one bit each, whose code fits a 64-bit integer."""


class SignGrid(Grid):
    """Grid of the corners of a cube: digits 0 and 1, values -scale and +scale.

    Args:
        bits: Dimensions, one bit each.
        scale: Absolute value of each dimension.
    """

    def __init__(self, bits: int, scale: float) -> None:
        super().__init__([2] * bits)
        self.scale = scale

    def encode(self, latents: Tensor) -> Tensor:
        """Quantize latents `(b, n, bits)` to int64 codes `(b, 1, n)`."""
        return self.code((latents > 0).to(torch.int64))

    def corners(self, latents: Tensor) -> Tensor:
        """Return the nearest corner of each latent, to which its code decodes."""
        return torch.where(latents > 0, self.scale, -self.scale)

    def decode(self, codes: Tensor) -> Tensor:
        """Decode codes `(b, 1, n)` to latents `(b, n, bits)` of +-scale."""
        return (self.digits(codes) * 2 - 1).to(torch.float32) * self.scale


class _Binary(GridQuantizer):
    """Base of quantizers of one bit per dimension: one codebook of `2 ** bits` codes."""

    grid: SignGrid

    def __init__(self, bits: int, scale: float) -> None:
        super().__init__([2] * bits, SignGrid(bits, scale))


class _EntropyBinary(_Binary):
    """Base of binary quantizers with an entropy penalty."""

    def __init__(
        self,
        bits: Bits,
        scale: float,
        entropy: float,
        diversity: float,
        temperature: float,
        entropy_group: int,
        entropy_start: float | None,
        anneal: int,
    ) -> None:
        super().__init__(bits, scale)
        self.entropy = entropy
        self.annealed = None if entropy_start is None else Annealed(entropy_start, entropy, anneal)
        self.diversity = diversity
        self.temperature = temperature
        weighted = entropy or entropy_start
        self.groups = entropy_groups([2] * bits, entropy_group, "bottleneck.entropy_group") if weighted else []

    def _penalize(self, latents: Tensor, valid: Tensor) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Return the entropy penalty of soft assignments to the corners, and its metrics."""
        if not self.groups:
            return {}, {}
        # The softmax of `2 z c / temperature` over c in {-scale, +scale} is `sigmoid(4 z scale / temperature)`.
        logits = torch.where(valid[..., None], latents, 0.0) * (4 * self.grid.scale / self.temperature)
        both = torch.stack([functional.logsigmoid(-logits), functional.logsigmoid(logits)], -1)
        weight = self.entropy if self.annealed is None else self.annealed.value
        return grid_entropies(both.unbind(2), valid, self.groups).penalize(weight, self.diversity)


class LookupFreeQuantizer(_EntropyBinary):
    """Lookup-free quantization to signs, +-1 (LFQ of MAGVIT-v2, arXiv 2310.05737, section 3.1).

    Args:
        bits: Dimensions, one bit each.
        commitment: Weight of the commitment loss `|z - sg(sign(z))|^2`.
        entropy: Weight of the entropy penalty, `confidence - diversity weight * diversity`.
        diversity: Weight of the diversity within the entropy penalty.
        temperature: Softmax temperature of the entropy penalty.
        entropy_group: Dimensions per group whose joint entropy is computed; 0: all in one group, at most 20.
        entropy_start: Weight of the entropy penalty at first; it changes linearly to `entropy`. None: it is `entropy`.
        anneal: Updates until the weight is `entropy`.
    """

    def __init__(
        self,
        bits: Bits,
        commitment: float = 0.25,
        entropy: float = 0.1,
        diversity: float = 1.0,
        temperature: Annotated[float, "(0, inf)"] = 0.01,
        entropy_group: Annotated[int, "[0, inf)", "0 takes all bits together"] = 0,
        entropy_start: Annotated[float | None, "[0, inf)", "null keeps the weight"] = None,
        anneal: int = 2000,
    ) -> None:
        super().__init__(bits, 1.0, entropy, diversity, temperature, entropy_group, entropy_start, anneal)
        self.commitment = commitment

    def _quantize(self, latents: Tensor, valid: Tensor) -> Quantized:
        codes = self.grid.encode(latents)
        quantized = self.grid.corners(latents)
        penalties, metrics = self._penalize(latents, valid)
        distance = masked_mean((latents - quantized).square().mean(-1), valid)
        penalties["commitment"] = self.commitment * distance
        return Quantized(
            straight_through(latents, quantized), codes, penalties, {**metrics, "distance": distance.detach()}
        )


class BinarySphericalQuantizer(_EntropyBinary):
    """Binary spherical quantization to signs, +-1 / sqrt(bits) (BSQ, arXiv 2406.07548, section 3.2).

    Latents are normalized to the unit sphere, where the distance to a corner is bounded: no commitment loss is needed.
    `entropy_group=1` is the paper's equation 8, which treats bits as independent in the entropy of the mean choice.

    Args: as `LookupFreeQuantizer`; `temperature` is 1 / tau of the paper.
    """

    def __init__(
        self,
        bits: Bits,
        entropy: float = 0.1,
        diversity: float = 1.0,
        temperature: Annotated[float, "(0, inf)"] = 1.0,
        entropy_group: Annotated[int, "[0, inf)", "0 takes all bits together"] = 9,
        entropy_start: Annotated[float | None, "[0, inf)", "null keeps the weight"] = None,
        anneal: int = 2000,
    ) -> None:
        scale = 1 / math.sqrt(max(bits, 1))
        super().__init__(bits, scale, entropy, diversity, temperature, entropy_group, entropy_start, anneal)

    def _quantize(self, latents: Tensor, valid: Tensor) -> Quantized:
        latents = functional.normalize(latents, dim=-1)
        codes = self.grid.encode(latents)
        penalties, metrics = self._penalize(latents, valid)
        return Quantized(straight_through(latents, self.grid.corners(latents)), codes, penalties, metrics)


class BernoulliQuantizer(_Binary):
    """Binary quantizer that samples its bits in training, with latents as log-odds (Instella-T2I's 1-D binary latents).

    `P(bit = 1) = sigmoid(z / temperature)`, with a temperature annealed to 0. At 0 and in evaluation, a bit is the
    latent's sign. Values are +-1; the gradient is that of their expectation at temperature 1, `tanh(z / 2)`.

    Args:
        bits: Dimensions, one bit each.
        temperature: Initial temperature.
        anneal: Updates until the temperature is 0.
    """

    def __init__(self, bits: Bits, temperature: Annotated[float, "(0, inf)"] = 1.0, anneal: int = 10000) -> None:
        super().__init__(bits, 1.0)
        self.temperature = Annealed(temperature, 0.0, anneal)

    def _quantize(self, latents: Tensor, valid: Tensor) -> Quantized:
        temperature = self.temperature.value
        drawn = latents.detach()
        if self.training:
            # A Bernoulli sample of logit z / t is the sign of z + t * logistic noise, which is defined at t = 0 too.
            drawn = drawn + temperature * torch.logit(torch.rand_like(drawn), eps=1e-6)
        codes = self.grid.encode(drawn)
        quantized = straight_through(torch.tanh(latents / 2), self.grid.corners(drawn))
        return Quantized(quantized, codes, {}, {"temperature": temperature})
