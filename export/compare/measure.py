"""The protocol of the comparison: a bundle and classical codecs encode the same signals at ladders of rates."""

from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from varitok.codecs.evaluation.figure import Curve
from varitok.codecs.evaluation.ladder import Ladder
from varitok.codecs.modalities.base import Modality
from varitok.codecs.modalities.registry import lower_is_better
from varitok.data.batch import normalize

from ..adapters.codec import BundleCodec
from ..bitstream.rate_control import encode_signal
from .classic import ClassicalCodec, Coded
from .rates import bd_rate

__all__ = ["ACCOUNTS", "Item", "Row", "compare", "curves_of", "savings"]

OURS = "varitok"
ACCOUNTS = {"payload": "bytes", "file": "file_bytes"}  # counted bytes, and their column
Row = dict[str, float | str]


class Item(NamedTuple):
    """A signal with its class.

    Attributes:
        signal: `(c, *grid)`, as a dataset returns it.
        label: Index of its class; None if unknown.
    """

    signal: Tensor
    label: int | None = None


def compare(
    codec: BundleCodec,
    items: Iterable[Item],
    classics: Sequence[ClassicalCodec],
    modality: Modality,
    metrics: Sequence[str],
    coding: str | None = None,
    recognizes: Callable[[Tensor], Tensor] | None = None,
) -> list[Row]:
    """Encode and decode every signal with every codec and setting, and measure the reconstructions.

    Args:
        codec: The bundle.
        items: The signals.
        classics: The classical codecs.
        modality: Modality of the bundle.
        metrics: Names of the modality's metrics, all of single signals.
        coding: Coding of the bundle's codes; None for that of `varitok encode`.
        recognizes: Classifies images; the right class is an item's label, or else the class of the original.

    Returns:
        A row for each codec and setting, by ascending size: means over signals, and rates over all signals together.
    """
    comparisons = {name: modality.comparison(name, torch.device("cpu")) for name in metrics}
    found: dict[tuple[str, int], list[dict[str, float]]] = {}
    amount, count = 0.0, 0
    for signal, label in items:
        normal = normalize(signal[None])
        real, lengths = modality.as_written(normal), torch.tensor([signal.shape[1]])
        amount, count = amount + modality.amount(real, lengths), count + 1
        wanted = None if recognizes is None else int(recognizes(real)) if label is None else label
        for name, setting, coded in _all(codec, normal, real[0], classics, modality, coding):
            back = coded.back[None]
            values = {column: float(getattr(coded, account)) for account, column in ACCOUNTS.items()}
            values |= {metric: float(call(back, real, lengths)) for metric, call in comparisons.items()}
            if recognizes is not None:
                values["accuracy"] = float(int(recognizes(back)) == wanted)
            found.setdefault((name, setting), []).append(values)
    rows: list[Row] = []
    for (name, setting), measured in found.items():
        means = {column: float(np.nanmean([values[column] for values in measured])) for column in measured[0]}
        sizes = {column: means.pop(column) for column in ACCOUNTS.values()}
        rates = {
            column.replace("bytes", modality.rate.name): 8 * sum(values[column] for values in measured) / amount
            for column in sizes
        }
        rows.append({"codec": name, "setting": setting, **sizes, **rates, **means, modality.plural: count})
    order = [OURS, *(one.name for one in classics)]
    return sorted(rows, key=lambda row: (order.index(str(row["codec"])), float(row["bytes"])))


def _all(
    codec: BundleCodec,
    normal: Tensor,
    real: Tensor,
    classics: Sequence[ClassicalCodec],
    modality: Modality,
    coding: str | None,
) -> Iterable[tuple[str, int, Coded]]:
    """Encode and decode one signal; yield each codec's name, setting and result."""
    bundle = codec.bundle
    whole = encode_signal(bundle, bundle.values(normal.numpy()), frame_rate=codec.frame_rate)._replace(coding=coding)
    for kept in Ladder(codec).keeps:
        part = whole.cut(kept, codec.layout.ordered)
        written = part.serialize(bundle)
        back = codec.decode(torch.from_numpy(part.codes), normal.shape[2:])
        yield OURS, kept, Coded(len(written.data), written.payload, modality.as_written(back)[0])
    for classic in classics:
        for setting in classic.settings:
            yield classic.name, setting, classic.code(real, setting, bundle.sample_rate or bundle.frame_rate or 0)


def savings(rows: Sequence[Row], metrics: Sequence[str]) -> list[Row]:
    """Compute the Bjontegaard rate of the bundle against each classical codec, by each metric and way of counting.

    Returns:
        Rows with `percent`: below 0, the bundle needs fewer bytes for the same quality; NaN without a common quality.
    """
    found: list[Row] = []
    for counted, column in ACCOUNTS.items():
        ours, *others = curves_of(rows, column, metrics)
        for metric in metrics:
            sign = -1 if lower_is_better(metric) else 1
            for other in others:
                pairs = [(curve.sizes, [sign * each for each in curve.values[metric]]) for curve in (ours, other)]
                mine, theirs = sorted(ours.values[metric]), sorted(other.values[metric])
                spans = {"least": mine[0], "most": mine[-1], "their_least": theirs[0], "their_most": theirs[-1]}
                percent = bd_rate(*pairs[0], *pairs[1])
                found.append({"against": other.name, "metric": metric, "counted": counted, "percent": percent, **spans})
    return found


def curves_of(rows: Sequence[Row], column: str, metrics: Sequence[str]) -> list[Curve]:
    """Return each codec's curves of the metrics over a size column, the bundle's first, with its settings as labels."""
    curves = []
    for name in dict.fromkeys(str(row["codec"]) for row in rows):
        mine = [row for row in rows if row["codec"] == name]
        values = {metric: [float(row[metric]) for row in mine] for metric in metrics}
        labels = [str(row["setting"]) for row in mine] if name == OURS else []
        curves.append(Curve(name, [float(row[column]) for row in mine], values, labels))
    return curves
