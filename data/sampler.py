"""The order of samples: a function of the seed, so that a run can go on anywhere."""

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
    """Gives a run's batches of keys; all order follows from the seed and the epoch.

    Args:
        batches: Batches of the whole run.
        seed: Seed of the order.
        rank: This process.
        world: Number of processes.
        start: Batches that an earlier part of the run has used.
    """

    _: KW_ONLY
    batches: int
    seed: int = 0
    rank: int = 0
    world: int = 1
    start: int = 0

    def __len__(self) -> int:
        """Count the batches of the whole run, those before `start` too: Lightning counts on from its batch index."""
        return self.batches


@dataclass(eq=False, repr=False)
class UpdateBatchSampler(RunSampler):
    """Gives a fixed number of batches, crossing from one epoch of the data to the next where it must.

    Each epoch is a permutation drawn from (seed, epoch), dealt to the processes like cards. So which samples an update
    has follows from the batch of all processes alone: with as many samples in it, any number of processes, and of
    workers, goes on exactly where others stopped. With another number, each epoch's order stays, and the position is
    counted as if all batches before had been of this size.

    Args:
        length: Samples of the dataset.
        batch_size: Samples of each process's batch.
    """

    length: int
    batch_size: int

    def epoch(self, epoch: int) -> list[Key]:
        """Return the whole order of one epoch, all processes together."""
        order = torch.randperm(self.length, generator=sample_generator(self.seed, (epoch,)))
        return [(epoch, index) for index in order.tolist()]

    def __iter__(self) -> Iterator[list[Key]]:
        """Return batches of keys, from `start` on."""
        first = self.start * self.batch_size * self.world  # cards dealt before
        epochs = (self.epoch(epoch) for epoch in count(first // self.length))
        cards = islice(chain.from_iterable(epochs), first % self.length + self.rank, None, self.world)
        for _ in range(self.start, self.batches):
            yield list(islice(cards, self.batch_size))


class AlikeSampler(RunSampler, ABC):
    """Gives a fixed number of batches, each of samples that are alike, on all processes at the same time.

    So no process waits for another whose batch is larger. Each epoch is drawn from (seed, epoch) and has as many
    batches as any other. A run goes on exactly with any number of workers, and with the same number of processes.
    """

    @abstractmethod
    def alike(self, generator: torch.Generator) -> list[Tensor]:
        """Draw the batches of an epoch, all processes together: the indices of each, a multiple of `world`."""

    def epoch(self, epoch: int) -> list[list[Key]]:
        """Return the batches of one epoch, all processes together."""
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
    """Batches of samples of one kind; what a kind's last batch lacks are its first samples once more.

    Args:
        kinds: Kind of each sample.
        batch_sizes: Samples of each process's batch, of each kind.
    """

    kinds: Sequence[int]
    batch_sizes: Sequence[int]

    def __post_init__(self) -> None:
        of = torch.tensor(self.kinds)
        self.groups = [(of == kind).nonzero().flatten() for kind in range(len(self.batch_sizes))]
        self.dealt = [size * self.world for size in self.batch_sizes]

    def alike(self, generator: torch.Generator) -> list[Tensor]:
        """Draw batches of each kind."""
        found: list[Tensor] = []
        for group, dealt in zip(self.groups, self.dealt, strict=True):
            order = group[torch.randperm(len(group), generator=generator)]
            found += [part for part in torch.split(_repeat(order, dealt), dealt) if len(part)]
        return found


@dataclass(eq=False, repr=False)
class LengthSampler(AlikeSampler):
    """Batches of samples of about one length, so that little is filled up, and as many as a budget allows.

    The samples are sorted by their lengths, each changed a little by chance, so that others share a batch in each
    epoch, and cut into batches. Where the number of processes doesn't divide the last one, some of its samples come
    twice.

    Args:
        lengths: Length of each sample, at least 1.
        batch_size: Samples of each process's batch; with a budget, the most.
        share: Relative noise that is added to lengths before sorting.
        budget: Size of each process's batch, padding included: its number of samples times the longest. A longer
            sample is a batch of its own. It may be exceeded by `share`. None: all batches have `batch_size`.
    """

    lengths: Sequence[int]
    batch_size: int
    share: float = 0.05
    budget: int | None = None

    def __post_init__(self) -> None:
        # The cuts are the same in every epoch, so that the position in a run can be computed.
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
        """Draw batches, from the longest samples to the shortest."""
        lengths = torch.tensor(self.lengths, dtype=torch.float64)
        change = torch.rand(len(lengths), generator=generator, dtype=torch.float64)
        order = (lengths * (1 + self.share * change)).argsort(descending=True)
        return [_repeat(part, self.world) for part in torch.split(order, self.parts)]


def _repeat(order: Tensor, multiple: int) -> Tensor:
    """Fill up to a multiple by what comes first, once more."""
    whole = -(-len(order) // multiple) * multiple
    return order.repeat(-(-whole // max(1, len(order))))[:whole]
