"""Latent perturbation: decode perturbed codes in training and evaluation, for robustness to a generator's errors.

A decoder trained only on the encoder's codes turns a generator's errors into artifacts. RobustTok (arXiv 2503.08354)
trains the decoder on neighbors of the codes, and evaluates tokenizers under such perturbations.

`Nearest` follows the paper: a neighbor is one of the nearest entries in the codebook. Grids, residual stacks and
products of codebooks have no such table, or one of up to 2^36 entries. `Noise` works for any bottleneck: it adds noise
to the latents and quantizes them again. On a grid this changes a few dimensions by a step; in a residual stack mostly
the codes of late codebooks.
"""

from abc import ABC, abstractmethod
from typing import Annotated, TypeAlias

import torch
from torch import Tensor, nn
from torch.nn import functional

from varitok import UserError

from ..masking import prefix_mask
from ..result import Quantized
from .contract import Bottleneck, straight_through

__all__ = ["Nearest", "Noise", "Perturbation", "add_noise", "codebook_table", "neighbors"]

BLOCK = 1 << 22  # distances per block
Share: TypeAlias = Annotated[float, "[0, 1]"]


def codebook_table(bottleneck: Bottleneck) -> Tensor | None:
    """Return the entries `(K, d)` of a bottleneck of one codebook of vectors, detached; None for others."""
    table = getattr(bottleneck, "table", None)
    if table is None or len(bottleneck.codebook_sizes) != 1:
        return None
    entries: Tensor = table()
    return entries.detach()


