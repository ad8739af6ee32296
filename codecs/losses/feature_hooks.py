"""What goes on inside a codec while it reconstructs: the features at a named place of it, on their grid."""

import math
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from varitok import UserError
from varitok.data.feature_map import Features

from ..bottlenecks.contract import straight_through
from ..bottlenecks.residual import Residual, Split
from ..codec import Codec
from ..result import Quantized

__all__ = ["Place", "find", "listening", "width"]


class Place(NamedTuple):
    """A module of a codec whose output is looked at: tokens `(b, n, d)`, or of images and clips a grid `(b, d, *grid)`.

    Attributes:
        path: As `encoder`, `project_in`, `bottleneck.parts.0` or `decoder.transformer.blocks.3`.
        books: Of a residual bottleneck, the sum of so many first books; None for what the module gives.
    """

    path: str
    books: int | None = None


def find(codec: Codec, place: Place) -> list[nn.Module]:
    """Find the modules whose outputs make what is at a place: one, or one for each book.

    Raises:
        UserError: The codec has no such module, or its books are no sum of so many.
    """
    module: nn.Module = codec
    passed: list[str] = []
    for part in place.path.split("."):
        children = dict(module.named_children())
        if part not in children:
            here = ".".join(passed) or "the codec"
            raise UserError(f"objective: at={place.path}: {here} has no part {part!r}; it has {', '.join(children)}")
        module = children[part]
        passed.append(part)
    if place.books is None:
        return [module]
    # The two sides of a split are of different widths: its first book alone is a sum.
    levels = list(module.parts) if isinstance(module, Residual | Split) else []
    single = [len(level.book_sizes) == 1 for level in levels]  # type: ignore[arg-type]
    most = int(single[0]) if isinstance(module, Split) else len(levels) * all(single)
    if not 1 <= place.books <= most:
        reason = f"from 1 to {most}" if most else "null, since it adds up no books"
        raise UserError(f"objective: at={place.path}: books={place.books} should be {reason}")
    return levels[: place.books]


def width(codec: Codec, place: Place) -> int:
    """Count the channels at a place.

    Raises:
        UserError: There is no such place, or the module doesn't tell.
    """
    module = find(codec, place)[0]
    for name in ("dim", "width", "out_features"):
        if isinstance(found := getattr(module, name, None), int):
            return found
    raise UserError(f"objective: at={place.path}: {type(module).__name__} doesn't tell its channels; give the term dim")


@contextmanager
def listening(
    codec: Codec, places: Iterable[Place], signal: Tensor, lengths: Tensor | None
) -> Iterator[Mapping[Place, Features]]:
    """Hear what is at places of a codec while it reconstructs signals, once, within the context.

    Args:
        codec: The codec.
        places: Where.
        signal: What is reconstructed, `(b, c, *grid)`.
        lengths: int64 `(b,)`, its valid steps of the first axis; None for all.
    """
    heard: dict[Place, Features] = {}

    def hear(place: Place, calls: list[tuple[Tensor, Tensor]], module: nn.Module, given: Any, output: Any) -> None:
        count = place.books or 1
        if len(calls) < count:  # levels may share one module
            calls.append((given[0], output.latents if isinstance(output, Quantized) else output))
            if len(calls) == count:
                values = calls[0][1]
                if count > 1:
                    # The sum passes the gradient once, as that of all books does.
                    values = straight_through(calls[0][0], torch.stack([made for _, made in calls]).sum(0))
                heard[place] = _laid_out(codec, place, values, signal, lengths)

    hooks = []
    for place in dict.fromkeys(places):
        listener = partial(hear, place, [])
        hooks += [module.register_forward_hook(listener) for module in dict.fromkeys(find(codec, place))]
    try:
        yield heard
    finally:
        for hook in hooks:
            hook.remove()


def _laid_out(codec: Codec, place: Place, values: Tensor, signal: Tensor, lengths: Tensor | None) -> Features:
    """Lay tokens `(b, n, d)` out on their grid; images' and clips' may lie there already, channels first.

    Raises:
        UserError: They don't lie on one grid over the signal.
    """
    grid = codec.grid(signal.shape[2:])
    if values.ndim == 3 and len(values) == len(signal):
        values, count = values.transpose(1, 2), math.prod(grid)
        within = codec.ordered and "." in place.path and not place.path.startswith("bottleneck")
        if within and values.shape[2] > count:
            values = values[:, :, -count:]  # of a transformer that sees both, what is placed comes last
        elif codec.ordered:
            return Features(values, (1.0,))  # answers to queries have an order, and no place
        if len(grid) > 1 and values.shape[2] == count:
            values = values.reshape(*values.shape[:2], *grid)
    if values.ndim != signal.ndim:
        raise UserError(f"objective: at={place.path}: {tuple(values.shape)} doesn't lie on a grid over the signal")
    steps = tuple(hop * whole / count for hop, whole, count in zip(codec.hop, grid, values.shape[2:], strict=True))
    valid = None if lengths is None else torch.ceil((lengths + codec.lead) / steps[0]).long()
    return Features(values, steps, valid, codec.lead)
