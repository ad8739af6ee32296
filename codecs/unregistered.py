"""Frozen networks outside the module tree."""

from collections.abc import Callable, Mapping
from typing import Any

from torch import nn

__all__ = ["FrozenModules"]


class FrozenModules(nn.Module):
    """Container of frozen networks that are not submodules.

    They are neither trained, checkpointed, averaged, synchronized between ranks nor set to training mode, but `to(...)`
    moves them.

    Args:
        networks: The networks, by name.
    """

    def __init__(self, networks: Mapping[str, Any]) -> None:
        super().__init__()
        self.networks = {name: network.eval().requires_grad_(False) for name, network in networks.items()}

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> "FrozenModules":
        for network in self.networks.values():
            network._apply(fn)
        return super()._apply(fn, recurse)  # type: ignore[no-untyped-call, no-any-return]