def neighbors(codes: Tensor, table: Tensor, delta: int, chance: Tensor) -> Tensor:
    """Replace each code by one of the `delta` nearest other entries.

    Args:
        codes: int64 `(b, 1, n)`.
        table: Entries `(K, d)`.
        delta: Number of candidates, at most K - 1.
        chance: Random numbers, uniform in [0, 1), in the shape of `codes`, that select a candidate.

    Returns:
        int64 `(b, 1, n)`; `codes` itself if K is 1.
    """
    near = min(delta, len(table) - 1)
    if not near:
        return codes
    flat = codes.flatten()  # (b, 1, n) -> (b * n)
    centered = table - table.mean(0)  # without it, the expansion of the squared distance loses precision
    squares = centered.square().sum(1)
    found = []
    rows = max(1, BLOCK // len(table))
    for part, ranks in zip(torch.split(flat, rows), torch.split(chance.flatten(), rows), strict=True):
        distances = torch.addmm(squares, centered[part], centered.T, alpha=-2)
        distances.scatter_(1, part[:, None], torch.inf)  # exclude the code itself
        candidates = distances.topk(near, 1, largest=False).indices
        # The float32 product can round up to `near`.
        found.append(candidates.gather(1, (ranks * near).long().clamp(max=near - 1)[:, None])[:, 0])
    return torch.cat(found).view(codes.shape)  # (b * n) -> (b, 1, n)


def add_noise(latents: Tensor, noise: Tensor, sigma: float, lengths: Tensor | None = None) -> Tensor:
    """Return `z + sigma * RMS(z) * noise`, with the root mean square of each sample's latents.

    Args:
        latents: z, `(b, n, d)`.
        noise: Noise of unit variance, `(b, n, d)`.
        sigma: Standard deviation of the noise relative to the latents' root mean square.
        lengths: int64 `(b,)`, valid tokens; all if None.

    Returns:
        float32 `(b, n, d)`.
    """
    latents = latents.detach().float()
    power = latents.square().mean(2)
    if lengths is not None:
        power = torch.where(prefix_mask(lengths, latents.shape[1]), power, 0.0)
        size = (power.sum(1) / lengths.clamp(min=1)).sqrt()
    else:
        size = power.mean(1).sqrt()
    return latents + noise * (sigma * size)[:, None, None]


class Perturbation(nn.Module, ABC):
    """Base of perturbations that replace quantized latents by neighbors in training, before the decoder.

    A fraction beta of a batch's samples is perturbed, and each of their valid tokens with probability alpha. Alpha
    changes linearly from `alpha_start` to `alpha_end` between two points of the run. RobustTok perturbs the first tenth
    of the batch; here the number of samples is random with mean beta, which suits small batches too. The gradient
    passes straight through to the unperturbed latents. Penalties and returned codes are unperturbed.

    Random numbers come from torch's global generators, which training seeds by run, rank and batch.

    Args:
        beta: Fraction of samples, in [0, 1].
        alpha_start: Initial fraction of their tokens, in [0, 1].
        alpha_end: Final fraction of their tokens, in [0, 1].
        begin: Progress of the run, in [0, 1], until which alpha is `alpha_start`.
        end: Progress of the run, in [0, 1], from which alpha is `alpha_end`.

    Raises:
        UserError: `end` is below `begin`.
    """

    def __init__(self, beta: float, alpha_start: float, alpha_end: float, begin: float, end: float) -> None:
        super().__init__()
        if begin > end:
            raise UserError(f"codec.perturbation.begin={begin}: must be at most codec.perturbation.end={end}")
        self.beta = beta
        self.alpha_start, self.alpha_end = alpha_start, alpha_end
        self.begin, self.end = begin, end
        self.progress = 0.0  # of the run, in [0, 1]; set by training

    @property
    def alpha(self) -> float:
        """Return the probability of replacing a token of a perturbed sample at this progress."""
        way = (self.progress - self.begin) / (self.end - self.begin) if self.end > self.begin else 1.0
        if self.progress < self.begin:
            way = 0.0
        return self.alpha_start + (self.alpha_end - self.alpha_start) * min(max(way, 0.0), 1.0)

    @abstractmethod
    def check(self, bottleneck: Bottleneck) -> None:
        """Check that this perturbation applies to a bottleneck.

        Raises:
            UserError: It doesn't.
        """

    @abstractmethod
    def replacement(
        self, bottleneck: Bottleneck, latents: Tensor, codes: Tensor, lengths: Tensor, n_codebooks: Tensor
    ) -> Tensor:
        """Return a replacement of each quantized latent, `(b, n, d)`, without gradient."""

    def forward(
        self, bottleneck: Bottleneck, latents: Tensor, quantized: Quantized, lengths: Tensor, n_codebooks: Tensor
    ) -> Tensor:
        """Perturb quantized latents.

        Args:
            bottleneck: The bottleneck.
            latents: Its input, `(b, n, d)`.
            quantized: Its result.
            lengths: int64 `(b,)`, tokens kept; the others stay unperturbed.
            n_codebooks: int64 `(b,)`, codebooks kept.

        Returns:
            The decoder's input, `(b, n, d)`; `quantized.latents` itself in evaluation, or if no sample is drawn.
        """
        whole = quantized.latents
        # Drawn on the CPU, which needs the count: no synchronization with the device.
        samples = min(len(whole), int(self.beta * len(whole) + float(torch.rand(()))))
        if not self.training or not samples:
            return whole
        first = slice(0, samples)
        with torch.no_grad():
            chosen = torch.rand(whole[first].shape[:2], device=whole.device) < self.alpha
            chosen &= prefix_mask(lengths[first], whole.shape[1])
            other = self.replacement(
                bottleneck, latents[first], quantized.codes[first], lengths[first], n_codebooks[first]
            ).to(whole.dtype)
            put = torch.cat([torch.where(chosen[..., None], other, whole[first]), whole[samples:]])
        return straight_through(whole, put)


class Nearest(Perturbation):
    """Perturbation by one of the nearest entries in a single codebook (RobustTok, arXiv 2503.08354).

    The defaults are the paper's: 10 % of samples, alpha from 1 to 0.5 between epochs 40 and 120 of 200, 100 entries.

    Args:
        delta: Number of nearest other entries from which the replacement is drawn.
        beta, alpha_start, alpha_end, begin, end: See `Perturbation`.

    Raises:
        UserError: `end` is below `begin`.
    """

    def __init__(
        self,
        delta: int = 100,
        beta: Share = 0.1,
        alpha_start: Share = 1.0,
        alpha_end: Share = 0.5,
        begin: Share = 0.2,
        end: Share = 0.6,
    ) -> None:
        super().__init__(beta, alpha_start, alpha_end, begin, end)
        self.delta = delta

    def check(self, bottleneck: Bottleneck) -> None:
        """Check that the bottleneck is a single codebook of vectors; see `Perturbation.check`."""
        if codebook_table(bottleneck) is None:
            raise UserError(
                f"codec.perturbation: {type(bottleneck).__name__} is not one codebook of vectors and has no nearest"
                " entries; take codec/perturbation=noise"
            )

    def replacement(
        self, bottleneck: Bottleneck, latents: Tensor, codes: Tensor, lengths: Tensor, n_codebooks: Tensor
    ) -> Tensor:
        """Sample one of the nearest entries; see `Perturbation.replacement`."""
        table = codebook_table(bottleneck)
        assert table is not None, "checked when the codec was made"
        chance = torch.rand(codes.shape, device=codes.device)
        return functional.embedding(neighbors(codes, table, self.delta, chance)[:, 0], table)


class Noise(Perturbation):
    """Perturbation of any bottleneck by Gaussian noise on the latents (ours; see the module docstring).

    The bottleneck's forward quantizes the noisy latents without gradient: it keeps each sample's codebooks, and gathers
    no EMA statistics.

    Args:
        sigma: Standard deviation of the noise relative to each sample's root mean square, above 0.
        beta, alpha_start, alpha_end, begin, end: See `Perturbation`.

    Raises:
        UserError: `end` is below `begin`.
    """

    def __init__(
        self,
        sigma: Annotated[float, "(0, inf)"] = 0.3,
        beta: Share = 0.1,
        alpha_start: Share = 1.0,
        alpha_end: Share = 0.5,
        begin: Share = 0.2,
        end: Share = 0.6,
    ) -> None:
        super().__init__(beta, alpha_start, alpha_end, begin, end)
        self.sigma = sigma

    def check(self, bottleneck: Bottleneck) -> None:
        """Accept any bottleneck; see `Perturbation.check`."""

    def replacement(
        self, bottleneck: Bottleneck, latents: Tensor, codes: Tensor, lengths: Tensor, n_codebooks: Tensor
    ) -> Tensor:
        """Quantize noisy latents; see `Perturbation.replacement`."""
        noisy = add_noise(latents, torch.randn(latents.shape, device=latents.device), self.sigma, lengths)
        again: Quantized = bottleneck(noisy, lengths, n_codebooks)
        return again.latents
