"""A metric is one object: tables, figures, checkpoints and searches read from it all that they know of the metric."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple, TypeAlias

import torch
from torch import Tensor

__all__ = ["Column", "Comparison", "Metric", "Network", "stateless"]

Comparison: TypeAlias = Callable[[Tensor, Tensor, Tensor], Tensor]
"""(decoded, original, lengths) to one value for each signal, `(b,)`; NaN for a signal that has none."""

Builder: TypeAlias = Callable[[torch.device, int], Comparison]
"""(device, sample rate in Hz or 0) to a comparison. It raises UserError if the metric can't be computed here."""


class Network(NamedTuple):
    """A network on whose features a Fréchet distance is computed.

    Attributes:
        features: uint8 signals `(b, 3, *grid)` and their lengths `(b,)` to features `(b, width)`.
        width: Number of features.
    """

    features: Callable[[Tensor, Tensor], Tensor]
    width: int


@dataclass(frozen=True)
class Column:
    """A column of an evaluation's table.

    Attributes:
        name: Its key in CSV files, logs and options.
        title: Its heading in a printed table.
        form: Format of a printed value.
        label: Name of a figure's axis; the title if empty. `{}` stands for the modality's noun.
        definition: Meaning of the numbers, for the header of a CSV file. It may hold fields such as `{rate}`, which
            `Modality.facts` fills.
    """

    name: str
    title: str
    form: str
    label: str = ""
    definition: str = ""


@dataclass(frozen=True)
class Metric(Column):
    """A measure of quality.

    Attributes:
        higher_is_better: False for distances.
        build: Returns the comparison of signals one by one; None for a metric that compares all of them at once.
        network: Returns the network of a metric that compares all signals at once, a Fréchet distance; else None.
        available: Whether an evaluation computes the metric unasked, given the sample rate (0 without one): its
            package or weights are on this machine.
    """

    higher_is_better: bool = True
    build: Builder | None = None
    network: Callable[[torch.device], Network] | None = None
    available: Callable[[int], bool] = lambda _: True


def stateless(compare: Comparison) -> Builder:
    """Return a builder of a comparison that needs neither weights nor a sample rate."""
    return lambda _device, _sample_rate: compare
