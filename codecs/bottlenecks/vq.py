"""Vector quantizers of one codebook, learned by gradient, EMA, k-means or likelihood."""

import math
from abc import abstractmethod
from typing import Annotated, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from ..masking import masked_mean, prefix_mask
from ..result import Quantized
from .contract import Bottleneck, straight_through
from .entropy import codebook_entropies
from .nearest import FrozenTable, lookup, nearest
from .soft import mixture_likelihood, soft_entries
from .statistics import MovingCodebook

__all__ = [
    "EMAVectorQuantizer",
    "IndexVectorQuantizer",
    "KMeansQuantizer",
    "MixtureVectorQuantizer",
    "SimVectorQuantizer",
    "VectorQuantizer",
]


class _Weights(NamedTuple):
    """Weights of a codebook's penalties, and the softmax temperature of the entropy penalty."""

    commitment: float
    entropy: float
    temperature: float


class _Codebook(Bottleneck):
    """Base of quantizers to the nearest entry of `table()`, which subclasses define."""

    exact = True

    def __init__(self, dim: int, codebook_size: int, cosine: bool, rotation: bool, weights: _Weights) -> None:
        super().__init__()
        self.dim = dim
        self.codebook_sizes = (codebook_size,)
        self.cosine = cosine
        self.rotation = rotation
        self.weights = weights

    @abstractmethod
    def table(self) -> Tensor:
        """Return the entries `(K, d)`, float32, unit vectors if cosine, with gradient if learned by gradient."""

    def _scale_latents(self, vectors: Tensor) -> Tensor:
        return functional.normalize(vectors, dim=-1) if self.cosine else vectors

    def forward(self, latents: Tensor, lengths: Tensor, n_codebooks: Tensor) -> Quantized:
        with torch.autocast(latents.device.type, enabled=False):
            return self._quantize(self._scale_latents(latents.float()), prefix_mask(lengths, latents.shape[1]))

    def _quantize(self, latents: Tensor, valid: Tensor) -> Quantized:
        codebook, weights = self.table(), self.weights
        found = lookup(latents, codebook, self.rotation)
        pull, commitment = masked_mean(found.pull, valid), masked_mean(found.commitment, valid)
        penalties = {"commitment": weights.commitment * commitment}
        metrics = {"distance": commitment.detach()}
        if codebook.requires_grad:
            penalties["codebook"] = pull
        if weights.entropy:
            entropies = codebook_entropies(latents, codebook, valid, weights.temperature)
            penalty, entropy_metrics = entropies.penalize(weights.entropy)
            penalties |= penalty
            metrics |= entropy_metrics
        return Quantized(found.latents, found.codes[:, None], penalties, metrics)

    def encode(self, latents: Tensor) -> Tensor:
        return nearest(self._scale_latents(latents.float()), self.table())[:, None]

    def decode(self, codes: Tensor) -> Tensor:
        return functional.embedding(codes[:, 0], self.table())

    def frozen(self) -> nn.Module:
        return FrozenTable(self.table(), normalize=self.cosine)


class VectorQuantizer(_Codebook):
    """Codebook learned by gradient (VQ-VAE, arXiv 1711.00937, section 3).

    `loss = |sg(z) - e|^2 + commitment * |z - sg(e)|^2`, averaged over dimensions and valid tokens. With `cosine`,
    latents and entries are normalized to unit length (ViT-VQGAN, arXiv 2110.04627, section 3.2; TiTok, DAC).

    Args:
        dim: Width of the latents.
        codebook_size: Entries of the codebook.
        commitment: Weight of the commitment loss.
        cosine: Normalize latents and entries, so that the nearest entry has the largest cosine similarity.
        rotation: Replace the straight-through gradient by the rotation trick (arXiv 2410.06424).
        entropy: Weight of the entropy penalty, confidence - diversity, in nats (Open-MAGVIT2, arXiv 2409.04410).
        temperature: Softmax temperature of the entropy penalty, in units of squared latent distance.
    """

    def __init__(
        self,
        dim: int,
        codebook_size: int,
        commitment: float = 0.25,
        cosine: bool = False,
        rotation: bool = False,
        entropy: float = 0.0,
        temperature: Annotated[float, "(0, inf)"] = 0.01,
    ) -> None:
        super().__init__(dim, codebook_size, cosine, rotation, _Weights(commitment, entropy, temperature))
        self.codebook = nn.Parameter(torch.empty(codebook_size, dim))
        # Uniform in +-1/K, as in the reference implementation of VQ-VAE; Gaussian if normalized to unit length.
        nn.init.normal_(self.codebook) if cosine else nn.init.uniform_(
            self.codebook, -1 / codebook_size, 1 / codebook_size
        )

    def table(self) -> Tensor:
        """Return the entries `(K, d)`."""
        return self._scale_latents(self.codebook.float())

    @torch.no_grad()
    def thaw(self, frozen: nn.Module) -> None:
        """Take over the entries; see `Bottleneck.thaw`."""
        self.codebook.copy_(frozen.get_buffer("table"))


