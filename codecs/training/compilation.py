"""Compilation of a network's blocks by `torch.compile`."""

import torch._dynamo.config
from torch import nn

from .activation_checkpointing import blocks

__all__ = ["compile_blocks"]


def compile_blocks(part: nn.Module, mode: str = "default") -> None:
    """Compile each repeated block of a network by itself; one without such blocks, as a whole.

    Blocks of one kind share a graph, which is compiled once. A gradient is ready when the backward pass of its block
    ends, so that DDP averages it while that of the others runs; a network compiled as a whole gives all of them at its
    end.

    Args:
        part: Network whose blocks are compiled in place; names in state dicts stay.
        mode: Mode of `torch.compile`.
    """
    found = blocks(part) or [part]
    # All blocks are calls of one function of torch, `Module._call_impl`, whose graphs have this limit together.
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, 4 * len(found))
    for block in found:
        block.compile(mode=mode)
