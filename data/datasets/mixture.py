"""Mixtures of datasets, sampled by weight rather than by size."""

from bisect import bisect_right
from collections.abc import Mapping, Sequence
from itertools import accumulate
from typing import Annotated, TypeAlias

import numpy as np
import torch
from torch import Tensor

from varitok import UserError

from ..batch import Key, SignalDataset, Splits, sample_generator
from ..permutation import Numbers, uniform

__all__ = ["Mix", "Weight", "mix"]

Weight: TypeAlias = Annotated[float, "(0, inf)"]
"""Relative frequency of a dataset in training."""


class Mix(SignalDataset):
    """A dataset that draws each training sample from one of several datasets, with probability by weight.

    An epoch has as many samples as all datasets together. Samples of a small dataset recur within it, each time with
    another random crop and augmentation.

    Args:
        datasets: The datasets.
        weights: Weight of each dataset, above 0.
        seed: Seed of all randomness.
    """

    def __init__(self, datasets: Sequence[SignalDataset], weights: list[float], seed: int = 0) -> None:
        self.datasets = datasets
        self.limits = np.cumsum(weights)[:-1] / sum(weights)
        self.seed = seed
        self.counts = [len(data) for data in datasets]

    def __len__(self) -> int:
        return sum(self.counts)

    def __getitem__(self, key: Key) -> Tensor:
        """Return the sample of `(epoch, index)`; the index determines its dataset."""
        generator = sample_generator(self.seed, key)
        which = int(self._sources(np.array([key[1]]))[0])
        place = int(torch.randint(self.counts[which], (), generator=generator))
        # A unique value in the place of the epoch, so that each draw of a file is augmented differently.
        return self.datasets[which][key[0] * len(self) + key[1], place]

    def sizes(self) -> Numbers:
        """Return an upper bound of each sample's length: the longest of its dataset, as its file varies by epoch."""
        largest = np.array([np.max(data.sizes(), initial=0) for data in self.datasets])
        return largest[self._sources(np.arange(len(self)))] if largest.all() else largest[:0]

    def _sources(self, indices: Numbers) -> Numbers:
        """Return the index of each sample's dataset; it is the same in every epoch, so that `sizes` can be known."""
        return np.searchsorted(self.limits, uniform(indices, self.seed), side="right")


class _Joined(SignalDataset):
    """A concatenation of datasets."""

    def __init__(self, datasets: Sequence[SignalDataset]) -> None:
        self.datasets = datasets
        self.ends = list(accumulate(len(data) for data in datasets))

    def __len__(self) -> int:
        return self.ends[-1]

    def __getitem__(self, key: Key) -> Tensor:
        which = bisect_right(self.ends, key[1])
        data = self.datasets[which]
        return data[key[0], key[1] - self.ends[which] + len(data)]


def mix(splits: Mapping[str, Splits], weights: Mapping[str, Weight], seed: int = 0) -> Splits:
    """Mix datasets, for example speech with ten times as much music.

    Args:
        splits: Splits of each dataset, by name.
        weights: Relative frequency of each dataset in training; 1 if not given.
        seed: Seed of all randomness.

    Raises:
        UserError: There is no dataset, a weight has an unknown name, or a dataset has several shapes.
    """
    if not splits:
        raise UserError("data: give at least one dataset to mix")
    if any(parts.train.shapes for parts in splits.values()):
        raise UserError("data.buckets: a mixture has one shape; give data.buckets=null")
    for name in weights:
        if name not in splits:
            raise UserError(f"data.weights.{name}: there is no such dataset (have: {', '.join(splits)})")
    shares = [float(weights.get(name, 1.0)) for name in splits]
    return Splits(
        Mix([parts.train for parts in splits.values()], shares, seed),
        _Joined([parts.val for parts in splits.values()]),
        about={
            "dataset": "; ".join(parts.about["dataset"] for parts in splits.values()),
            "protocol": "; ".join(dict.fromkeys(parts.about["protocol"] for parts in splits.values())),
        },
    )
