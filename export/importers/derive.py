"""Tensors that our modules hold as one and that are published as several, or in another order or scale."""

from collections.abc import Callable, Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from .source import Source

__all__ = ["Derived", "derive", "join"]


class Derived(NamedTuple):
    """A tensor that is computed from published ones.

    Attributes:
        parts: Names of the published tensors.
        compute: Function of their values.
    """

    parts: tuple[str, ...]
    compute: Callable[..., Tensor]


def derive(source: Source, derived: Mapping[str, Derived]) -> Source:
    """Return the same weights with derived tensors in the place of their parts; each is computed when it is read.

    One whose parts the source lacks is left out.
    """
    derived = {name: one for name, one in derived.items() if all(part in source.shapes for part in one.parts)}
    spent = {part for one in derived.values() for part in one.parts}
    shapes = {name: shape for name, shape in source.shapes.items() if name not in spent}
    for name, (parts, compute) in derived.items():
        shapes[name] = tuple(compute(*(torch.empty(source.shapes[part], device="meta") for part in parts)).shape)

    def read(name: str) -> Tensor:
        if name not in derived:
            return source.take(name)
        parts, compute = derived[name]
        return compute(*(source.take(part) for part in parts))

    return Source(source.path, shapes, read, source.config, source.notes)


def join(*parts: Tensor) -> Tensor:
    """Concatenate along the first axis, as queries, keys and values are in one linear map."""
    return torch.cat(parts)
