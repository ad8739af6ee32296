"""The dataset interface, samples and batches."""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import NamedTuple, TypeAlias

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from .feature_map import FeatureMap, stack_features
from .permutation import Numbers
from .storage.members import File

__all__ = [
    "Batch", "Key", "Sample", "SignalDataset", "Splits",
    "collate", "normalize", "sample_generator", "to_uint8",
]  # fmt: skip

Key: TypeAlias = tuple[int, int]
"""Index of a sample in a dataset: (epoch, index). The epoch only changes random draws."""


class Sample(NamedTuple):
    """A sample of a dataset, before collation.

    Attributes:
        signal: `(c, *grid)`; None if its file is unreadable and not replaced.
        bad: "path: reason" of each file that was tried and could not be read.
        sample_index: Index of the signal in its dataset.
        features: Precomputed features of the signal, by teacher.
        caption: Caption of the signal, empty if it has none; None if captions aren't read.
    """

    signal: Tensor | None
    bad: tuple[str, ...] = ()
    sample_index: int = 0
    features: Mapping[str, FeatureMap] = {}
    caption: str | None = None


class Batch(NamedTuple):
    """A batch of signals.

    Attributes:
        signal: `(b, c, *grid)`, uint8 or float in [-1, 1]; b is 0 if no file of the batch could be read.
        lengths: int64 `(b,)`, valid steps of the first grid axis.
        bad: "path: reason" of each file that could not be read.
        whole: True if no signal is padded; known on the CPU, without reading `lengths` from its device.
        sample_indices: int64 `(b,)`, index of each signal in its dataset.
        features: Precomputed features of the signals, by teacher.
        missed: For each requested sample, whether its own file was unreadable, replaced or not.
        captions: Caption of each signal, empty if it has none; an empty tuple if captions aren't read.
    """

    signal: Tensor
    lengths: Tensor
    bad: tuple[str, ...]
    whole: bool = False
    sample_indices: Tensor | None = None
    features: Mapping[str, FeatureMap] = {}
    missed: tuple[bool, ...] = ()
    captions: tuple[str, ...] = ()


class SignalDataset(Dataset[Tensor], ABC):
    """A dataset of signals, indexed by `Key`. Its randomness depends on the key and a seed alone.

    Attributes:
        files: File of each signal; empty if signals aren't read from files of their own.
        shapes: Grid sizes that signals are cropped to; empty if all have the same.
    """

    files: Sequence[File] = ()
    shapes: Sequence[tuple[int, ...]] = ()

    @abstractmethod
    def __len__(self) -> int:
        """Return the number of signals in an epoch."""

    @abstractmethod
    def __getitem__(self, key: Key) -> Tensor:
        """Return the signal of `(epoch, index)`: `(c, *grid)`, uint8 or float in [-1, 1].

        Raises:
            BadSample: The signal's file can't be read.
        """

    def sizes(self) -> Numbers:
        """Return each signal's length along the first grid axis, 0 if unreadable; empty if lengths are unknown."""
        return np.zeros(0, np.int64)

    def bucket_ids(self) -> Numbers:
        """Return the index into `shapes` of each signal."""
        return np.zeros(len(self), np.int64)


class Splits(NamedTuple):
    """Training and validation split, as the configuration group `data` builds them.

    Attributes:
        train: Training split.
        val: Validation split.
        about: Header of evaluation tables: the dataset, and the protocol by which its signals are prepared.
    """

    train: SignalDataset
    val: SignalDataset
    about: dict[str, str] = {}  # noqa: RUF012 (a tuple's default; never changed)


def collate(samples: Sequence[Sample]) -> Batch:
    """Stack the readable samples, padded to the longest first axis; list the unreadable files in `bad`.

    Audio is padded with zeros, video with copies of its last frame.
    """
    read = [sample for sample in samples if sample.signal is not None]
    signals = [sample.signal for sample in read if sample.signal is not None]
    bad = tuple(name for sample in samples for name in sample.bad)
    missed = tuple(bool(sample.bad) for sample in samples)
    if not signals:
        return Batch(torch.empty(0, 0, 0, 0), torch.empty(0, dtype=torch.int64), bad, missed=missed)
    lengths = torch.tensor([signal.shape[1] for signal in signals])
    longest = int(lengths.max())
    whole = int(lengths.min()) == longest
    if not whole:
        signals = [_pad(signal, longest) for signal in signals]
    indices = torch.tensor([sample.sample_index for sample in read])
    features = {name: stack_features([sample.features[name] for sample in read]) for name in read[0].features}
    captions = tuple(sample.caption for sample in read if sample.caption is not None)
    return Batch(torch.stack(signals), lengths, bad, whole, indices, features, missed, captions)


def _pad(signal: Tensor, steps: int) -> Tensor:
    """Pad the first grid axis to `steps`."""
    missing = steps - signal.shape[1]
    if signal.ndim > 2:
        return torch.cat([signal, signal[:, -1:].expand(-1, missing, *signal.shape[2:])], dim=1)
    return torch.nn.functional.pad(signal, (0, missing))


def normalize(signal: Tensor) -> Tensor:
    """Map uint8 [0, 255] to float32 [-1, 1], x / 127.5 - 1; return other types unchanged."""
    return signal.float().div_(127.5).sub_(1) if signal.dtype == torch.uint8 else signal


def to_uint8(signal: Tensor) -> Tensor:
    """Map [-1, 1] to uint8, round(127.5 (x + 1)), clamped. Truncating, as most evaluations do, lowers their scores."""
    return signal.float().add(1).mul(127.5).round().clamp(0, 255).to(torch.uint8)


def sample_generator(seed: int, key: tuple[int, ...]) -> torch.Generator:
    """Return the random generator of a sample or epoch: the same in every worker and rank, and after resuming."""
    return torch.Generator().manual_seed(hash((seed, *key)) & (2**63 - 1))
