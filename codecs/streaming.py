"""Networks that read or make a signal chunk by chunk, exactly as they do it whole.

A layer that looks back has a `slot`, its place in a list: the memory, which goes through a network beside the mask. It
takes from there what it kept of the chunks before, and puts there what the next one needs. To those outside, all of the
memory is one flat float32 tensor `(b, S)`, the state, whose zeros are the start: an exported graph takes it and gives
the next.
"""

import inspect
from collections.abc import Callable

import torch
from torch import Tensor, nn

from varitok import UserError

__all__ = ["arrange", "arrange_frames", "at_grid", "check_chunk", "obstacle", "pack", "state_size", "unpack"]


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


def arrange_frames(network: nn.Module, run: Callable[[list[Tensor], int, int], object]) -> list[list[int]]:
    """Do the same for a network of frames, whose memory grows with them; `at_grid` makes shapes of what this gives.

    Args:
        network: As in `arrange`.
        run: Sends a chunk of frames through the network, of so many rows and columns of latents.

    Returns:
        For each place three numbers for each of its axes: the steps of one latent, and whether (1) or not (0) there
        are as many for each row and for each column of the latents' grid.
    """
    one, taller, wider = (
        arrange(network, lambda memory, size=size: run(memory, *size))  # type: ignore[misc]
        for size in ((1, 1), (2, 1), (1, 2))
    )
    return [
        [n for a, b, c in zip(*places, strict=True) for n in (a, int(b > a), int(c > a))]
        for places in zip(one, taller, wider, strict=True)
    ]


def at_grid(layout: list[list[int]], rows: int, columns: int) -> list[list[int]]:
    """Give the shapes in a memory of frames of `rows` x `columns` latents; see `arrange_frames`; scriptable."""
    shapes: list[list[int]] = []
    for places in layout:
        shape: list[int] = []
        for axis in range(len(places) // 3):
            steps = places[3 * axis]
            if places[3 * axis + 1] == 1:
                steps = steps * rows
            if places[3 * axis + 2] == 1:
                steps = steps * columns
            shape.append(steps)
        shapes.append(shape)
    return shapes


def state_size(shapes: list[list[int]]) -> int:
    """Count the numbers of a sample's state, S; scriptable."""
    total = 0
    for shape in shapes:
        if len(shape) > 0:
            total += _product(shape)
    return total


def _product(shape: list[int]) -> int:
    size = 1
    for side in shape:
        size *= side
    return size


def unpack(state: Tensor, shapes: list[list[int]]) -> list[Tensor]:
    """Turn a state `(b, S)` into a memory whose places have these shapes (see `arrange`); scriptable."""
    memory: list[Tensor] = []
    begin = 0
    for shape in shapes:
        if len(shape) == 0:
            memory.append(torch.zeros(0))
        else:
            size = _product(shape)
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


def check_chunk(steps: int, whole: int, last: bool, what: str, lead: int = 0) -> None:
    """Refuse a chunk of no steps, and one that isn't the last and isn't made of wholes.

    Args:
        steps: Of the chunk, those of its lead too.
        whole: Of which it should be made.
        last: Whether it is the last.
        what: What steps are called.
        lead: How many of them are copies of the first.

    Raises:
        UserError: So it is.
    """
    if steps == lead or (steps % whole and not last):
        less = f", less {lead} in the first" if lead else ""
        raise UserError(
            f"a chunk of {steps - lead} {what}: it should have a multiple of {whole}{less}, if it isn't the last"
        )
