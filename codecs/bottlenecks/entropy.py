"""Entropies of soft code assignments, whose penalty keeps a codebook in use.

The assignment of a token is `p = softmax(score / temperature)` over the entries. *Confidence* `E[H(p)]` is to be low;
*diversity* `H(E[p])`, over all valid tokens of the global batch, is to be high (LFQ, arXiv 2310.05737, section 3.1,
equation 5).
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from varitok import UserError

from ..distributed import differentiable_mean_over_ranks
from ..masking import masked_mean
from .soft import in_blocks, scores

__all__ = ["Entropies", "codebook_entropies", "entropy_groups", "grid_entropies"]

LARGEST = 1 << 20  # codes per group: the mean assignment is a tensor of that size


class Entropies(NamedTuple):
    """Scalars in nats, with gradient: confidence is averaged over this rank, diversity over the global batch.

    A sample without a valid token (it dropped this codebook) lowers both by its share of the batch.
    """

    confidence: Tensor
    diversity: Tensor

    def penalize(self, weight: float | Tensor, diversity: float = 1.0) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Return the loss `weight * (confidence - diversity * self.diversity)` and the metrics, each by name."""
        metrics = {"confidence": self.confidence.detach(), "diversity": self.diversity.detach()}
        return {"entropy": weight * (self.confidence - diversity * self.diversity)}, metrics


def entropy_groups(levels: Sequence[int], width: int, where: str) -> list[slice]:
    """Split the dimensions of a grid into groups whose joint entropies are computed.

    Args:
        levels: Levels of each dimension.
        width: Dimensions per group; 0: all in one group. 1 treats dimensions as independent (BSQ's equation 8, arXiv
            2406.07548, section 3.2).
        where: Configuration key that an error names.

    Raises:
        UserError: A group has more than 2^20 codes.
    """
    width = width or len(levels)
    groups = [slice(start, min(start + width, len(levels))) for start in range(0, len(levels), width)]
    largest = max(math.prod(levels[group]) for group in groups)
    if largest > LARGEST:
        raise UserError(
            f"{where}: a group of {largest} codes is too large for an entropy; take fewer dimensions to a group"
        )
    return groups


def _entropy(shares: Tensor) -> Tensor:
    return -torch.xlogy(shares, shares.clamp(min=torch.finfo(shares.dtype).tiny)).sum(-1)


def _weights(valid: Tensor) -> Tensor:
    """Return weights of tokens that sum to 1 per sample, as in `masked_mean`."""
    return valid / valid.sum(1, keepdim=True).clamp(min=1)


def _diversity(sums: Sequence[Tensor], valid: Tensor) -> Tensor:
    """Sum the entropies of mean assignments, given this rank's weighted sums of assignments."""
    samples = valid.any(1).sum().to(sums[0].dtype)
    flat = torch.cat([*(part.flatten() for part in sums), samples[None]])
    # Without gradient there is no collective: rank 0 alone may be running, to log reconstructions.
    flat = differentiable_mean_over_ranks(flat) if torch.is_grad_enabled() else flat
    *parts, count = torch.split(flat, [*(part.numel() for part in sums), 1])
    total = flat.new_zeros(())
    for part in parts:
        total = total + _entropy(part / count.clamp(min=1e-6))
    return total * count[0].detach() / len(valid)


def grid_entropies(choices: Sequence[Tensor], valid: Tensor, groups: Sequence[slice]) -> Entropies:
    """Compute the exact entropies of soft assignments to a product grid, without a tensor of tokens x codes.

    The softmax over a grid factorizes into one softmax per dimension, so that a token's entropy is a sum over
    dimensions. The mean assignment of a group of dimensions, split in halves A and B, is `A^T B / N`.

    Args:
        choices: Log-probabilities of each dimension's levels, `(b, n, levels)`.
        valid: bool `(b, n)`.
        groups: Groups of dimensions from `entropy_groups`; their entropies are summed.
    """
    confidence = sum(-(choice.exp() * choice).sum(-1) for choice in choices)
    assert isinstance(confidence, Tensor)
    weights = _weights(valid).flatten()  # (b, n) -> (b * n)
    rows = [choice.flatten(0, 1) for choice in choices]  # (b, n, levels) -> (b * n, levels)
    sums = []
    for group in groups:
        members = rows[group]
        half = _half([member.shape[1] for member in members])

        def block(weight: Tensor, *members: Tensor, half: int = half) -> tuple[Tensor]:
            first, second = _joint(members[:half], weight), _joint(members[half:], weight)
            return (((first * weight[:, None]).T @ second),)

        size = math.prod(member.shape[1] for member in members[half:])
        parts = in_blocks(block, size, weights, *members, numbers=1 << 20, least=256)
        sums.append(torch.stack([part for (part,) in parts]).sum(0))
    return Entropies(masked_mean(confidence, valid), _diversity(sums, valid))


def _half(sizes: Sequence[int]) -> int:
    """Return where to split a group so that its halves have about equally many codes."""
    return min(range(len(sizes) + 1), key=lambda cut: math.prod(sizes[:cut]) + math.prod(sizes[cut:]))


def _joint(members: Sequence[Tensor], like: Tensor) -> Tensor:
    """Combine log-probabilities of dimensions, `(n, levels)`, to probabilities of their grid, `(n, codes)`."""
    joint = torch.zeros_like(like)[:, None]
    for member in members:
        joint = (joint[:, :, None] + member[:, None, :]).flatten(1)  # (n, codes, levels) -> (n, codes * levels)
    return joint.exp()


def codebook_entropies(
    latents: Tensor, codebook: Tensor, valid: Tensor, temperature: float, inner: bool = False
) -> Entropies:
    """Compute the entropies of soft assignments to a codebook of vectors.

    Args:
        latents: `(b, n, d)`.
        codebook: `(K, d)`.
        valid: bool `(b, n)`.
        temperature: Softmax temperature of negative squared distances, in units of squared latent distance.
        inner: Score by inner product instead.
    """

    def block(weight: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
        choice = scores(rows, codebook, temperature, inner).log_softmax(1)
        shares = choice.exp()
        return -(shares * choice).sum(1), weight @ shares

    weights = _weights(valid).flatten()  # (b, n) -> (b * n)
    # Padding may contain anything, and 0 times infinity is NaN.
    rows = torch.where(valid[..., None], latents, 0.0).flatten(0, 1)  # (b, n, d) -> (b * n, d)
    parts = in_blocks(block, len(codebook), weights, rows)
    confidence = torch.cat([part for part, _ in parts]).view(valid.shape)  # (b * n) -> (b, n)
    total = torch.stack([part for _, part in parts]).sum(0)
    return Entropies(masked_mean(confidence, valid), _diversity([total], valid))
