"""The order of samples: dealt out whole, each to one process, and found again after a stop."""

from itertools import chain, pairwise
from unittest import mock

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from varitok.data import sampler
from varitok.data.batch import Key, sample_generator
from varitok.data.sampler import BucketSampler, LengthSampler, UpdateBatchSampler

LENGTHS, SIZES, WORLDS, BATCHES = st.integers(1, 40), st.integers(1, 7), st.integers(1, 4), st.integers(0, 12)
BLOCKS, MOST_DRAWN = st.integers(1, 3), st.sampled_from([0, 1 << 20])  # 0: all permutations are computed


def dealt(length: int, size: int, batches: int, world: int, block: int = 1) -> list[Key]:
    """All keys that the processes get, in the order of the updates."""
    form = {"batches": batches, "seed": 3, "world": world, "block": block}
    ranks = [list(UpdateBatchSampler(length, size, **form, rank=rank)) for rank in range(world)]
    assert all(len(batch) == size for batch in chain.from_iterable(ranks))
    assert all(len(rank) == batches for rank in ranks)
    places = range(0, size, block)
    return [key for b in range(batches) for i in places for rank in ranks for key in rank[b][i : i + block]]


@settings(max_examples=15)
@given(length=LENGTHS, blocks=SIZES, batches=BATCHES, world=WORLDS, block=BLOCKS, most=MOST_DRAWN)
def test_processes_share_each_epoch_without_overlap_or_gap(length, blocks, batches, world, block, most) -> None:
    with mock.patch.object(sampler, "MOST_DRAWN", most):
        keys = dealt(length, blocks * block, batches, world, block)
        assert keys == dealt(length, blocks * block * world, batches, 1, block), "whatever the number of processes"
    assert len(keys) == len(set(keys)) == blocks * block * batches * world
    for epoch in range(len(keys) // length):
        order = keys[epoch * length : (epoch + 1) * length]
        assert sorted(order) == [(epoch, index) for index in range(length)]
        for (_, one), (_, other) in pairwise(order):
            if order.index((epoch, one)) % block < block - 1:
                assert other == (one + 1) % length, "blocks are read in order"


@settings(max_examples=15)
@given(length=LENGTHS, blocks=SIZES, batches=BATCHES, world=WORLDS, block=BLOCKS, most=MOST_DRAWN, data=st.data())
def test_a_later_start_gives_the_rest(length, blocks, batches, world, block, most, data) -> None:
    start, rank = data.draw(st.integers(0, batches)), data.draw(st.integers(0, world - 1))
    form = {"batches": batches, "rank": rank, "world": world, "block": block}
    with mock.patch.object(sampler, "MOST_DRAWN", most):
        whole = UpdateBatchSampler(length, blocks * block, **form)
        rest = UpdateBatchSampler(length, blocks * block, **form, start=start)
        assert list(rest) == list(whole)[start:]
        assert len(rest) == len(whole) == batches


def test_the_order_of_a_small_dataset_is_the_one_it_always_had() -> None:
    drawn = torch.randperm(9, generator=sample_generator(5, (2,))).tolist()
    (batch,) = list(UpdateBatchSampler(9, 9, batches=3, seed=5, start=2))
    assert batch == [(2, index) for index in drawn]


def test_seed_and_epoch_change_the_order() -> None:
    places = np.arange(50)
    orders = {
        tuple(UpdateBatchSampler(50, 1, batches=1, seed=seed).order(e)(places)) for seed in (0, 1) for e in (0, 1)
    }
    assert len(orders) == 4


KINDS = st.lists(st.integers(0, 2), min_size=1, max_size=30)


@given(kinds=KINDS, sizes=st.tuples(SIZES, SIZES, SIZES), batches=BATCHES, world=WORLDS, data=st.data())
def test_a_batch_is_of_one_kind_on_all_processes(kinds, sizes, batches, world, data) -> None:
    ranks = [list(BucketSampler(kinds, sizes, batches=batches, rank=rank, world=world)) for rank in range(world)]
    for together in zip(*ranks, strict=True):
        (kind,) = {kinds[index] for batch in together for _, index in batch}
        assert all(len(batch) == sizes[kind] for batch in together)
    assert all(len(rank) == batches for rank in ranks)
    start, rank = data.draw(st.integers(0, batches)), data.draw(st.integers(0, world - 1))
    rest = BucketSampler(kinds, sizes, batches=batches, rank=rank, world=world, start=start)
    assert list(rest) == ranks[rank][start:] and len(rest) == batches


@given(kinds=KINDS, sizes=st.tuples(SIZES, SIZES, SIZES), world=WORLDS)
def test_an_epoch_has_every_sample(kinds, sizes, world) -> None:
    batches = BucketSampler(kinds, sizes, batches=1, world=world).epoch(4)
    assert {(epoch, index) for epoch, batch in batches for index in batch.tolist()} == {
        (4, index) for index in range(len(kinds))
    }
    assert len(batches) == len(BucketSampler(kinds, sizes, batches=1, world=world).epoch(5))


OF = st.lists(st.integers(1, 1000), min_size=1, max_size=40)
BUDGETS = st.one_of(st.none(), st.integers(1, 5000))


@given(lengths=OF, size=SIZES, budget=BUDGETS, world=WORLDS, batches=BATCHES, data=st.data())
def test_a_batch_has_about_one_length_and_keeps_to_its_budget(lengths, size, budget, world, batches, data) -> None:
    form = {"share": 0.1, "budget": budget, "batches": batches, "world": world}
    ranks = [list(LengthSampler(lengths, size, **form, rank=rank)) for rank in range(world)]
    for together in zip(*ranks, strict=True):
        (count,) = {len(batch) for batch in together}
        longest = max(lengths[index] for batch in together for _, index in batch)
        assert 1 <= count <= size
        assert budget is None or count == 1 or count * longest <= 1.1 * budget
    assert all(len(rank) == batches for rank in ranks)
    start, rank = data.draw(st.integers(0, batches)), data.draw(st.integers(0, world - 1))
    rest = LengthSampler(lengths, size, **form, rank=rank, start=start)
    assert list(rest) == ranks[rank][start:] and len(rest) == batches


@given(lengths=OF, size=SIZES, budget=BUDGETS, world=WORLDS)
def test_an_epoch_of_lengths_has_every_sample_and_few_twice(lengths, size, budget, world) -> None:
    order = LengthSampler(lengths, size, batches=1, budget=budget, world=world)
    batches = order.epoch(4)
    keys = [(epoch, index) for epoch, batch in batches for index in batch.tolist()]
    assert set(keys) == {(4, index) for index in range(len(lengths))}
    assert len(keys) < len(lengths) + world
    assert len(batches) == len(order.epoch(5))


def test_others_share_a_batch_in_each_epoch() -> None:
    lengths = list(range(1000, 1040))
    epochs = [LengthSampler(lengths, 4, batches=1, share=0.05).epoch(number) for number in range(2)]
    one, two = ({frozenset(batch.tolist()) for _, batch in epoch} for epoch in epochs)
    assert not one & two


def test_hardly_anything_is_filled_up() -> None:
    lengths = list(range(1000, 21000, 10))
    batches = LengthSampler(lengths, 999, batches=1, budget=8 * max(lengths)).epoch(0)
    whole = sum(len(batch) * max(lengths[index] for index in batch) for _, batch in batches)
    assert 1 - sum(lengths) / whole < 0.05
