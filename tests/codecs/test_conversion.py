"""A value of a configuration becomes what the annotation says, or a line that names its key and its range."""

import math
from collections.abc import Mapping, Sequence
from typing import Annotated

import pytest
from hypothesis import given
from hypothesis import strategies as st

from varitok import UserError
from varitok.codecs.conversion import RANGES, convert

ENDS = st.floats(-1e6, 1e6)


@given(low=ENDS, width=st.floats(0, 1e6), closed=st.tuples(st.booleans(), st.booleans()), value=st.floats())
def test_a_number_is_in_its_interval_or_refused(
    low: float, width: float, closed: tuple[bool, bool], value: float
) -> None:
    high = low + width
    interval = f"{'(['[closed[0]]}{low!r}, {high!r}{')]'[closed[1]]}"
    fits = low < value < high or (closed[0] and value == low) or (closed[1] and value == high)
    if fits:
        assert convert(value, Annotated[float, interval], "a.b") == value
    else:
        with pytest.raises(UserError, match=r"^a\.b(=|: expected a number)"):
            convert(value, Annotated[float, interval], "a.b")


@given(items=st.lists(st.integers(-3, 3)))
def test_every_number_of_a_list_is_checked(items: list[int]) -> None:
    if all(item >= 1 for item in items):
        assert convert(items, Sequence[int], "sizes", RANGES) == items
    else:
        first = next(index for index, item in enumerate(items) if item < 1)
        with pytest.raises(UserError, match=rf"^sizes\[{first}\]={items[first]}: must be at least 1$"):
            convert(items, Sequence[int], "sizes", RANGES)


@pytest.mark.parametrize(
    ("value", "hint", "message"),
    [
        (-1, Annotated[float, "(0, inf]", "inf doesn't clip"], "k=-1: must be above 0; inf doesn't clip"),
        (None, Annotated[float, "(0, inf]", "inf doesn't clip"], "k: expected a number, got None; inf doesn't clip"),
        (2, Annotated[float, "[0, 1)"], "k=2: must be at least 0 and below 1"),
        (0, Annotated[int | None, "[1, inf)", "null keeps all"], "k=0: must be at least 1; null keeps all"),
        (0, int | None, "k=0: must be at least 1; write null for none"),
        (-1, float, "k=-1: must be at least 0"),
        (math.inf, float, "k=inf: must be finite"),
        (-math.inf, float, "k=-inf: must be at least 0"),
        (math.inf, int, "k: expected a whole number, got inf"),
        (0, int | Sequence[int], "k=0: must be at least 1"),
        ([4, 0], int | Sequence[int], "k[1]=0: must be at least 1"),
        ([4], int | None, "k: expected a whole number or null, got [4]"),
        ([4], tuple[int, int] | None, "k: expected 2 values, each a whole number or null, got [4]"),
        ({"a": 1, "b": 0}, Mapping[str, Annotated[float, "(0, inf)"]], "k.b=0: must be above 0"),
    ],
)
def test_a_message_says_the_range_and_what_else_to_write(value: object, hint: object, message: str) -> None:
    with pytest.raises(UserError) as told:
        convert(value, hint, "k", RANGES)
    assert str(told.value) == message
