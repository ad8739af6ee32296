"""Soft choices over all entries of a codebook, in blocks: no tensor of tokens x entries is kept for backward."""

import math
from collections.abc import Callable

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

__all__ = ["in_blocks", "mixture_likelihood", "scores", "soft_entries"]


def in_blocks(block: Callable[..., tuple[Tensor, ...]], rows: int, *tensors: Tensor) -> list[tuple[Tensor, ...]]:
    """Apply a function to blocks of rows; what it makes in between is made again for backward rather than kept.

    Args:
        block: Takes a block of each tensor.
        rows: In a block.
        tensors: Tensors of equal length.
    """
    parts = zip(*(torch.split(tensor, rows) for tensor in tensors), strict=True)
    if not torch.is_grad_enabled():
        return [block(*part) for part in parts]
    return [checkpoint(block, *part, use_reentrant=False, preserve_rng_state=False) for part in parts]


def block_rows(entries: int) -> int:
    """Count the rows of a block whose scores over a codebook take 16 MiB."""
    return max(64, (1 << 22) // entries)


def scores(rows: Tensor, codebook: Tensor, temperature: Tensor | float, inner: bool = False) -> Tensor:
    """Score `(n, d)` rows against entries `(K, d)`: minus the squared distance, or the inner product, over temperature.

    The row's own square is left out: it is the same for all entries.
    """
    if inner:
        return rows @ codebook.T / temperature
    return (rows @ codebook.T * 2 - codebook.square().sum(1)) / temperature


def soft_entries(latents: Tensor, codebook: Tensor) -> Tensor:
    """Average the entries, weighted by the softmax of their inner products with each latent.

    The gradient goes through the weights, to latents and entries, and not to the averaged entries.

    Args:
        latents: `(b, n, d)`.
        codebook: `(K, d)`.

    Returns:
        `(b, n, d)`.
    """

    def block(rows: Tensor) -> tuple[Tensor]:
        return (scores(rows, codebook, 1.0, inner=True).softmax(1) @ codebook.detach(),)

    parts = in_blocks(block, block_rows(len(codebook)), latents.flatten(0, 1))
    return torch.cat([part for (part,) in parts]).view(latents.shape)


def mixture_likelihood(latents: Tensor, codebook: Tensor, deviation: Tensor) -> Tensor:
    """Compute the log-density, in nats a dimension, of latents under equal Gaussians around the entries of a codebook.

    Args:
        latents: `(b, n, d)`.
        codebook: `(K, d)`.
        deviation: Standard deviation of all of them, a scalar.

    Returns:
        `(b, n)`.
    """
    variance = deviation.square()

    def block(rows: Tensor) -> tuple[Tensor]:
        nearness = scores(rows, codebook, 2 * variance) - rows.square().sum(1, keepdim=True) / (2 * variance)
        return (nearness.logsumexp(1),)

    parts = in_blocks(block, block_rows(len(codebook)), latents.flatten(0, 1))
    dim = latents.shape[-1]
    constant = -math.log(len(codebook)) - dim / 2 * torch.log(2 * math.pi * variance)
    return (torch.cat([part for (part,) in parts]).view(latents.shape[:-1]) + constant) / dim
