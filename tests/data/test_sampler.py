"""The order of samples: dealt out whole, each to one process, and found again after a stop."""

from itertools import chain

from hypothesis import given
from hypothesis import strategies as st

from varitok.data.batch import Key
from varitok.data.sampler import BucketSampler, LengthSampler, UpdateBatchSampler

LENGTHS, SIZES, WORLDS, BATCHES = st.integers(1, 40), st.integers(1, 7), st.integers(1, 4), st.integers(0, 12)


def dealt(length: int, size: int, batches: int, world: int) -> list[Key]:
    """All keys that the processes get, in the order of the updates."""
    ranks = [
        list(UpdateBatchSampler(length, size, batches=batches, seed=3, rank=rank, world=world)) for rank in range(world)
    ]
    assert all(len(batch) == size for batch in chain.from_iterable(ranks))
    assert all(len(rank) == batches for rank in ranks)
    return [rank[b][i] for b in range(batches) for i in range(size) for rank in ranks]


@given(length=LENGTHS, size=SIZES, batches=BATCHES, world=WORLDS)
def test_processes_share_each_epoch_without_overlap_or_gap(length: int, size: int, batches: int, world: int) -> None:
    keys = dealt(length, size, batches, world)
    assert len(keys) == len(set(keys)) == size * batches * world
    for epoch in range(len(keys) // length):
        assert sorted(keys[epoch * length : (epoch + 1) * length]) == [(epoch, index) for index in range(length)]


@given(length=LENGTHS, size=SIZES, batches=BATCHES, world=WORLDS)
def test_the_number_of_processes_does_not_change_the_order(length: int, size: int, batches: int, world: int) -> None:
    assert dealt(length, size, batches, world) == dealt(length, size * world, batches, 1)


@given(length=LENGTHS, size=SIZES, batches=BATCHES, world=WORLDS, data=st.data())
def test_a_later_start_gives_the_rest(length: int, size: int, batches: int, world: int, data: st.DataObject) -> None:
    start, rank = data.draw(st.integers(0, batches)), data.draw(st.integers(0, world - 1))
    whole = UpdateBatchSampler(length, size, batches=batches, rank=rank, world=world)
    rest = UpdateBatchSampler(length, size, batches=batches, rank=rank, world=world, start=start)
    assert list(rest) == list(whole)[start:]
    assert len(rest) == len(whole) == batches


def test_seed_and_epoch_change_the_order() -> None:
    orders = {
        tuple(i for _, i in UpdateBatchSampler(50, 1, batches=1, seed=seed).epoch(e)) for seed in (0, 1) for e in (0, 1)
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
    assert {key for batch in batches for key in batch} == {(4, index) for index in range(len(kinds))}
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
    sampler = LengthSampler(lengths, size, batches=1, budget=budget, world=world)
    batches = sampler.epoch(4)
    keys = [key for batch in batches for key in batch]
    assert set(keys) == {(4, index) for index in range(len(lengths))}
    assert len(keys) < len(lengths) + world
    assert len(batches) == len(sampler.epoch(5))


def test_others_share_a_batch_in_each_epoch() -> None:
    lengths = list(range(1000, 1040))
    epochs = [LengthSampler(lengths, 4, batches=1, share=0.05).epoch(number) for number in range(2)]
    one, two = ({frozenset(index for _, index in batch) for batch in epoch} for epoch in epochs)
    assert not one & two


def test_hardly_anything_is_filled_up() -> None:
    lengths = list(range(1000, 21000, 10))
    batches = LengthSampler(lengths, 999, batches=1, budget=8 * max(lengths)).epoch(0)
    whole = sum(len(batch) * max(lengths[index] for _, index in batch) for batch in batches)
    assert 1 - sum(lengths) / whole < 0.05