class EMAVectorQuantizer(_Codebook):
    """Codebook of EMAs of the latents assigned to each entry (VQ-VAE, arXiv 1711.00937, appendix A).

    Statistics cover all ranks and all batches of an update; dead entries are replaced by latents (see
    `MovingCodebook`). EnCodec (arXiv 2210.13438, section 3.2) uses decay 0.99 and k-means initialization.

    Args: as `VectorQuantizer`, and:
        decay: EMA decay per update.
        revival: Fraction of uniform usage below which an entry is replaced; 0: never.
        kmeans_init: Initialize by k-means of the first batch.
    """

    def __init__(
        self,
        dim: int,
        codebook_size: int,
        commitment: float = 0.25,
        cosine: bool = False,
        rotation: bool = False,
        decay: Annotated[float, "[0, 1)"] = 0.99,
        revival: Annotated[float, "[0, 1]"] = 0.03,
        kmeans_init: bool = True,
        entropy: float = 0.0,
        temperature: Annotated[float, "(0, inf)"] = 0.01,
    ) -> None:
        super().__init__(dim, codebook_size, cosine, rotation, _Weights(commitment, entropy, temperature))
        self.codebook = MovingCodebook(codebook_size, dim, decay, revival, kmeans_init, cosine)

    def table(self) -> Tensor:
        """Return the entries `(K, d)`."""
        return self.codebook.entries

    def thaw(self, frozen: nn.Module) -> None:
        """Take over the entries, each with a count of 1; see `Bottleneck.thaw`."""
        self.codebook.start_from(frozen.get_buffer("table"))

    def _quantize(self, latents: Tensor, valid: Tensor) -> Quantized:
        learns = self.training and torch.is_grad_enabled()
        if learns:
            self.codebook.prepare(latents.detach(), valid)
        quantized = super()._quantize(latents, valid)
        if learns:
            self.codebook.gather(latents.detach(), quantized.codes[:, 0], valid)
            quantized.metrics["replaced"] = self.codebook.replaced.clone()
        return quantized


class KMeansQuantizer(EMAVectorQuantizer):
    """Mini-batch k-means of frozen features (Sculley, WWW 2010; HuBERT's units, arXiv 2106.07447).

    Use it with a frozen encoder: `training.freeze=[encoder,project_in]`. All tokens have equal weight (decay 1), and
    there is no penalty.

    Args:
        dim: Width of the features.
        codebook_size: Number of clusters.
        cosine: Normalize features and centroids to unit length (spherical k-means).
        revival: Fraction of uniform usage below which a cluster is replaced; 0: never.
    """

    def __init__(
        self, dim: int, codebook_size: int, cosine: bool = False, revival: Annotated[float, "[0, 1]"] = 0.03
    ) -> None:
        super().__init__(dim, codebook_size, 0.0, cosine, decay=1.0, revival=revival)


class SimVectorQuantizer(_Codebook):
    """Frozen random codebook under a learned linear map, which moves all entries (SimVQ, arXiv 2411.02038, section 3).

    Args: as `VectorQuantizer`.
    """

    basis: Tensor

    def __init__(self, dim: int, codebook_size: int, commitment: float = 0.25, rotation: bool = False) -> None:
        super().__init__(dim, codebook_size, False, rotation, _Weights(commitment, 0.0, 1.0))
        self.register_buffer("basis", torch.randn(codebook_size, dim) / math.sqrt(dim))
        self.map = nn.Linear(dim, dim, bias=False)

    def table(self) -> Tensor:
        """Return the entries `(K, d)`."""
        with torch.autocast(self.basis.device.type, enabled=False):
            return functional.linear(self.basis, self.map.weight.float())


