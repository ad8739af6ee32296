"""What a data set is, what it gives, and what a batch is."""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import NamedTuple, TypeAlias

import torch
from torch import Tensor
from torch.utils.data import Dataset

from .feature_map import FeatureMap, stack_features
from .storage.members import File

__all__ = [
    "BadSample", "Batch", "Key", "Sample", "SignalDataset", "Splits",
    "collate", "convert_errors", "normalize", "sample_generator", "to_uint8",
]  # fmt: skip

Key: TypeAlias = tuple[int, int]
"""Index of a sample in a dataset: (epoch, index). The epoch only changes random draws."""


class BadSample(Exception):
    """A file that can't be read.

    Args:
        path: The file.
        reason: What is wrong with it, in a few words.
    """

    def __init__(self, path: str, reason: str) -> None:
        super().__init__(path, reason)  # as they came, or it could not cross from a worker

    def __str__(self) -> str:
        """Return both in one line."""
        return "{}: {}".format(*self.args)


@contextmanager
def convert_errors(path: str | File) -> Iterator[None]:
    """Turn whatever a decoder raises over a file into a `BadSample` of one line."""
    try:
        yield
    except BadSample:
        raise
    except Exception as error:  # OSError, SyntaxError, RuntimeError, ValueError, MemoryError, FFmpeg's own and more
        reason = getattr(error, "strerror", None) or str(error) or type(error).__name__
        raise BadSample(str(path), " ".join(reason.replace(str(path), "file").split())) from None


class Sample(NamedTuple):
    """One item on its way to a batch.

    Attributes:
        signal: `(c, *grid)`, or None if the file could not be read and nothing stands in for it.
        bad: "path: reason" of each file that was tried and could not be read.
        sample_index: Which signal of its data set it is.
        features: What teachers saw in it before, by their names.
        caption: What a text says of it, empty if none does; None if captions aren't read.
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
        whole: Whether all signals are as long as the batch, told without looking into `lengths` on its device.
        sample_indices: int64 `(b,)`, index of each signal in its dataset.
        features: Precomputed features of the signals, by teacher.
        missed: For each requested sample, whether its own file was unreadable, replaced or not.
        captions: Text beside each signal, empty if it has none; no entries at all if captions aren't read.
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
    """Signals by `Key`; all chance comes from the key and a seed. Lengths, files and shapes are offered where known.

    Attributes:
        files: The signals' files; empty if signals don't have files of their own.
        shapes: Sizes of the grid that signals are brought to; empty if all have one.
    """

    files: Sequence[File] = ()
    shapes: Sequence[tuple[int, ...]] = ()

    @abstractmethod
    def __len__(self) -> int:
        """Count the signals of an epoch."""

    @abstractmethod
    def __getitem__(self, key: Key) -> Tensor:
        """Return the signal of `(epoch, index)`: `(c, *grid)`, uint8 or float in [-1, 1].

        Raises:
            BadSample: Its file can't be read.
        """

    def sizes(self) -> Sequence[int]:
        """Return each signal's steps of the first axis, 0 if unreadable; empty if lengths are not known."""
        return ()

    def kinds(self) -> Sequence[int]:
        """Return the number of each signal's shape, out of `shapes`."""
        return [0] * len(self)


class Splits(NamedTuple):
    """What `data=` builds.

    Attributes:
        train: To train on.
        val: To evaluate on.
        about: What stands above an evaluation's table: the data set, how its signals were made.
    """

    train: SignalDataset
    val: SignalDataset
    about: dict[str, str] = {}  # noqa: RUF012 (a tuple's default; never changed)


def collate(samples: Sequence[Sample]) -> Batch:
    """Stack what could be read, filled up to the longest first axis; keep the names of what could not.

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
    """Fill up the first axis."""
    missing = steps - signal.shape[1]
    if signal.ndim > 2:
        return torch.cat([signal, signal[:, -1:].expand(-1, missing, *signal.shape[2:])], dim=1)
    return torch.nn.functional.pad(signal, (0, missing))


def normalize(signal: Tensor) -> Tensor:
    """Turn uint8 [0, 255] into float32 [-1, 1]; floats pass."""
    return signal.float().div_(127.5).sub_(1) if signal.dtype == torch.uint8 else signal


def to_uint8(signal: Tensor) -> Tensor:
    """Turn [-1, 1] into uint8: clamped, then rounded to the nearest (most evaluations truncate, and lose by it)."""
    return signal.float().add(1).mul(127.5).round().clamp(0, 255).to(torch.uint8)


def sample_generator(seed: int, key: tuple[int, ...]) -> torch.Generator:
    """Return the random generator of a sample or epoch: the same in any worker and process, and after any resume."""
    return torch.Generator().manual_seed(hash((seed, *key)) & (2**63 - 1))
