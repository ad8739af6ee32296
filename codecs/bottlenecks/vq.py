"""Vector quantization."""

import torch
from torch import Tensor, nn
from torch.nn import functional

from ..lengths import masked_mean, prefix_mask
from ..result import Quantized
from .contract import Bottleneck, straight_through
from .nearest import FrozenTable, nearest

__all__ = ["VectorQuantizer"]


class VectorQuantizer(Bottleneck):
    """One book of learned vectors; each latent becomes the nearest (VQ-VAE, arXiv 1711.00937, section 3).

    The book learns by gradient: `|sg(z) - e|^2 + commitment * |z - sg(e)|^2`, averaged over width and valid tokens.
    With `cosine`, latents and entries are scaled to unit length (ViT-VQGAN, arXiv 2110.04627, section 3.2; TiTok).

    Args:
        dim: Width of the latents.
        codebook_size: Entries of the book.
        commitment: Weight of the pull of latents towards their code.
        cosine: Compare directions only.
    """

    def __init__(self, dim: int, codebook_size: int, commitment: float = 0.25, cosine: bool = False) -> None:
        super().__init__()
        self.dim = dim
        self.book_sizes = (codebook_size,)
        self.commitment = commitment
        self.cosine = cosine
        self.codebook = nn.Parameter(torch.empty(codebook_size, dim))
        # Uniform in +-1/K, as in the reference implementation of VQ-VAE; unit vectors where only direction counts.
        nn.init.normal_(self.codebook) if cosine else nn.init.uniform_(
            self.codebook, -1 / codebook_size, 1 / codebook_size
        )

    def _scaled(self, vectors: Tensor) -> Tensor:
        return functional.normalize(vectors, dim=-1) if self.cosine else vectors

    def forward(self, latents: Tensor, lengths: Tensor, depth: Tensor) -> Quantized:
        """Quantize; see `Bottleneck.forward`."""
        with torch.autocast(latents.device.type, enabled=False):
            latents = self._scaled(latents.float())
            book = self._scaled(self.codebook.float())
            codes = nearest(latents, book)
            quantized = functional.embedding(codes, book)
            valid = prefix_mask(lengths, latents.shape[1])
            pull = masked_mean((latents.detach() - quantized).square().mean(-1), valid)
            commit = masked_mean((latents - quantized.detach()).square().mean(-1), valid)
        return Quantized(
            straight_through(latents, quantized.detach()),
            codes[:, None],
            {"codebook": pull, "commitment": self.commitment * commit},
            {"distance": commit.detach()},
        )

    def encode(self, latents: Tensor) -> Tensor:
        """Find each latent's code; see `Bottleneck.encode`."""
        return nearest(self._scaled(latents.float()), self._scaled(self.codebook.float()))[:, None]

    def decode(self, codes: Tensor) -> Tensor:
        """Look codes up; see `Bottleneck.decode`."""
        return functional.embedding(codes[:, 0], self._scaled(self.codebook.float()))

    def frozen(self) -> FrozenTable:
        """Give the export form; see `Bottleneck.frozen`."""
        return FrozenTable(self._scaled(self.codebook.detach().float()), normalise=self.cosine)
