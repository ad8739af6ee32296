"""Activation checkpointing: activations are recomputed in the backward pass, to save memory."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

__all__ = ["ActivationCheckpointing", "blocks"]


def blocks(part: nn.Module) -> list[nn.Module]:
    """List a network's repeated blocks: items of its innermost module lists with more than one parametrized layer."""
    found = [block for child in part.children() for block in blocks(child)]
    if not found and isinstance(part, nn.ModuleList | nn.Sequential):
        found = [child for child in part if sum(bool(layer._parameters) for layer in child.modules()) > 1]
    return found


class ActivationCheckpointing:
    """A context manager that stores only each block's input for the backward pass (arXiv 1604.06174).

    All other activations are recomputed there with the same random numbers, so losses and gradients are identical to
    the bit. Outside the context, in evaluation and export, networks run unchanged.

    Args:
        parts: Networks to checkpoint; one without repeated blocks counts as one block.
    """

    def __init__(self, parts: Sequence[nn.Module]) -> None:
        found = [block for part in parts for block in blocks(part) or [part]]
        # Built once: torch.compile would recompile for each new function, and fall back to eager at its limit.
        self.forgetful = {block: partial(_checkpoint_block, block.forward) for block in found}

    def __enter__(self) -> None:
        """Replace each block's `forward` by its checkpointed version."""
        for block, forward in self.forgetful.items():
            block.forward = forward

    def __exit__(self, *_: object) -> None:
        """Restore each block's `forward`."""
        for block in self.forgetful:
            del block.forward


def _checkpoint_block(forward: Callable[..., Any], *given: Any, **named: Any) -> Any:
    if not torch.is_grad_enabled():
        return forward(*given, **named)
    return checkpoint(forward, *given, use_reentrant=False, **named)
