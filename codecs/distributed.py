"""Collectives over all ranks, which do nothing with a single process.

Every rank must call them, whatever its data. Gloo and NCCL return the same bits on every rank.
"""

import sys
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

__all__ = [
    "broadcast_from_rank_zero",
    "differentiable_mean_over_ranks",
    "exchange_rows",
    "full_tensor",
    "gather_rows",
    "gather_rows_with_gradient",
    "gather_stacked",
    "local_tensor",
    "mean_over_ranks",
    "rank",
    "sum_over_ranks",
    "world_size",
]


def world_size() -> int:
    """Return the number of ranks."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    """Return this process's rank."""
    return dist.get_rank() if world_size() > 1 else 0


def mean_over_ranks(values: Tensor) -> Tensor:
    """Average a detached tensor over all ranks."""
    if world_size() == 1:
        return values
    values = values.clone()
    dist.all_reduce(values)
    return values / world_size()


class _Average(torch.autograd.Function):
    @staticmethod
    def forward(values: Tensor) -> Tensor:
        return mean_over_ranks(values)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor], output: Tensor) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return gradient


def differentiable_mean_over_ranks(values: Tensor) -> Tensor:
    """Average over all ranks, with the correct gradient under DistributedDataParallel.

    Each rank computes the same function of the average, so that its gradient is the same on all ranks. It is passed
    unscaled to each rank's values; DDP's mean over ranks then yields the gradient of the global batch. An all-reduce
    with a stopped gradient (or one scaled by 1 / ranks again) would weaken the term as ranks are added.
    """
    return values if world_size() == 1 else _Average.apply(values)


def broadcast_from_rank_zero(values: Tensor) -> Tensor:
    """Return rank 0's values on every rank."""
    if world_size() > 1:
        values = values.contiguous()
        dist.broadcast(values, 0)
    return values


def sum_over_ranks(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Sum each of several tensors of equal dtype over all ranks, in a single collective."""
    if world_size() == 1 or not tensors:
        return list(tensors)
    flat = torch.cat([tensor.flatten() for tensor in tensors])
    dist.all_reduce(flat)
    parts = torch.split(flat, [tensor.numel() for tensor in tensors])
    return [part.view(tensor.shape) for part, tensor in zip(parts, tensors, strict=True)]


def gather_stacked(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Stack each of several tensors of all ranks, `(ranks, *shape)`, in one collective; shapes are equal on all."""
    if world_size() == 1 or not tensors:
        return [tensor[None] for tensor in tensors]
    flat = torch.cat([tensor.flatten() for tensor in tensors])
    every = [torch.empty_like(flat) for _ in range(world_size())]
    dist.all_gather(every, flat)
    parts = torch.split(torch.stack(every), [tensor.numel() for tensor in tensors], 1)
    return [part.view(-1, *tensor.shape) for part, tensor in zip(parts, tensors, strict=True)]


def gather_rows(rows: Tensor) -> Tensor:
    """Concatenate `(r, d)` of all ranks in their order; r may differ between ranks, and be 0."""
    if world_size() == 1:
        return rows
    sizes = torch.zeros(world_size(), dtype=torch.int64, device=rows.device)
    sizes[dist.get_rank()] = len(rows)
    dist.all_reduce(sizes)
    padded = rows.new_zeros(int(sizes.max()), rows.shape[1])
    padded[: len(rows)] = rows
    parts = [torch.empty_like(padded) for _ in sizes]
    dist.all_gather(parts, padded)
    return torch.cat([part[:size] for part, size in zip(parts, sizes.tolist(), strict=True)])


def exchange_rows(rows: Tensor, owners: Tensor) -> Tensor:
    """Send each of the rows `(r, d)` to its owner, a rank; return this rank's rows, in the order of their senders.

    Args:
        rows: Rows; r may differ between ranks, and be 0.
        owners: int64 `(r,)`.
    """
    if world_size() == 1:
        return rows
    order = owners.argsort(stable=True)
    sent = torch.bincount(owners, minlength=world_size())
    received = torch.empty_like(sent)
    dist.all_to_all_single(received, sent)
    found = rows.new_empty(int(received.sum()), rows.shape[1])
    dist.all_to_all_single(found, rows[order], received.tolist(), sent.tolist())
    return found


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(rows: Tensor) -> tuple[Tensor, Tensor]:
        ranks = torch.full((len(rows), 1), float(dist.get_rank()), device=rows.device)
        return gather_rows(rows), gather_rows(ranks)[:, 0] == dist.get_rank()

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor], output: tuple[Tensor, Tensor]) -> None:
        ctx.save_for_backward(output[1])

    @staticmethod
    def backward(ctx: Any, gradient: Tensor, _: Tensor) -> Tensor:
        (mine,) = ctx.saved_tensors
        return gradient[mine] * world_size()


def gather_rows_with_gradient(rows: Tensor) -> Tensor:
    """Concatenate rows as `gather_rows` does, with the correct gradient under DistributedDataParallel.

    Each rank computes the same loss of all rows. Its own rows get their gradient times the number of ranks, so that
    DDP's mean is the gradient of the global batch.
    """
    return rows if world_size() == 1 else _Gather.apply(rows)[0]


def full_tensor(values: Tensor) -> Tensor:
    """Gather the shards of a DTensor; other tensors are returned unchanged."""
    return values.full_tensor() if _is_sharded(values) else values  # type: ignore[attr-defined]


def local_tensor(values: Tensor) -> Tensor:
    """Return this rank's shard of a DTensor, sharing its memory; other tensors are returned unchanged."""
    return values.to_local() if _is_sharded(values) else values  # type: ignore[attr-defined]


def _is_sharded(values: Tensor) -> bool:
    """Return whether a tensor is a DTensor. A process that has one has imported the module, which is slow to import."""
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(values, module.DTensor)
