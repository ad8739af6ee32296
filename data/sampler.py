"""The order of samples: a function of the seed, so that a run can go on anywhere."""

from collections.abc import Iterator, Sequence
from itertools import chain, count, islice

import torch
from torch import Tensor
from torch.utils.data import Sampler

from .batch import Key

__all__ = ["BucketSampler", "UpdateBatchSampler"]


class UpdateBatchSampler(Sampler[list[Key]]):
    """Gives a fixed number of batches, crossing from one epoch of the data to the next where it must.

    Each epoch is a permutation drawn from (seed, epoch), dealt to the processes like cards. With sizes given, a batch
    has samples of about one size: the permutation is sorted within windows, and their batches are shuffled again.

    Args:
        length: Samples of the dataset.
        batch_size: Samples of each process's batch.
        batches: Batches of the whole run.
        seed: Seed of the order.
        rank: This process.
        world: Number of processes.
        start: Batches that an earlier part of the run has used.
        sizes: Of all samples, such as their lengths; None leaves the permutation as it is.
        window: Batches of a window; the larger it is, the more alike the sizes in a batch.
    """

    def __init__(
        self,
        length: int,
        batch_size: int,
        batches: int,
        *,
        seed: int = 0,
        rank: int = 0,
        world: int = 1,
        start: int = 0,
        sizes: Sequence[int] | None = None,
        window: int = 32,
    ) -> None:
        self.length = length
        self.batch_size = batch_size
        self.batches = batches
        self.seed = seed
        self.rank = rank
        self.world = world
        self.dealt = batch_size * world  # samples of a batch of all processes
        self.start = start
        self.sizes = None if sizes is None else torch.tensor(sizes)
        self.window = window

    def __len__(self) -> int:
        """Count the batches of the whole run, those before `start` too: Lightning counts on from its batch index."""
        return self.batches

    def epoch(self, epoch: int) -> list[Key]:
        """Give the whole order of one epoch, all processes together."""
        generator = torch.Generator().manual_seed(hash((self.seed, epoch)) & (2**63 - 1))
        order = torch.randperm(self.length, generator=generator)
        if self.sizes is not None:
            order = torch.cat(
                [self._bucketed(part, generator) for part in torch.split(order, self.window * self.dealt)]
            )
        return [(epoch, index) for index in order.tolist()]

    def _bucketed(self, order: Tensor, generator: torch.Generator) -> Tensor:
        """Sort a window by size and shuffle its batches, those of all processes together; the last may be short."""
        assert self.sizes is not None
        batches = torch.split(order[self.sizes[order].argsort(stable=True)], self.dealt)
        whole = [batch for batch in batches if len(batch) == self.dealt]
        shuffled = [whole[i] for i in torch.randperm(len(whole), generator=generator).tolist()]
        return torch.cat([*shuffled, *batches[len(whole) :]])

    def __iter__(self) -> Iterator[list[Key]]:
        """Give batches of keys, from `start` on."""
        first = self.start * self.dealt  # cards dealt before
        epochs = (self.epoch(epoch) for epoch in count(first // self.length))
        cards = islice(chain.from_iterable(epochs), first % self.length + self.rank, None, self.world)
        for _ in range(self.start, self.batches):
            yield list(islice(cards, self.batch_size))


class BucketSampler(Sampler[list[Key]]):
    """Gives a fixed number of batches, each of samples of one kind, the same on all processes at the same time.

    So no process waits for another whose batch is larger. Each epoch is drawn from (seed, epoch) and has as many
    batches as any other; what a kind's last batch lacks are its first samples once more.

    Args:
        kinds: Of each sample.
        batch_sizes: Samples of each process's batch, of each kind.
        batches: Batches of the whole run.
        seed: Seed of the order.
        rank: This process.
        world: Number of processes.
        start: Batches that an earlier part of the run has used.
    """

    def __init__(
        self,
        kinds: Sequence[int],
        batch_sizes: Sequence[int],
        batches: int,
        *,
        seed: int = 0,
        rank: int = 0,
        world: int = 1,
        start: int = 0,
    ) -> None:
        of = torch.tensor(kinds)
        self.groups = [(of == kind).nonzero().flatten() for kind in range(len(batch_sizes))]
        self.dealt = [size * world for size in batch_sizes]
        self.batches = batches
        self.seed = seed
        self.rank = rank
        self.world = world
        self.start = start

    def __len__(self) -> int:
        """Count the batches of the whole run, those before `start` too."""
        return self.batches

    def epoch(self, epoch: int) -> list[list[Key]]:
        """Give the batches of one epoch, all processes together."""
        generator = torch.Generator().manual_seed(hash((self.seed, epoch)) & (2**63 - 1))
        found: list[list[Key]] = []
        for group, dealt in zip(self.groups, self.dealt, strict=True):
            order = group[torch.randperm(len(group), generator=generator)]
            whole = -(-len(order) // dealt) * dealt
            order = order.repeat(-(-whole // max(1, len(order))))[:whole]
            found += [[(epoch, index) for index in part.tolist()] for part in torch.split(order, dealt) if len(part)]
        return [found[i] for i in torch.randperm(len(found), generator=generator).tolist()]

    def __iter__(self) -> Iterator[list[Key]]:
        """Give batches of keys, from `start` on."""
        each = len(self.epoch(0))
        epochs = (self.epoch(epoch) for epoch in count(self.start // each))
        for batch in islice(
            chain.from_iterable(epochs), self.start % each, self.start % each + self.batches - self.start
        ):
            yield batch[self.rank :: self.world]
