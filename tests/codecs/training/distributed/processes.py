"""Processes that find each other as torchrun's do, for tests of runs on several."""

import os
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

__all__ = ["free_port", "in_processes"]


def free_port() -> str:
    """Return a port that no process listens on."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return str(free.getsockname()[1])


def in_processes(work: Callable[..., Any], folder: Path, *given: Any, count: int = 2, nodes: int = 1) -> list[Any]:
    """Run `work(rank, folder, *given)` in `count` processes, as on that many nodes; return what each returned."""
    mp.spawn(_run, (work, folder, given, count, nodes, free_port()), nprocs=count)
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(count)]


def _run(rank: int, work: Callable[..., Any], folder: Path, given: Any, count: int, nodes: int, port: str) -> None:
    torch.set_num_threads(1)
    each = count // nodes
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank % each), "GROUP_RANK": str(rank // each)}
    os.environ |= {"WORLD_SIZE": str(count), "LOCAL_WORLD_SIZE": str(each), "TORCHELASTIC_RUN_ID": "x"}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    torch.save(work(rank, folder, *given), folder / f"{rank}.pt")
    if count > 1:
        dist.barrier()  # the first process holds the store of all
