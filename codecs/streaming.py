"""Networks that read or make a signal chunk by chunk, exactly as they do it whole.

A layer that looks back has a `slot`, its place in a list: the memory, which goes through a network beside the mask. It
takes from there what it kept of the chunks before, and puts there what the next one needs. To those outside, all of the
memory is one flat float32 tensor `(b, S)`, the state, whose zeros are the start: an exported graph takes it and gives
the next.
"""

import inspect
import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

from varitok import UserError

__all__ = ["arrange", "check_chunk", "obstacle", "pack", "state_size", "unpack"]


def obstacle(network: nn.Module) -> str:
    """Say in a few words why a network can't go chunk by chunk; nothing where it can.

    Layers tell it themselves, by an attribute `obstacle`; without one they are taken to look at each step by itself.
    """
    if "memory" not in inspect.signature(network.forward).parameters:
        return f"{type(network).__name__} has no memory"
    return next((found for module in network.modules() if (found := getattr(module, "obstacle", ""))), "")


def arrange(network: nn.Module, run: Callable[[list[Tensor]], object]) -> list[list[int]]:
    """Give each layer of a network that looks back its place in the memory, and find what lies there.

    Args:
        network: Whose modules with a `slot` get one, in the order in which they were registered.
        run: Sends a chunk of a batch of one through the network, with the memory that it is given.

    Returns:
        The shape in each place for a batch of one; empty where nothing is kept.
    """
    slots = 0
    for module in network.modules():
        if hasattr(module, "slot"):
            module.slot = slots  # type: ignore[assignment]
            slots += 1
    memory = [torch.zeros(0) for _ in range(slots)]
    with torch.no_grad():
        run(memory)
    return [list(kept.shape) if kept.numel() else [] for kept in memory]


def state_size(shapes: list[list[int]]) -> int:
    """Count the numbers of a sample's state, S."""
    return sum(math.prod(shape) for shape in shapes if shape)


def unpack(state: Tensor, shapes: list[list[int]]) -> list[Tensor]:
    """Turn a state `(b, S)` into a memory whose places have these shapes (see `arrange`); scriptable."""
    memory: list[Tensor] = []
    begin = 0
    for shape in shapes:
        if len(shape) == 0:
            memory.append(torch.zeros(0))
        else:
            size = 1
            for side in shape:
                size *= side
            memory.append(state[:, begin : begin + size].reshape([-1] + shape[1:]))  # noqa: RUF005 (TorchScript)
            begin += size
    return memory


def pack(memory: list[Tensor], shapes: list[list[int]], state: Tensor) -> Tensor:
    """Turn a memory into the state that comes after `state`; scriptable."""
    kept: list[Tensor] = []
    for index, shape in enumerate(shapes):
        if len(shape) > 0:
            kept.append(memory[index].to(state.dtype).reshape(state.shape[0], -1))
    return torch.cat(kept, dim=1) if len(kept) > 0 else state


def check_chunk(steps: int, whole: int, last: bool, what: str) -> None:
    """Refuse a chunk of no steps, and one that isn't the last and isn't made of wholes.

    Raises:
        UserError: So it is.
    """
    if not steps or (steps % whole and not last):
        raise UserError(f"a chunk of {steps} {what}: it should have a multiple of {whole}, if it isn't the last")
