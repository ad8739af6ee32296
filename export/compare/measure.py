"""One protocol for all: the same signals through the bundle and through classical codecs, at ladders of rates."""

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
ACCOUNTS = {"payload": "bytes", "file": "file_bytes"}  # the counted bytes, and their column
Row = dict[str, float | str]


class Item(NamedTuple):
    """A signal.

    Attributes:
        signal: `(c, *grid)`, as a dataset gives it.
        label: Index of its class; None if unknown.
    """

    signal: Tensor
    label: int | None = None


class _Sums:
    """What adds up over signals for one codec at one setting."""

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
    """Code every signal in every way, and measure what comes back.

    Args:
        codec: The bundle.
        items: The signals.
        classics: The classical codecs.
        modality: The bundle's.
        metrics: Out of the modality's, each of a signal by itself.
        coding: How the bundle's codes are written; None: as `varitok encode` does.
        recognises: Gives the classes of pictures; right is an item's label, or the answer to the original.

    Returns:
        A row for each codec and setting, rates upwards: means over signals, and rates over all of them.
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
    """Code one signal in every way."""
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
        Rows with `percent`: below 0, the bundle needs fewer bytes for the same quality; NaN where no quality is common.
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
