"""Perturbed codes: what a decoder meets when a generator errs, in training and in evaluation.

A generator over the codes makes mistakes; a decoder that has seen only the encoder's own codes turns them into
artifacts. RobustTok (arXiv 2503.08354, "latent perturbation") trains it on neighbors of the codes, and judges a
tokenizer by its quality under them.

What a neighbor is depends on the bottleneck. A codebook with a table has nearest entries, and that is the paper's
definition (`Nearest`). A grid, a stack or a product of codebooks has no such table, or one of 2^36 entries. What all
bottlenecks have is a way from latents to codes, so the general neighbor is the code of a latent nearby: noise is added
to the latents and they are quantized again (`Noise`). On a grid that is a step in a few dimensions; in a residual stack
mostly another entry of the late codebooks; where the bottleneck is continuous, noise.
"""

from abc import ABC, abstractmethod

import torch
from torch import Tensor, nn
from torch.nn import functional

from varitok import UserError

from ..masking import prefix_mask
from ..result import Quantized
from .contract import Bottleneck, straight_through

__all__ = ["Nearest", "Noise", "Perturbation", "add_noise", "codebook_table", "neighbors"]

BLOCK = 1 << 22  # distances made at a time


def codebook_table(bottleneck: Bottleneck) -> Tensor | None:
    """Return the entries `(K, d)` of a bottleneck that is one codebook of vectors, detached; else None."""
    table = getattr(bottleneck, "table", None)
    if table is None or len(bottleneck.codebook_sizes) != 1:
        return None
    entries: Tensor = table()
    return entries.detach()


