"""Binary quantization: each dimension keeps its sign, one bit."""

import math

import torch
from torch import Tensor
from torch.nn import functional

from varitok import UserError

from ..masking import masked_mean
from ..result import Quantized
from .contract import straight_through
from .entropy import entropy_groups, grid_entropies
from .grid import Grid, GridQuantizer
from .statistics import Annealed

__all__ = ["BernoulliQuantizer", "BinarySphericalQuantizer", "LookupFreeQuantizer", "SignGrid"]


class SignGrid(Grid):
    """Signs as digits 0 and 1, and as values +-scale.

    Args:
        bits: Dimensions, one bit each.
        scale: Size of the values.
    """

    def __init__(self, bits: int, scale: float) -> None:
        super().__init__([2] * bits)
        self.scale = scale

    def encode(self, latents: Tensor) -> Tensor:
        """Turn latents `(b, n, bits)` into int64 codes `(b, 1, n)`."""
        return self.code((latents > 0).to(torch.int64))

    def corners(self, latents: Tensor) -> Tensor:
        """Turn latents into what their codes decode to."""
        return torch.where(latents > 0, self.scale, -self.scale)

    def decode(self, codes: Tensor) -> Tensor:
        """Turn codes `(b, 1, n)` into latents `(b, n, bits)` of +-scale."""
        return (self.digits(codes) * 2 - 1).to(torch.float32) * self.scale


class _Binary(GridQuantizer):
    """One bit for each dimension, all in one codebook of 2^bits codes."""

    grid: SignGrid

    def __init__(self, bits: int, scale: float) -> None:
        if not 1 <= bits <= 62:
            raise UserError(f"bottleneck.bits={bits}: a code of 1 to 62 bits fits a 64-bit integer")
        super().__init__([2] * bits, SignGrid(bits, scale))


class _EntropyBinary(_Binary):
    """Signs kept in use by an entropy penalty."""

    def __init__(
        self, bits: int, scale: float, entropy: float, diversity: float, temperature: float, entropy_group: int
    ) -> None:
        super().__init__(bits, scale)
        self.entropy = entropy
        self.diversity = diversity
        self.temperature = temperature
        self.groups = entropy_groups([2] * bits, entropy_group, "bottleneck.entropy_group") if entropy else []

    def _penalize(self, latents: Tensor, valid: Tensor) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Compute the entropy penalty of latents next to corners of +-scale, and what to log of it."""
        if not self.entropy:
            return {}, {}
        # The softmax of 2 z c / temperature over c = +-scale is a sigmoid.
        logits = torch.where(valid[..., None], latents, 0.0) * (4 * self.grid.scale / self.temperature)
        both = torch.stack([functional.logsigmoid(-logits), functional.logsigmoid(logits)], -1)
        return grid_entropies(both.unbind(2), valid, self.groups).penalize(self.entropy, self.diversity)


class LookupFreeQuantizer(_EntropyBinary):
    """Keeps signs, +-1 (LFQ of MAGVIT-v2, arXiv 2310.05737, section 3.1).

    Args:
        bits: Dimensions, one bit each.
        commitment: Weight of the pull of latents towards their corner.
        entropy: Weight of the entropy penalty, confidence - diversity.
        diversity: Weight of the diversity within it.
        temperature: Softmax temperature of the entropy penalty.
        entropy_group: Dimensions whose joint distribution is looked at; 0: all, up to 20.
    """

    def __init__(
        self,
        bits: int,
        commitment: float = 0.25,
        entropy: float = 0.1,
        diversity: float = 1.0,
        temperature: float = 0.01,
        entropy_group: int = 0,
    ) -> None:
        super().__init__(bits, 1.0, entropy, diversity, temperature, entropy_group)
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
    """Keeps signs of latents on the unit sphere, +-1 / sqrt(bits) (BSQ, arXiv 2406.07548, section 3.2).

    On the sphere the distance to a corner is bounded, so there is no commitment. With `entropy_group=1`, the paper's
    equation 8, the entropy of the mean choice is that of independent bits, whatever their number.

    Args: as `LookupFreeQuantizer`; `temperature` is 1 / tau of the paper.
    """

    def __init__(
        self,
        bits: int,
        entropy: float = 0.1,
        diversity: float = 1.0,
        temperature: float = 1.0,
        entropy_group: int = 9,
    ) -> None:
        super().__init__(bits, 1 / math.sqrt(max(bits, 1)), entropy, diversity, temperature, entropy_group)

    def _quantize(self, latents: Tensor, valid: Tensor) -> Quantized:
        latents = functional.normalize(latents, dim=-1)
        codes = self.grid.encode(latents)
        penalties, metrics = self._penalize(latents, valid)
        return Quantized(straight_through(latents, self.grid.corners(latents)), codes, penalties, metrics)


class BernoulliQuantizer(_Binary):
    """Draws bits while training, with the latents as their log-odds (Instella-T2I's 1-D binary latents).

    The temperature falls to 0 in the course of the run; there, as in evaluation, a bit is its latent's sign. Values
    are +-1; the gradient is that of the bit's expectation, `tanh(z / 2)`.

    Args:
        bits: Dimensions, one bit each.
        temperature: At the start; bits of odds `z / temperature`.
        anneal: Updates until the temperature is 0.
    """

    def __init__(self, bits: int, temperature: float = 1.0, anneal: int = 10000) -> None:
        super().__init__(bits, 1.0)
        self.temperature = Annealed(temperature, 0.0, anneal)

    def _quantize(self, latents: Tensor, valid: Tensor) -> Quantized:
        temperature = self.temperature.value
        drawn = latents.detach()
        if self.training:
            # A draw of odds z / t is the sign of z + t * logistic noise, which has a limit at t = 0.
            drawn = drawn + temperature * torch.logit(torch.rand_like(drawn), eps=1e-6)
        codes = self.grid.encode(drawn)
        quantized = straight_through(torch.tanh(latents / 2), self.grid.corners(drawn))
        return Quantized(quantized, codes, {}, {"temperature": temperature})
