"""Numbers shared between processes; with one process everything stays as it is.

What is here is a collective: every process must call it, whatever its data. Gloo and NCCL give every process the same
bits.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor

__all__ = [
    "broadcast_from_rank_zero",
    "differentiable_mean_over_ranks",
    "full_tensor",
    "gather_rows",
    "gather_rows_with_gradient",
    "local_tensor",
    "mean_over_ranks",
    "sum_over_ranks",
    "world_size",
]


def world_size() -> int:
    """Count the processes of the run."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def mean_over_ranks(values: Tensor) -> Tensor:
    """Average a detached tensor over all processes."""
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
    """Average over all processes, with the gradient that is right under DistributedDataParallel.

    Each process computes the same function of the average, so the gradient at the average is the same everywhere, and
    is handed to the process's own values as it is. DDP's mean over processes then makes it that of the global batch.
    An all-reduce whose gradient is cut (or scaled by 1 / processes again) weakens the term as processes are added.
    """
    return values if world_size() == 1 else _Average.apply(values)


def broadcast_from_rank_zero(values: Tensor) -> Tensor:
    """Return the first process's values on every process."""
    if world_size() > 1:
        values = values.contiguous()
        dist.broadcast(values, 0)
    return values


def sum_over_ranks(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Sum each of several tensors of one type over all processes, in a single collective."""
    if world_size() == 1 or not tensors:
        return list(tensors)
    flat = torch.cat([tensor.flatten() for tensor in tensors])
    dist.all_reduce(flat)
    parts = torch.split(flat, [tensor.numel() for tensor in tensors])
    return [part.view(tensor.shape) for part, tensor in zip(parts, tensors, strict=True)]


def gather_rows(rows: Tensor) -> Tensor:
    """Concatenate `(r, d)` of all processes in the order of their ranks; r may differ, and be 0."""
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
    """Concatenate rows as `gather_rows` does, with the gradient that is right under DistributedDataParallel.

    Each process computes the same loss of all rows. It returns the gradient of its own rows times the number of
    processes, so that DDP's mean is the gradient of the global batch.
    """
    return rows if world_size() == 1 else _Gather.apply(rows)[0]


def full_tensor(values: Tensor) -> Tensor:
    """Bring a tensor's shards together; one that isn't sharded stays as it is."""
    return values.full_tensor() if isinstance(values, DTensor) else values


def local_tensor(values: Tensor) -> Tensor:
    """Return this process's part of a sharded tensor, sharing its memory; all of any other tensor."""
    return values.to_local() if isinstance(values, DTensor) else values
