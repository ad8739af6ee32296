"""Continuous bottlenecks: float latents instead of codes, deterministic or Gaussian."""

import copy
from typing import Literal

import torch
from torch import Tensor, nn

from ..masking import masked_mean, prefix_mask
from ..result import Quantized
from .contract import Bottleneck

__all__ = ["Autoencoder", "KLBottleneck"]


class _Channels(nn.Module):
    """The `count` channels of latents from `start` on."""

    def __init__(self, start: int, count: int) -> None:
        super().__init__()
        self.start, self.count = start, count

    def forward(self, latents: Tensor) -> Tensor:
        return latents.narrow(-1, self.start, self.count)


class _FrozenLatents(nn.Module):
    """Export form: float32 channels `(b, d, n)` instead of codes."""

    def __init__(self, moments: nn.Module, bound: str) -> None:
        super().__init__()
        self.moments = moments
        self.bound = bound

    def encode(self, latents: Tensor) -> Tensor:
        """Return latents `(b, n, d)` as float32 channels `(b, d, n)`."""
        latents = self.moments(latents)
        if self.bound == "tanh":
            latents = torch.tanh(latents)
        return latents.transpose(1, 2)  # (b, n, d) -> (b, d, n)

    def decode(self, codes: Tensor) -> Tensor:
        """Return channels `(b, d, n)` as latents `(b, n, d)`."""
        return codes.transpose(1, 2)  # (b, d, n) -> (b, n, d)


class _Continuous(Bottleneck):
    """Base of continuous bottlenecks, whose codes are float32 channels `(b, d, n)`."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.dim = dim
        self.codebook_sizes = ()

    def decode(self, codes: Tensor) -> Tensor:
        return codes.transpose(1, 2)  # (b, d, n) -> (b, n, d)

    def depths(self, latents: Tensor) -> Tensor:
        """Return 1 for each sample: there are no codebooks to drop."""
        return torch.ones(latents.shape[0], dtype=torch.int64, device=latents.device)


class Autoencoder(_Continuous):
    """Identity or tanh: a deterministic autoencoder (Cosmos' continuous tokenizers, arXiv 2501.03575, section 4.2).

    Args:
        dim: Width of the latents.
        bound: "tanh" bounds latents to [-1, 1]; "none" leaves them unchanged.
    """

    def __init__(self, dim: int, bound: Literal["none", "tanh"] = "none") -> None:
        super().__init__(dim)
        self.bound = bound

    def forward(self, latents: Tensor, lengths: Tensor, n_codebooks: Tensor) -> Quantized:
        """Bound the latents; see `Bottleneck.forward`."""
        with torch.autocast(latents.device.type, enabled=False):
            codes = self.encode(latents)
            valid = prefix_mask(lengths, latents.shape[1])
            power = masked_mean(codes.detach().square().mean(1), valid)
        return Quantized(self.decode(codes), codes, {}, {"power": power})

    def encode(self, latents: Tensor) -> Tensor:
        """Return bounded latents as float32 channels `(b, d, n)`; see `Bottleneck.encode`."""
        latents = latents.float()
        return (torch.tanh(latents) if self.bound == "tanh" else latents).transpose(1, 2)  # (b, n, d) -> (b, d, n)

    def frozen(self) -> nn.Module:
        """Return the export form; see `Bottleneck.frozen`."""
        return _FrozenLatents(nn.Identity(), self.bound)


class KLBottleneck(_Continuous):
    """Diagonal Gaussian posterior of each latent (VAE, arXiv 1312.6114; KL tokenizers, arXiv 2112.10752).

    `KL(q || N(0, I)) = (mean^2 + variance - 1 - log(variance)) / 2`. Training samples from the posterior; evaluation
    and export return its mean.

    Args:
        dim: Width of the latents.
        weight: Weight of the divergence, in nats summed over dimensions, averaged over tokens.
        split: Whether the input is 2 `dim` wide, the mean before the log variance (Stable Diffusion). Otherwise two
            linear maps compute both from `dim` channels, and training starts nearly without noise.
    """

    def __init__(self, dim: int, weight: float = 1e-6, split: bool = False) -> None:
        super().__init__(dim)
        self.weight = weight
        self.split = split
        self.mean: nn.Module = _Channels(0, dim) if split else nn.Linear(dim, dim)
        self.log_variance: nn.Module = _Channels(dim, dim) if split else nn.Linear(dim, dim)
        if isinstance(self.mean, nn.Linear) and isinstance(self.log_variance, nn.Linear):
            nn.init.eye_(self.mean.weight)
            nn.init.zeros_(self.mean.bias)
            nn.init.zeros_(self.log_variance.weight)
            nn.init.constant_(self.log_variance.bias, -4.0)

    @property
    def inputs(self) -> int:
        """Return the width of the input latents; see `Bottleneck.inputs`."""
        return 2 * self.dim if self.split else self.dim

    def forward(self, latents: Tensor, lengths: Tensor, n_codebooks: Tensor) -> Quantized:
        """Sample latents in training, return their means in evaluation; see `Bottleneck.forward`."""
        with torch.autocast(latents.device.type, enabled=False):
            latents = latents.float()
            mean, log_variance = self.mean(latents), self.log_variance(latents).clamp(-30.0, 20.0)
            valid = prefix_mask(lengths, latents.shape[1])
            divergence = (mean.square() + log_variance.exp() - 1 - log_variance).sum(-1) / 2
            divergence = masked_mean(divergence, valid)
            drawn = mean + torch.randn_like(mean) * (log_variance / 2).exp() if self.training else mean
        codes = mean.transpose(1, 2)  # (b, n, d) -> (b, d, n)
        return Quantized(drawn, codes, {"kl": self.weight * divergence}, {"divergence": divergence.detach()})

    def encode(self, latents: Tensor) -> Tensor:
        """Return the means, float32 `(b, d, n)`; see `Bottleneck.encode`."""
        with torch.autocast(latents.device.type, enabled=False):
            means: Tensor = self.mean(latents.float())
            return means.transpose(1, 2)  # (b, n, d) -> (b, d, n)

    def frozen(self) -> nn.Module:
        """Return the export form; see `Bottleneck.frozen`."""
        return _FrozenLatents(copy.deepcopy(self.mean), "none")
