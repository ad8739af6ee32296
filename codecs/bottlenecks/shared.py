"""Quantizer with one code index for a semantic and a pixel codebook."""

import math

import torch
from torch import Tensor, nn
from torch.nn import functional

from ..masking import masked_mean, prefix_mask
from ..result import Quantized
from .contract import Bottleneck, straight_through
from .nearest import FrozenTable, nearest

__all__ = ["SharedIndexQuantizer"]


class _FrozenShared(nn.Module):
    """Export form: searches weighted unit vectors, returns unweighted ones."""

    def __init__(self, search: FrozenTable, table: Tensor, semantic: int, weight: float) -> None:
        super().__init__()
        self.search = search
        self.search.table = table.clone()
        self.semantic = semantic
        self.weight = weight

    def encode(self, latents: Tensor) -> Tensor:
        semantic = functional.normalize(latents[..., : self.semantic], dim=-1)
        pixel = functional.normalize(latents[..., self.semantic :], dim=-1)
        codes: Tensor = self.search.encode(torch.cat([semantic, pixel * self.weight], -1))
        return codes

    def decode(self, codes: Tensor) -> Tensor:
        latents: Tensor = self.search.decode(codes)
        return latents


class SharedIndexQuantizer(Bottleneck):
    """One code index for a semantic and a pixel vector (TokenFlow, arXiv 2412.03069, section 3.1).

    Both halves are normalized to unit length. The index is
    `argmin_k |z_s - e_s[k]|^2 + pixel_weight * |z_p - e_p[k]|^2`.

    Args:
        semantic_dim: Width of the semantic half, the first channels.
        pixel_dim: Width of the pixel half.
        codebook_size: Entries of the shared codebook.
        pixel_weight: Weight of the pixel distance.
        commitment: Weight of the commitment loss.
    """

    def __init__(
        self,
        semantic_dim: int,
        pixel_dim: int,
        codebook_size: int,
        pixel_weight: float = 1.0,
        commitment: float = 0.25,
    ) -> None:
        super().__init__()
        self.dim = semantic_dim + pixel_dim
        self.semantic_dim = semantic_dim
        self.codebook_sizes = (codebook_size,)
        self.weight = math.sqrt(pixel_weight)
        self.commitment = commitment
        self.codebook = nn.Parameter(torch.randn(codebook_size, self.dim))

    def _units(self, vectors: Tensor) -> Tensor:
        halves = vectors.float().tensor_split([self.semantic_dim], -1)
        return torch.cat([functional.normalize(half, dim=-1) for half in halves], -1)

    def _weigh(self, units: Tensor) -> Tensor:
        return torch.cat([units[..., : self.semantic_dim], units[..., self.semantic_dim :] * self.weight], -1)

    def forward(self, latents: Tensor, lengths: Tensor, n_codebooks: Tensor) -> Quantized:
        """Quantize; see `Bottleneck.forward`."""
        with torch.autocast(latents.device.type, enabled=False):
            units, codebook = self._units(latents), self._units(self.codebook)
            codes = nearest(self._weigh(units), self._weigh(codebook))
            found = functional.embedding(codes, codebook)
            valid = prefix_mask(lengths, latents.shape[1])
            pull = masked_mean((units.detach() - found).square().mean(-1), valid)
            away = (units - found.detach()).square()
            commitment = masked_mean(away.mean(-1), valid)
            halves = {
                f"{name}_distance": masked_mean(half.detach().sum(-1), valid)
                for name, half in zip(("semantic", "pixel"), away.tensor_split([self.semantic_dim], -1), strict=True)
            }
        penalties = {"codebook": pull, "commitment": self.commitment * commitment}
        return Quantized(straight_through(units, found), codes[:, None], penalties, halves)

    def encode(self, latents: Tensor) -> Tensor:
        """Return the index of each latent's nearest entry; see `Bottleneck.encode`."""
        return nearest(self._weigh(self._units(latents)), self._weigh(self._units(self.codebook)))[:, None]

    def decode(self, codes: Tensor) -> Tensor:
        """Look up the entries of codes; see `Bottleneck.decode`."""
        return functional.embedding(codes[:, 0], self._units(self.codebook))

    def frozen(self) -> nn.Module:
        """Return the export form; see `Bottleneck.frozen`."""
        codebook = self._units(self.codebook).detach()
        return _FrozenShared(FrozenTable(self._weigh(codebook)), codebook, self.semantic_dim, self.weight)
