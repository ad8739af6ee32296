"""Crops: boxes are inside, uniformly distributed."""

import torch
from hypothesis import given
from hypothesis import strategies as st

from varitok.data.datasets.crops import random_box
from varitok.data.decoding.framing import center_box

SIDES = st.integers(1, 97)
BOXES = st.lists(st.tuples(SIDES, SIDES), min_size=1, max_size=3).map(lambda pairs: tuple(zip(*pairs, strict=True)))


@given(boxes=BOXES, seed=st.integers(0, 2**31))
def test_a_box_lies_inside_and_is_as_large_as_it_can_be(boxes: tuple[tuple[int, ...], ...], seed: int) -> None:
    shape, size = boxes
    for box in (center_box(shape, size), random_box(shape, size, torch.Generator().manual_seed(seed))):
        assert [length for _, length in box] == [min(pair) for pair in zip(shape, size, strict=True)]
        assert all(0 <= start <= whole - length for (start, length), whole in zip(box, shape, strict=True))


@given(boxes=BOXES)
def test_a_centred_box_leaves_as_much_on_both_sides(boxes: tuple[tuple[int, ...], ...]) -> None:
    shape, size = boxes
    for (start, length), whole in zip(center_box(shape, size), shape, strict=True):
        assert whole - length - start - start in (0, 1)


@given(seed=st.integers(0, 2**31))
def test_a_seed_gives_one_box(seed: int) -> None:
    first, second = (random_box((90, 70), (7, 9), torch.Generator().manual_seed(seed)) for _ in range(2))
    assert first == second


def test_every_place_is_drawn() -> None:
    generator = torch.Generator().manual_seed(0)
    places = {tuple(start for start, _ in random_box((5, 4), (3, 3), generator)) for _ in range(200)}
    assert places == {(y, x) for y in range(3) for x in range(2)}
