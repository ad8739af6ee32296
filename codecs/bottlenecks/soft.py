"""Softmax over all entries of a codebook in blocks, without keeping a tensor of tokens x entries for backward."""

import math
from collections.abc import Callable

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

__all__ = ["in_blocks", "mixture_likelihood", "scores", "soft_entries"]


def in_blocks(
    block: Callable[..., tuple[Tensor, ...]], columns: int, *tensors: Tensor, numbers: int = 1 << 22, least: int = 64
) -> list[tuple[Tensor, ...]]:
    """Apply a function to blocks of rows, with activation checkpointing: backward recomputes intermediate tensors.

    A block has as many rows as fit a CPU's cache, 16 MiB by default, and 512 MiB on a GPU, which needs large products.
    Where a single block is below 4 MiB, nothing is recomputed.

    Args:
        block: Function of a block of each tensor.
        columns: Numbers that the function computes for a row.
        tensors: Tensors of equal length, split along their first axis.
        numbers: Numbers of a block on a CPU.
        least: Rows of a block at least.
    """
    rows = max(least, (numbers if tensors[0].device.type == "cpu" else 1 << 27) // columns)
    parts = list(zip(*(torch.split(tensor, rows) for tensor in tensors), strict=True))
    if not torch.is_grad_enabled() or len(tensors[0]) <= min(rows, (1 << 20) // columns):
        return [block(*part) for part in parts]
    return [checkpoint(block, *part, use_reentrant=False, preserve_rng_state=False) for part in parts]


def scores(rows: Tensor, codebook: Tensor, temperature: Tensor | float, inner: bool = False) -> Tensor:
    """Return scores `(n, K)` of rows `(n, d)` and entries `(K, d)`, without the row's own square, a constant.

    `scores = (2 z.e - |e|^2) / temperature`, or `z.e / temperature` if `inner`.
    """
    if inner:
        return rows @ codebook.T / temperature
    return (rows @ codebook.T * 2 - codebook.square().sum(1)) / temperature


def soft_entries(latents: Tensor, codebook: Tensor) -> Tensor:
    """Average the entries with softmax weights: `sum_k softmax_k(z.e_k) sg(e_k)`.

    The gradient flows through the weights to latents and entries, but not to the averaged entries.

    Args:
        latents: `(b, n, d)`.
        codebook: `(K, d)`.

    Returns:
        `(b, n, d)`.
    """

    def block(rows: Tensor) -> tuple[Tensor]:
        return (scores(rows, codebook, 1.0, inner=True).softmax(1) @ codebook.detach(),)

    parts = in_blocks(block, len(codebook), latents.flatten(0, 1))  # (b, n, d) -> (b * n, d)
    return torch.cat([part for (part,) in parts]).view(latents.shape)  # (b * n, d) -> (b, n, d)


def mixture_likelihood(latents: Tensor, codebook: Tensor, deviation: Tensor) -> Tensor:
    """Compute the log-likelihood of latents, in nats per dimension, under a mixture of Gaussians.

    `log(1/K sum_k N(z; e_k, deviation^2 I)) / d`.

    Args:
        latents: `(b, n, d)`.
        codebook: `(K, d)`, the means.
        deviation: Standard deviation of every component, a scalar.

    Returns:
        `(b, n)`.
    """
    variance = deviation.square()

    def block(rows: Tensor) -> tuple[Tensor]:
        nearness = scores(rows, codebook, 2 * variance) - rows.square().sum(1, keepdim=True) / (2 * variance)
        return (nearness.logsumexp(1),)

    parts = in_blocks(block, len(codebook), latents.flatten(0, 1))  # (b, n, d) -> (b * n, d)
    dim = latents.shape[-1]
    constant = -math.log(len(codebook)) - dim / 2 * torch.log(2 * math.pi * variance)
    return (torch.cat([part for (part,) in parts]).view(latents.shape[:-1]) + constant) / dim
