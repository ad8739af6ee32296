"""Definition of a metric, which tables, figures, checkpoints and sweeps read."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple, TypeAlias

import torch
from torch import Tensor

__all__ = ["Column", "Comparison", "Metric", "Network", "stateless"]

Comparison: TypeAlias = Callable[[Tensor, Tensor, Tensor], Tensor]
"""Function of (decoded, original, lengths) to one value per signal, `(b,)`; NaN if it is undefined."""

Builder: TypeAlias = Callable[[torch.device, int], Comparison]
"""Function of (device, sample rate in Hz or 0) to a comparison; raises UserError if this machine can't compute it."""


class Network(NamedTuple):
    """A feature extractor for a Fréchet distance.

    Attributes:
        features: Function of uint8 signals `(b, 3, *grid)` and lengths `(b,)` to features `(b, width)`.
        width: Number of features.
    """

    features: Callable[[Tensor, Tensor], Tensor]
    width: int


@dataclass(frozen=True)
class Column:
    """A column of an evaluation's table.

    Attributes:
        name: Key in CSV files, logs and options.
        title: Heading in a printed table.
        form: Format string of a printed value.
        label: Axis label in figures, with `{}` for the modality's noun; the title if empty.
        definition: Definition for the header of a CSV file; `Modality.facts` fills its fields, such as `{rate}`.
    """

    name: str
    title: str
    form: str
    label: str = ""
    definition: str = ""


@dataclass(frozen=True)
class Metric(Column):
    """A quality metric: either a comparison per signal (`build`), or a Fréchet distance of sets (`network`).

    Attributes:
        higher_is_better: False for distances.
        build: Builder of the comparison per signal, or None.
        network: Function of a device to the feature extractor of a Fréchet distance, or None.
        available: Whether an evaluation computes the metric by default, given the sample rate (0 without one): this
            machine has its package or weights.
    """

    higher_is_better: bool = True
    build: Builder | None = None
    network: Callable[[torch.device], Network] | None = None
    available: Callable[[int], bool] = lambda _: True


def stateless(compare: Comparison) -> Builder:
    """Return the builder of a comparison that needs neither weights nor a sample rate."""
    return lambda _device, _sample_rate: compare
