"""Discrete codes without training: each dimension is divided into bins and is a codebook of its own."""

import copy
import math
from typing import Annotated

import torch
from torch import Tensor, nn

from varitok import UserError

from ..result import Quantized
from .continuous import Autoencoder, KLBottleneck
from .contract import Bottleneck, FrozenCodebooks, straight_through

__all__ = ["DimensionBins", "UniformBins"]


class _FrozenBins(FrozenCodebooks):
    """Export form, with one codebook per dimension."""

    edges: Tensor
    centers: Tensor
    shift: Tensor
    scale: Tensor

    def __init__(self, bins: "_Bins") -> None:
        super().__init__(bins.dim, bins.edges.device)
        self.continuous = copy.deepcopy(bins.continuous).frozen()
        for name in ("edges", "centers", "shift", "scale"):
            self.register_buffer(name, getattr(bins, name).clone())

    def encode(self, latents: Tensor) -> Tensor:
        means = self.continuous.encode(latents).transpose(1, 2)  # type: ignore[operator]
        return torch.bucketize(((means - self.shift) / self.scale).transpose(1, 2).contiguous(), self.edges)

    def decode_kept(self, codes: Tensor, kept: Tensor) -> Tensor:
        values = nn.functional.embedding(codes, self.centers.unsqueeze(1)).squeeze(-1).transpose(1, 2)  # (b, n, d)
        return values * kept * self.scale + self.shift


class _Bins(Bottleneck):
    """Bins each dimension: `code = bucketize((z - shift) / scale, edges)`, `z_q = centers[code] * scale + shift`."""

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

    @property
    def inputs(self) -> int:
        """Return the width of the input latents; see `Bottleneck.inputs`."""
        return self.continuous.inputs

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
        return self.centers[codes].transpose(1, 2)  # (b, q, n) -> (b, n, q)

    def encode(self, latents: Tensor) -> Tensor:
        return self._bin(self.continuous.encode(latents))

    def decode(self, codes: Tensor) -> Tensor:
        values = nn.functional.pad(self._values(codes), (0, self.dim - codes.shape[1]))
        return values * self.scale + self.shift

    def frozen(self) -> nn.Module:
        return _FrozenBins(self)


class DimensionBins(_Bins):
    """Bins of equal probability for each dimension of a KL codec (TokenBridge, arXiv 2503.16430, section 3.2).

    Nothing is trained: each dimension is modeled as a Gaussian whose mean and deviation are measured once (`bridge`).
    A bin decodes to the mean of the Gaussian within it. A dropped codebook decodes to its dimension's mean.

    Args:
        continuous: The trained bottleneck.
        bins: Bins per dimension, 2 or more.
        reach: Standard deviations at which the Gaussian is truncated.
    """

    def __init__(
        self,
        continuous: KLBottleneck,
        bins: Annotated[int, "[2, inf)"] = 64,
        reach: Annotated[float, "(0, inf)"] = 5.0,
    ) -> None:
        ends = torch.special.ndtr(torch.tensor([-reach, reach], dtype=torch.float64))
        shares = torch.linspace(float(ends[0]), float(ends[1]), bins + 1, dtype=torch.float64)
        edges = torch.special.ndtri(shares).clamp(-reach, reach)
        density = torch.exp(-edges.square() / 2) / math.sqrt(2 * math.pi)
        centers = (density[:-1] - density[1:]) / shares.diff()
        super().__init__(continuous, edges[1:-1].float(), centers.float())

    @torch.no_grad()
    def measure(self, latents: Tensor) -> None:
        """Set the mean and deviation of each dimension to those of continuous latents `(b, d, n)`."""
        rows = latents.transpose(1, 2).flatten(0, 1).double()  # (b, d, n) -> (b * n, d)
        self.shift.copy_(rows.mean(0))
        self.scale.copy_(rows.std(0).clamp(min=1e-6))


class UniformBins(_Bins):
    """Evenly spaced levels for each dimension (dMel, arXiv 2407.15835, section 2.1).

    Each dimension is a codebook; a dropped one decodes to the lowest level.

    Args:
        dim: Width of the latents.
        levels: Levels per dimension, 2 or more.
        smallest: The lowest level; values below are clamped to it.
        largest: The highest level.

    Raises:
        UserError: `smallest` isn't below `largest`.
    """

    def __init__(
        self,
        dim: int,
        levels: Annotated[int, "[2, inf)"] = 16,
        smallest: Annotated[float, "(-inf, inf)"] = -7.0,
        largest: Annotated[float, "(-inf, inf)"] = 2.0,
    ) -> None:
        if not smallest < largest:
            raise UserError(f"bottleneck.smallest={smallest}: must be below bottleneck.largest={largest}")
        digits = torch.arange(levels, dtype=torch.float32)
        super().__init__(Autoencoder(dim), digits[1:] - 0.5, digits)
        self.shift.fill_(smallest)
        self.scale.fill_((largest - smallest) / (levels - 1))
