"""Less memory for more time: activations that are made again on the way back."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

__all__ = ["ActivationCheckpointing", "blocks"]


def blocks(part: nn.Module) -> list[nn.Module]:
    """List a network's repeated blocks: the items of its innermost lists that have layers of their own."""
    found = [block for child in part.children() for block in blocks(child)]
    if not found and isinstance(part, nn.ModuleList | nn.Sequential):
        found = [child for child in part if sum(bool(layer._parameters) for layer in child.modules()) > 1]
    return found


class ActivationCheckpointing:
    """Keeps, while it is entered, only what goes into each block of some networks (arXiv 1604.06174).

    The rest is computed once more in the backward pass, with the same random numbers: losses and gradients are the
    same to the bit. Outside of it, in evaluation and export, networks are as they were built.

    Args:
        parts: The networks; one without blocks is a block.
    """

    def __init__(self, parts: Sequence[nn.Module]) -> None:
        found = [block for part in parts for block in blocks(part) or [part]]
        # Made once: torch.compile would take each new one for another network, and give up after a few.
        self.forgetful = {block: partial(_checkpoint_block, block.forward) for block in found}

    def __enter__(self) -> None:
        """Let blocks forget."""
        for block, forward in self.forgetful.items():
            block.forward = forward

    def __exit__(self, *_: object) -> None:
        """Leave them as they were."""
        for block in self.forgetful:
            del block.forward


def _checkpoint_block(forward: Callable[..., Any], *given: Any, **named: Any) -> Any:
    if not torch.is_grad_enabled():
        return forward(*given, **named)
    return checkpoint(forward, *given, use_reentrant=False, **named)
