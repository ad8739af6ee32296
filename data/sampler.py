"""Batch samplers whose order is a function of the seed, so that a run can resume at any batch."""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import KW_ONLY, dataclass
from itertools import chain, count, islice

import torch
from torch import Tensor
from torch.utils.data import Sampler

from .batch import Key, sample_generator

__all__ = ["BucketSampler", "LengthSampler", "UpdateBatchSampler"]


@dataclass(eq=False, repr=False)
class RunSampler(Sampler[list[Key]]):
    """A batch sampler of `Key`s for a whole run; the order depends on the seed and the epoch alone.

    Args:
        batches: Number of batches of the whole run.
        seed: Seed of the order.
        rank: Rank of this process.
        world: Number of processes (world size).
        start: Batches used before the run was resumed.
    """

    _: KW_ONLY
    batches: int
    seed: int = 0
    rank: int = 0
    world: int = 1
    start: int = 0

    def __len__(self) -> int:
        """Return the batches of the whole run, including those before `start`: Lightning resumes its batch index."""
        return self.batches


@dataclass(eq=False, repr=False)
class UpdateBatchSampler(RunSampler):
    """A sampler of a fixed number of batches of equal size; a batch may span two epochs of the dataset.

    Each epoch is a permutation drawn from (seed, epoch), dealt to the ranks in turn. So the samples of an update
    depend on the global batch size alone: if that is kept, a run resumes exactly with any number of processes or
    workers. If it changes, the order within each epoch stays, and the position is computed as if all earlier batches
    had the new size.

    Args:
        length: Number of samples of the dataset.
        batch_size: Samples per batch and process.
    """

    length: int
    batch_size: int

    def epoch(self, epoch: int) -> list[Key]:
        """Return the keys of one epoch in order, of all processes."""
        order = torch.randperm(self.length, generator=sample_generator(self.seed, (epoch,)))
        return [(epoch, index) for index in order.tolist()]

    def __iter__(self) -> Iterator[list[Key]]:
        """Return batches of keys, from `start` on."""
        first = self.start * self.batch_size * self.world  # samples dealt before `start`
        epochs = (self.epoch(epoch) for epoch in count(first // self.length))
        indices = islice(chain.from_iterable(epochs), first % self.length + self.rank, None, self.world)
        for _ in range(self.start, self.batches):
            yield list(islice(indices, self.batch_size))


class AlikeSampler(RunSampler, ABC):
    """A sampler whose global batches consist of similar samples, so that no rank waits for another's larger batch.

    Each epoch is drawn from (seed, epoch); all have the same number of batches. A run resumes exactly with any number
    of workers, but only with the same number of processes.
    """

    @abstractmethod
    def alike(self, generator: torch.Generator) -> list[Tensor]:
        """Draw the global batches of an epoch, as sample indices; each batch's size is a multiple of `world`."""

    def epoch(self, epoch: int) -> list[list[Key]]:
        """Return the global batches of one epoch, shuffled."""
        generator = sample_generator(self.seed, (epoch,))
        found = self.alike(generator)
        order = torch.randperm(len(found), generator=generator).tolist()
        return [[(epoch, index) for index in found[number].tolist()] for number in order]

    def __iter__(self) -> Iterator[list[Key]]:
        """Return batches of keys, from `start` on."""
        each = len(self.epoch(0))
        epochs = (self.epoch(epoch) for epoch in count(self.start // each))
        first = self.start % each
        for batch in islice(chain.from_iterable(epochs), first, first + self.batches - self.start):
            yield batch[self.rank :: self.world]


@dataclass(eq=False, repr=False)
class BucketSampler(AlikeSampler):
    """A sampler of batches within buckets; the last batch of a bucket is completed with the bucket's first samples.

    Args:
        bucket_ids: Bucket index of each sample.
        batch_sizes: Samples per batch and process, for each bucket.
    """

    bucket_ids: Sequence[int]
    batch_sizes: Sequence[int]

    def __post_init__(self) -> None:
        of = torch.tensor(self.bucket_ids)
        self.groups = [(of == kind).nonzero().flatten() for kind in range(len(self.batch_sizes))]
        self.dealt = [size * self.world for size in self.batch_sizes]

    def alike(self, generator: torch.Generator) -> list[Tensor]:
        """Draw the batches of each bucket; see `AlikeSampler.alike`."""
        found: list[Tensor] = []
        for group, dealt in zip(self.groups, self.dealt, strict=True):
            order = group[torch.randperm(len(group), generator=generator)]
            found += [part for part in torch.split(_repeat(order, dealt), dealt) if len(part)]
        return found


@dataclass(eq=False, repr=False)
class LengthSampler(AlikeSampler):
    """A sampler of batches of similar lengths, to save padding, with a fixed number of samples or a size budget.

    Samples are sorted by length and cut into batches. Noise on the lengths varies the batches between epochs.
    If the number of processes doesn't divide the last global batch, its first samples are repeated.

    Args:
        lengths: Length of each sample, at least 1.
        batch_size: Samples per batch and process; the maximum if there is a budget.
        share: Upper end of the uniform noise, relative to the length, that is added before sorting.
        budget: Size limit of each process's batch, padding included: number of samples times the longest length. Noise
            can exceed it by `share`. A longer sample is a batch of its own. None: all batches have `batch_size`.
    """

    lengths: Sequence[int]
    batch_size: int
    share: float = 0.05
    budget: int | None = None

    def __post_init__(self) -> None:
        # Batch sizes are the same in every epoch, so that the position of a resumed run can be computed.
        longest_first = sorted(self.lengths, reverse=True)
        self.parts: list[int] = []
        at = 0
        while at < len(longest_first):
            fits = self.batch_size
            if self.budget is not None:
                fits = min(fits, max(1, self.budget // longest_first[at]))
            self.parts.append(min(fits * self.world, len(longest_first) - at))
            at += self.parts[-1]

    def alike(self, generator: torch.Generator) -> list[Tensor]:
        """Draw batches, from the longest samples to the shortest; see `AlikeSampler.alike`."""
        lengths = torch.tensor(self.lengths, dtype=torch.float64)
        change = torch.rand(len(lengths), generator=generator, dtype=torch.float64)
        order = (lengths * (1 + self.share * change)).argsort(descending=True)
        return [_repeat(part, self.world) for part in torch.split(order, self.parts)]


def _repeat(order: Tensor, multiple: int) -> Tensor:
    """Repeat the first indices until the length is a multiple of `multiple`."""
    whole = -(-len(order) // multiple) * multiple
    return order.repeat(-(-whole // max(1, len(order))))[:whole]