def neighbors(codes: Tensor, table: Tensor, delta: int, chance: Tensor) -> Tensor:
    """Replace each code by one of the `delta` nearest to it in the table.

    Args:
        codes: int64 `(b, 1, n)`.
        table: `(K, d)`.
        delta: Number of candidates; all others if there are fewer.
        chance: Uniform in [0, 1), like `codes`; selects the candidate.

    Returns:
        int64, as `codes`; the codes themselves where the table has a single entry.
    """
    near = min(delta, len(table) - 1)
    if not near:
        return codes
    flat = codes.flatten()
    centered = table - table.mean(0)  # off center, the expansion of the square loses its digits
    squares = centered.square().sum(1)
    found = []
    rows = max(1, BLOCK // len(table))
    for part, ranks in zip(torch.split(flat, rows), torch.split(chance.flatten(), rows), strict=True):
        distances = torch.addmm(squares, centered[part], centered.T, alpha=-2)
        distances.scatter_(1, part[:, None], torch.inf)  # not itself
        candidates = distances.topk(near, 1, largest=False).indices
        # A product in float32 can round up to `near`.
        found.append(candidates.gather(1, (ranks * near).long().clamp(max=near - 1)[:, None])[:, 0])
    return torch.cat(found).view(codes.shape)


def add_noise(latents: Tensor, noise: Tensor, sigma: float, lengths: Tensor | None = None) -> Tensor:
    """Add noise to latents, in units of their own size.

    Args:
        latents: `(b, n, d)`.
        noise: Noise of unit variance, like `latents`.
        sigma: Noise in root mean squares of each sample's latents.
        lengths: int64 `(b,)`, valid tokens; all if None.

    Returns:
        float32, as `latents`.
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
    """Replaces tokens by neighbors in training, after the bottleneck's penalties and before the decoder.

    A share beta of a batch's samples is perturbed, and in these each valid token with probability alpha, which changes
    linearly between two points of the run. RobustTok takes the first tenth of the batch; here a random number of
    first samples, beta on average, so that it also holds for small batches. The gradient of replaced tokens
    goes to the bottleneck's own latents, straight through, and the reported codes are the true ones.

    All chance comes from torch's global generators, which the training keys by run, process and batch.

    Args:
        beta: Share of samples, in [0, 1].
        alpha_start: Share of their tokens at first, in [0, 1].
        alpha_end: And at last.
        begin: Progress of the run, in [0, 1], at which alpha starts to move.
        end: Progress at which it is there.

    Raises:
        UserError: A share is out of range, or `end` is before `begin`.
    """

    def __init__(self, beta: float, alpha_start: float, alpha_end: float, begin: float, end: float) -> None:
        super().__init__()
        if not all(0 <= share <= 1 for share in (beta, alpha_start, alpha_end, begin, end)) or begin > end:
            raise UserError(
                f"codec.perturbation: beta={beta}, alpha_start={alpha_start}, alpha_end={alpha_end}, begin={begin} and"
                f" end={end} must be in [0, 1], begin not above end"
            )
        self.beta = beta
        self.alpha_start, self.alpha_end = alpha_start, alpha_end
        self.begin, self.end = begin, end
        self.progress = 0.0  # of the run; the training sets it

    @property
    def alpha(self) -> float:
        """The share of a perturbed sample's tokens that is replaced at this progress."""
        way = (self.progress - self.begin) / (self.end - self.begin) if self.end > self.begin else 1.0
        if self.progress < self.begin:
            way = 0.0
        return self.alpha_start + (self.alpha_end - self.alpha_start) * min(max(way, 0.0), 1.0)

    @abstractmethod
    def check(self, bottleneck: Bottleneck) -> None:
        """Check that a bottleneck has such neighbors.

        Raises:
            UserError: It hasn't.
        """

    @abstractmethod
    def replacement(
        self, bottleneck: Bottleneck, latents: Tensor, codes: Tensor, lengths: Tensor, n_codebooks: Tensor
    ) -> Tensor:
        """Return the replacement of each token, `(b, n, d)` as the decoder gets it, without gradient."""

    def forward(
        self, bottleneck: Bottleneck, latents: Tensor, quantized: Quantized, lengths: Tensor, n_codebooks: Tensor
    ) -> Tensor:
        """Perturb what a bottleneck made.

        Args:
            bottleneck: What made it.
            latents: `(b, n, d)`, of what.
            quantized: What it made.
            lengths: int64 `(b,)`, tokens kept; the others stay as they are.
            n_codebooks: int64 `(b,)`, codebooks kept.

        Returns:
            `(b, n, d)`, for the decoder; `quantized.latents` itself in evaluation, and where no sample is drawn.
        """
        whole = quantized.latents
        # On the CPU, where the count is needed: no step waits for the device.
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
    """Takes one of the nearest entries of a single codebook (RobustTok, arXiv 2503.08354).

    The paper: a tenth of the samples, alpha from 1 to 0.5 between epochs 40 and 120 of 200, 100 entries.

    Args:
        delta: Number of nearest entries, without the token's own, from which the replacement is drawn.
        beta, alpha_start, alpha_end, begin, end: See `Perturbation`.

    Raises:
        UserError: A share is out of range, or delta is below 1.
    """

    def __init__(
        self,
        delta: int = 100,
        beta: float = 0.1,
        alpha_start: float = 1.0,
        alpha_end: float = 0.5,
        begin: float = 0.2,
        end: float = 0.6,
    ) -> None:
        super().__init__(beta, alpha_start, alpha_end, begin, end)
        if delta < 1:
            raise UserError(f"codec.perturbation.delta={delta}: must be at least 1")
        self.delta = delta

    def check(self, bottleneck: Bottleneck) -> None:
        """Check that the bottleneck is one codebook with a table; see `Perturbation.check`."""
        if codebook_table(bottleneck) is None:
            raise UserError(
                f"codec.perturbation: {type(bottleneck).__name__} is not one codebook of vectors and has no nearest"
                " entries; take codec/perturbation=noise"
            )

    def replacement(
        self, bottleneck: Bottleneck, latents: Tensor, codes: Tensor, lengths: Tensor, n_codebooks: Tensor
    ) -> Tensor:
        """Draw neighbors in the table; see `Perturbation.replacement`."""
        table = codebook_table(bottleneck)
        assert table is not None, "checked when the codec was made"
        chance = torch.rand(codes.shape, device=codes.device)
        return functional.embedding(neighbors(codes, table, self.delta, chance)[:, 0], table)


class Noise(Perturbation):
    """Quantizes the latents anew with noise on them: the neighbors of any bottleneck (ours; see above).

    It is the bottleneck's own forward that quantizes, without gradient: it keeps each sample's codebooks, and a forward
    without gradient leaves no trace in moving averages.

    Args:
        sigma: Noise in root mean squares of each sample's latents, above 0.
        beta, alpha_start, alpha_end, begin, end: See `Perturbation`.

    Raises:
        UserError: A share is out of range, or sigma is not above 0.
    """

    def __init__(
        self,
        sigma: float = 0.3,
        beta: float = 0.1,
        alpha_start: float = 1.0,
        alpha_end: float = 0.5,
        begin: float = 0.2,
        end: float = 0.6,
    ) -> None:
        super().__init__(beta, alpha_start, alpha_end, begin, end)
        if not sigma > 0:
            raise UserError(f"codec.perturbation.sigma={sigma}: must be above 0")
        self.sigma = sigma

    def check(self, bottleneck: Bottleneck) -> None:
        """Any bottleneck will do; see `Perturbation.check`."""

    def replacement(
        self, bottleneck: Bottleneck, latents: Tensor, codes: Tensor, lengths: Tensor, n_codebooks: Tensor
    ) -> Tensor:
        """Quantize again; see `Perturbation.replacement`."""
        noisy = add_noise(latents, torch.randn(latents.shape, device=latents.device), self.sigma, lengths)
        again: Quantized = bottleneck(noisy, lengths, n_codebooks)
        return again.latents
