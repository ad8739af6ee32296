"""Batch samplers whose order is a function of the seed, so that a run can resume at any batch."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import KW_ONLY, dataclass
from functools import lru_cache
from itertools import chain, count, islice

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Sampler

from .batch import Key, sample_generator
from .permutation import Numbers, Permutation

__all__ = ["BucketSampler", "LengthSampler", "UpdateBatchSampler"]

MOST_DRAWN = 1 << 20  # samples whose permutation is drawn as a whole, 8 MB; that of more is computed
AT_ONCE = 4096  # indices that are computed together


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

    Each epoch is a permutation that depends on (seed, epoch), dealt to the ranks in turn. So the samples of an update
    depend on the global batch size alone: if that is kept, a run resumes exactly with any number of processes or
    workers. If it changes, the order within each epoch stays, and the position is computed as if all earlier batches
    had the new size.

    With blocks, consecutive samples are permuted and dealt together. An epoch's blocks begin at a random sample, and
    the samples that make no whole block come last.

    Args:
        length: Number of samples of the dataset.
        batch_size: Samples per batch and process.
        block: Samples of a block; it divides `batch_size`.
    """

    length: int
    batch_size: int
    block: int = 1

    def __post_init__(self) -> None:
        self._order = lru_cache(maxsize=2)(self.order)

    def order(self, epoch: int) -> Callable[[Numbers], Numbers]:
        """Return the order of an epoch, of all processes: a function (places) -> indices of samples."""
        blocks = _shuffled(self.length // self.block, self.seed, epoch)
        if self.block == 1:
            return blocks
        first = int(torch.randint(self.block, (), generator=sample_generator(self.seed, (epoch, self.block))))

        def indices(places: Numbers) -> Numbers:
            found = places.copy()
            whole = places < self.length // self.block * self.block
            found[whole] = blocks(places[whole] // self.block) * self.block + places[whole] % self.block
            return (found + first) % self.length

        return indices

    def __iter__(self) -> Iterator[list[Key]]:
        """Return batches of keys, from `start` on."""
        own = np.arange(self.batch_size)
        own = (own // self.block * self.world + self.rank) * self.block + own % self.block
        ahead = max(1, AT_ONCE // self.batch_size)
        for first in range(self.start, self.batches, ahead):
            numbers = np.arange(first, min(first + ahead, self.batches))
            dealt = numbers[:, None] * self.batch_size * self.world + own  # (batches, batch_size)
            epochs, places = np.divmod(dealt, self.length)
            indices = np.empty_like(places)
            for epoch in range(epochs[0, 0], epochs[-1, -1] + 1):
                indices[epochs == epoch] = self._order(epoch)(places[epochs == epoch])
            for batch in zip(epochs.tolist(), indices.tolist(), strict=True):
                yield list(zip(*batch, strict=True))


def _shuffled(length: int, seed: int, epoch: int) -> Callable[[Numbers], Numbers]:
    """Return the permutation of `range(length)` of an epoch, as a function of places."""
    if length > MOST_DRAWN:
        return Permutation(length, seed, epoch)
    drawn: Numbers = torch.randperm(length, generator=sample_generator(seed, (epoch,))).numpy()
    return drawn.__getitem__


class AlikeSampler(RunSampler, ABC):
    """A sampler whose global batches consist of similar samples, so that no rank waits for another's larger batch.

    Each epoch is drawn from (seed, epoch); all have the same number of batches. A run resumes exactly with any number
    of workers, but only with the same number of processes.
    """

    @abstractmethod
    def alike(self, generator: torch.Generator) -> list[Tensor]:
        """Draw the global batches of an epoch, as sample indices; each batch's size is a multiple of `world`."""

    def epoch(self, epoch: int) -> list[tuple[int, Tensor]]:
        """Return the global batches of one epoch, shuffled: the epoch, and the indices of the samples."""
        generator = sample_generator(self.seed, (epoch,))
        found = self.alike(generator)
        return [(epoch, found[at]) for at in torch.randperm(len(found), generator=generator).tolist()]

    def __iter__(self) -> Iterator[list[Key]]:
        """Return batches of keys, from `start` on."""
        each = len(self.epoch(0))
        epochs = (self.epoch(epoch) for epoch in count(self.start // each))
        first = self.start % each
        for epoch, indices in islice(chain.from_iterable(epochs), first, first + self.batches - self.start):
            yield [(epoch, index) for index in indices[self.rank :: self.world].tolist()]


@dataclass(eq=False, repr=False)
class BucketSampler(AlikeSampler):
    """A sampler of batches within buckets; the last batch of a bucket is completed with the bucket's first samples.

    Args:
        bucket_ids: Bucket index of each sample.
        batch_sizes: Samples per batch and process, for each bucket.
    """

    bucket_ids: Sequence[int] | Numbers
    batch_sizes: Sequence[int]

    def __post_init__(self) -> None:
        of = torch.as_tensor(self.bucket_ids)
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

    lengths: Sequence[int] | Numbers
    batch_size: int
    share: float = 0.05
    budget: int | None = None

    def __post_init__(self) -> None:
        # Batch sizes are the same in every epoch, so that the position of a resumed run can be computed.
        longest_first = np.sort(np.asarray(self.lengths))[::-1]
        self.parts: list[int] = []
        at = 0
        while at < len(longest_first):
            fits = self.batch_size
            if self.budget is not None:
                fits = min(fits, max(1, self.budget // int(longest_first[at])))
            self.parts.append(min(fits * self.world, len(longest_first) - at))
            at += self.parts[-1]

    def alike(self, generator: torch.Generator) -> list[Tensor]:
        """Draw batches, from the longest samples to the shortest; see `AlikeSampler.alike`."""
        lengths = torch.as_tensor(self.lengths, dtype=torch.float64)
        change = torch.rand(len(lengths), generator=generator, dtype=torch.float64)
        order = (lengths * (1 + self.share * change)).argsort(descending=True)
        return [_repeat(part, self.world) for part in torch.split(order, self.parts)]


def _repeat(order: Tensor, multiple: int) -> Tensor:
    """Repeat the first indices until the length is a multiple of `multiple`."""
    whole = -(-len(order) // multiple) * multiple
    return order.repeat(-(-whole // max(1, len(order))))[:whole]
