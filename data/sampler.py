"""The order of samples: a function of the seed, so that a run can go on anywhere."""

from collections.abc import Iterator
from itertools import chain, count, islice

import torch
from torch.utils.data import Sampler

from .batch import Key

__all__ = ["UpdateBatchSampler"]


class UpdateBatchSampler(Sampler[list[Key]]):
    """Gives a fixed number of batches, crossing from one epoch of the data to the next where it must.

    Each epoch is a permutation drawn from (seed, epoch), dealt to the processes like cards.

    Args:
        length: Samples of the dataset.
        batch_size: Samples of each process's batch.
        batches: Batches of the whole run.
        seed: Seed of the order.
        rank: This process.
        world: Number of processes.
        start: Batches that an earlier part of the run has used.
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
    ) -> None:
        self.length = length
        self.batch_size = batch_size
        self.batches = batches
        self.seed = seed
        self.rank = rank
        self.world = world
        self.start = start

    def __len__(self) -> int:
        """Count the batches of the whole run, those before `start` too: Lightning counts on from its batch index."""
        return self.batches

    def epoch(self, epoch: int) -> list[Key]:
        """Give the whole order of one epoch, all processes together."""
        generator = torch.Generator().manual_seed(hash((self.seed, epoch)) & (2**63 - 1))
        return [(epoch, index) for index in torch.randperm(self.length, generator=generator).tolist()]

    def __iter__(self) -> Iterator[list[Key]]:
        """Give batches of keys, from `start` on."""
        first = self.start * self.batch_size * self.world  # cards dealt before
        epochs = (self.epoch(epoch) for epoch in count(first // self.length))
        cards = islice(chain.from_iterable(epochs), first % self.length + self.rank, None, self.world)
        for _ in range(self.start, self.batches):
            yield list(islice(cards, self.batch_size))