class IndexVectorQuantizer(_Codebook):
    """Index backpropagation: every entry gets gradient, selected or not (IBQ, arXiv 2412.02692, section 3.2).

    The code is `argmax_k z.e_k`. Forward returns that entry; backward goes through the softmax over all entries, which
    is recomputed in blocks rather than kept. It is the straight-through gradient times the covariance of the entries by
    their softmax weights: the smaller the entries, the more the penalties outweigh the signal's loss.

    Args: as `VectorQuantizer`, and:
        codebook: Weight of the codebook loss `|sg(z) - e|^2`.
        double: Weight of the double quantization loss `|z - z_q|^2`, whose gradient also goes through the soft indices.
        spread: Standard deviation of the entries' values at the start; None: `1 / sqrt(dim)`, entries of about unit
            length.
    """

    def __init__(
        self,
        dim: int,
        codebook_size: int,
        commitment: float = 1.0,
        codebook: float = 0.25,
        double: float = 1.0,
        entropy: float = 0.05,
        temperature: Annotated[float, "(0, inf)"] = 1.0,
        spread: Annotated[float | None, "(0, inf)"] = None,
    ) -> None:
        super().__init__(dim, codebook_size, False, False, _Weights(commitment, entropy, temperature))
        self.pull = codebook
        self.both = double
        self.codebook = nn.Parameter(torch.randn(codebook_size, dim) * (spread or dim**-0.5))

    def table(self) -> Tensor:
        """Return the entries `(K, d)`."""
        return self.codebook.float()

    @torch.no_grad()
    def thaw(self, frozen: nn.Module) -> None:
        """Take over the entries; see `Bottleneck.thaw`."""
        self.codebook.copy_(frozen.get_buffer("table"))

    def _quantize(self, latents: Tensor, valid: Tensor) -> Quantized:
        codebook, weights = self.table(), self.weights
        codes = nearest(latents, codebook, inner=True)
        hard = functional.embedding(codes, codebook)
        soft = soft_entries(latents, codebook)
        # The selected entry gets a direct gradient too.
        quantized = straight_through(soft + hard, hard)
        parts = {
            "commitment": weights.commitment * (latents - hard.detach()).square(),
            "codebook": self.pull * (latents.detach() - hard).square(),
            "double": self.both * (latents - quantized).square(),
        }
        penalties = {name: masked_mean(part.mean(-1), valid) for name, part in parts.items()}
        metrics = {"distance": masked_mean((latents - hard).detach().square().mean(-1), valid)}
        if weights.entropy:
            entropies = codebook_entropies(latents, codebook, valid, weights.temperature, inner=True)
            penalty, entropy_metrics = entropies.penalize(weights.entropy)
            penalties |= penalty
            metrics |= entropy_metrics
        return Quantized(quantized, codes[:, None], penalties, metrics)

    def encode(self, latents: Tensor) -> Tensor:
        """Return the entry of the largest inner product; see `Bottleneck.encode`."""
        return nearest(latents.float(), self.table(), inner=True)[:, None]

    def frozen(self) -> nn.Module:
        """Return the export form; see `Bottleneck.frozen`."""
        return FrozenTable(self.table(), inner=True)


class MixtureVectorQuantizer(_Codebook):
    """Mixture of Gaussians around the entries, trained by likelihood (CLaM-TTS, arXiv 2404.02781, section 3.1).

    `loss = -log(1/K sum_k N(z; e_k, deviation^2 I)) / d`, the paper's variational bound when tight. Each entry's
    gradient is weighted by its posterior, so that none goes unused. The code is the most likely entry. A residual stack
    of these is the paper's probabilistic residual quantizer.

    Args:
        dim: Width of the latents.
        codebook_size: Entries of the codebook.
        likelihood: Weight of the loss.
        deviation: Initial standard deviation, learned and shared by all entries.
    """

    def __init__(
        self, dim: int, codebook_size: int, likelihood: float = 0.1, deviation: Annotated[float, "(0, inf)"] = 0.5
    ) -> None:
        super().__init__(dim, codebook_size, False, False, _Weights(0.0, 0.0, 1.0))
        self.likelihood = likelihood
        self.codebook = nn.Parameter(torch.randn(codebook_size, dim) * deviation)
        self.log_deviation = nn.Parameter(torch.tensor(math.log(deviation)))

    def table(self) -> Tensor:
        """Return the entries `(K, d)`."""
        return self.codebook.float()

    def _quantize(self, latents: Tensor, valid: Tensor) -> Quantized:
        codebook, deviation = self.table(), self.log_deviation.float().exp()
        found = lookup(latents, codebook.detach())
        likelihood = mixture_likelihood(torch.where(valid[..., None], latents, 0.0), codebook, deviation)
        penalties = {"likelihood": -self.likelihood * masked_mean(likelihood, valid)}
        metrics = {"distance": masked_mean(found.pull, valid), "deviation": deviation.detach()}
        return Quantized(found.latents, found.codes[:, None], penalties, metrics)
