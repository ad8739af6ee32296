"""Discrete codes without training: each dimension is cut into bins, and is a codebook."""

import copy
import math

import torch
from torch import Tensor, nn

from varitok import UserError

from ..result import Quantized
from .continuous import Autoencoder, KLBottleneck
from .contract import Bottleneck, FrozenCodebooks, straight_through

__all__ = ["DimensionBins", "UniformBins"]


class _FrozenBins(FrozenCodebooks):
    """The export form: as many codebooks as dimensions."""

    edges: Tensor
    centers: Tensor
    shift: Tensor
    scale: Tensor

    def __init__(self, bins: "_Bins") -> None:
        super().__init__(bins.dim)
        self.continuous = copy.deepcopy(bins.continuous).frozen()
        for name in ("edges", "centers", "shift", "scale"):
            self.register_buffer(name, getattr(bins, name).clone())

    def encode(self, latents: Tensor) -> Tensor:
        means = self.continuous.encode(latents).transpose(1, 2)  # type: ignore[operator]
        return torch.bucketize(((means - self.shift) / self.scale).transpose(1, 2).contiguous(), self.edges)

    def decode_kept(self, codes: Tensor, kept: Tensor) -> Tensor:
        values = nn.functional.embedding(codes, self.centers.unsqueeze(1)).squeeze(-1).transpose(1, 2)
        return values * kept * self.scale + self.shift


class _Bins(Bottleneck):
    """Quantizes each dimension, less `shift` and over `scale`, at `edges`; each interval has a center."""

    edges: Tensor
    centers: Tensor
    shift: Tensor
    scale: Tensor

    def __init__(self, continuous: Bottleneck, edges: Tensor, centers: Tensor) -> None:
        super().__init__()
        self.continuous = continuous
        self.dim = continuous.dim
        self.codebook_sizes = (len(centers),) * self.dim
        self.register_buffer("edges", edges, persistent=False)
        self.register_buffer("centers", centers, persistent=False)
        self.register_buffer("shift", torch.zeros(self.dim))
        self.register_buffer("scale", torch.ones(self.dim))

    def forward(self, latents: Tensor, lengths: Tensor, n_codebooks: Tensor) -> Quantized:
        means = self.continuous.encode(latents)
        codes = self._bin(means)
        kept = torch.arange(self.dim, device=n_codebooks.device) < n_codebooks[:, None]
        values = self._values(codes)
        values = torch.where(kept[:, None], values, 0.0) * self.scale + self.shift
        return Quantized(straight_through(means.transpose(1, 2), values), codes, {}, {})

    def _bin(self, means: Tensor) -> Tensor:
        return torch.bucketize(
            ((means.transpose(1, 2) - self.shift) / self.scale).transpose(1, 2).contiguous(), self.edges
        )

    def _values(self, codes: Tensor) -> Tensor:
        return self.centers[codes].transpose(1, 2)

    def encode(self, latents: Tensor) -> Tensor:
        return self._bin(self.continuous.encode(latents))

    def decode(self, codes: Tensor) -> Tensor:
        values = nn.functional.pad(self._values(codes), (0, self.dim - codes.shape[1]))
        return values * self.scale + self.shift

    def frozen(self) -> nn.Module:
        return _FrozenBins(self)


class DimensionBins(_Bins):
    """Cuts each dimension of a KL codec into bins of equal probability (TokenBridge, arXiv 2503.16430, section 3.2).

    Nothing is trained: a dimension is taken for Gaussian, with a mean and deviation measured once (`bridge`), and each
    bin stands for the mean of its part of the Gaussian. A dimension is a codebook; one that is left out is its mean.

    Args:
        continuous: The trained bottleneck.
        bins: To a dimension, 2 or more.
        reach: Deviations at which the Gaussian is cut off.

    Raises:
        UserError: There are fewer than 2 bins.
    """

    def __init__(self, continuous: KLBottleneck, bins: int = 64, reach: float = 5.0) -> None:
        if bins < 2:
            raise UserError(f"bottleneck.bins={bins}: must be at least 2")
        ends = torch.special.ndtr(torch.tensor([-reach, reach], dtype=torch.float64))
        shares = torch.linspace(float(ends[0]), float(ends[1]), bins + 1, dtype=torch.float64)
        edges = torch.special.ndtri(shares).clamp(-reach, reach)
        density = torch.exp(-edges.square() / 2) / math.sqrt(2 * math.pi)
        centers = (density[:-1] - density[1:]) / shares.diff()
        super().__init__(continuous, edges[1:-1].float(), centers.float())

    @torch.no_grad()
    def measure(self, latents: Tensor) -> None:
        """Take mean and deviation of each dimension from the continuous latents `(b, d, n)` of some signals."""
        rows = latents.transpose(1, 2).flatten(0, 1).double()
        self.shift.copy_(rows.mean(0))
        self.scale.copy_(rows.std(0).clamp(min=1e-6))


class UniformBins(_Bins):
    """Rounds each dimension to the nearest of a few even levels (dMel, arXiv 2407.15835, section 2.1).

    A dimension is a codebook; one that is left out decodes to the lowest level, like values below it.

    Args:
        dim: Width of the latents.
        levels: Levels of a dimension, 2 or more.
        smallest: The lowest.
        largest: The highest.

    Raises:
        UserError: There are fewer than 2 levels, or they don't rise.
    """

    def __init__(self, dim: int, levels: int = 16, smallest: float = -7.0, largest: float = 2.0) -> None:
        if levels < 2 or not smallest < largest:
            raise UserError(f"bottleneck: levels={levels} from {smallest} to {largest}: 2 or more, in rising order")
        digits = torch.arange(levels, dtype=torch.float32)
        super().__init__(Autoencoder(dim), digits[1:] - 0.5, digits)
        self.shift.fill_(smallest)
        self.scale.fill_((largest - smallest) / (levels - 1))
