"""The protocol of the comparison: a bundle and classical codecs encode the same signals at ladders of rates."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from varitok.codecs.evaluation.ladder import Ladder
from varitok.codecs.modalities.base import Modality
from varitok.codecs.modalities.registry import lower_is_better
from varitok.data.batch import normalize

from ..adapters.codec import BundleCodec
from ..bitstream.rate_control import encode_signal
from .classic import ClassicalCodec, Coded
from .rates import bd_rate

__all__ = ["OURS", "Item", "Row", "compare", "savings"]

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


class _Sums:
    """The sizes and metrics of one codec at one setting, accumulated over signals."""

    def __init__(self) -> None:
        self.bytes = {account: 0 for account in ACCOUNTS}
        self.values: dict[str, list[float]] = {}

    def add(self, coded: Coded, values: Mapping[str, float]) -> None:
        for account in ACCOUNTS:
            self.bytes[account] += getattr(coded, account)
        for name, value in values.items():
            self.values.setdefault(name, []).append(value)


def compare(
    codec: BundleCodec,
    items: Iterable[Item],
    classics: Sequence[ClassicalCodec],
    modality: Modality,
    metrics: Sequence[str],
    coding: str | None = None,
    recognises: Callable[[Tensor], Tensor] | None = None,
) -> list[Row]:
    """Encode and decode every signal with every codec and setting, and measure the reconstructions.

    Args:
        codec: The bundle.
        items: The signals.
        classics: The classical codecs.
        modality: Modality of the bundle.
        metrics: Names of the modality's metrics, all of single signals.
        coding: Coding of the bundle's codes; None for that of `varitok encode`.
        recognises: Classifies images; the right class is an item's label, or else the class of the original.

    Returns:
        A row for each codec and setting, by ascending size: means over signals, and rates over all signals together.
    """
    comparisons = {name: modality.comparison(name, torch.device("cpu")) for name in metrics}
    sums: dict[tuple[str, int], _Sums] = {}
    amount, count = 0.0, 0
    for signal, label in items:
        normal = normalize(signal[None])
        real, lengths = modality.as_written(normal), torch.tensor([signal.shape[1]])
        amount, count = amount + modality.amount(real, lengths), count + 1
        wanted = None if recognises is None else int(recognises(real)) if label is None else label
        for name, setting, coded in _all(codec, normal, real[0], classics, modality, coding):
            back = coded.back[None]
            values = {metric: float(call(back, real, lengths)) for metric, call in comparisons.items()}
            if recognises is not None:
                values["accuracy"] = float(int(recognises(back)) == wanted)
            sums.setdefault((name, setting), _Sums()).add(coded, values)
    rows: list[Row] = []
    for (name, setting), found in sums.items():
        sizes = {column: found.bytes[account] / count for account, column in ACCOUNTS.items()}
        prefixes = {"payload": "", "file": "file_"}
        rates = {f"{prefixes[account]}{modality.rate.name}": 8 * size / amount for account, size in found.bytes.items()}
        means = {metric: float(np.nanmean(values)) for metric, values in found.values.items()}
        rows.append({"codec": name, "setting": setting, **sizes, **rates, **means, modality.plural: count})
    order = {name: index for index, name in enumerate([OURS, *(one.name for one in classics)])}
    return sorted(rows, key=lambda row: (order[str(row["codec"])], float(row["bytes"])))


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
    names = dict.fromkeys(str(row["codec"]) for row in rows)
    for counted, column in ACCOUNTS.items():
        for metric in metrics:
            sign = -1 if lower_is_better(metric) else 1
            curves = {name: _curve([row for row in rows if row["codec"] == name], column, metric) for name in names}
            rates, quality = curves.pop(OURS)
            for name, (others, values) in curves.items():
                percent = bd_rate(rates, [sign * each for each in quality], others, [sign * each for each in values])
                ours, theirs = sorted(quality), sorted(values)
                spans = {"least": ours[0], "most": ours[-1], "their_least": theirs[0], "their_most": theirs[-1]}
                found.append({"against": name, "metric": metric, "counted": counted, "percent": percent, **spans})
    return found


def _curve(rows: Sequence[Row], size: str, metric: str) -> tuple[list[float], list[float]]:
    return [float(row[size]) for row in rows], [float(row[metric]) for row in rows]
