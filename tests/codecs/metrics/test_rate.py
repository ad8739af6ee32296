"""Prices of codes and the use of codebooks."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from varitok.codecs.metrics.rate import CodeCounts, entropy, packed_bytes


@pytest.mark.parametrize(
    ("codebooks", "k", "expected"), [((4096,), 2, 3), ((4096,), 1, 2), ((1000,), 4, 5), ((8, 8, 5), 3, 4), ((1,), 9, 0)]
)
def test_packed_bytes_by_hand(codebooks: tuple[int, ...], k: int, expected: int) -> None:
    assert packed_bytes(codebooks, k) == expected


@given(st.lists(st.integers(1, 2**18), min_size=1, max_size=8), st.integers(1, 512))
def test_a_packing_is_never_smaller_than_the_exact_bits(codebooks: list[int], k: int) -> None:
    exact = k * sum(math.log2(size) for size in codebooks)
    assert exact / 8 - 1e-6 <= packed_bytes(codebooks, k) <= (exact + k * len(codebooks)) / 8 + 1


def test_counts_of_each_codebook() -> None:
    codes = torch.tensor([[[0, 1, 1], [2, 2, 2]], [[1, 0, 1], [0, 2, 2]]])
    counts = CodeCounts((2, 2**36), torch.device("cpu"))  # the second is too large for a counter of each entry
    kept = torch.ones_like(codes, dtype=torch.bool)
    kept[0, 0, 0] = False
    counts.add(codes, kept)
    first, second = counts.codebooks()
    assert sorted(first.tolist()) == [1, 4] and sorted(second.tolist()) == [1, 5]


def test_codebooks_of_a_layer_are_counted_together() -> None:
    codes, sizes = torch.randint(0, 5, (3, 6, 4)), (5, 2**40, 2**40, 7, 7, 7)
    kept = torch.rand(codes.shape) < 0.7
    counts = CodeCounts(sizes, layers=[1, 2, 3])
    counts.add(codes, kept)
    assert counts.codebook_sizes == (5, 2**40, 7)
    for found, (start, end) in zip(counts.codebooks(), [(0, 1), (1, 3), (3, 6)], strict=True):
        wanted = codes[:, start:end][kept[:, start:end]].unique(return_counts=True)[1]
        assert sorted(found.tolist()) == sorted(wanted.tolist())
    again = CodeCounts(sizes, layers=[1, 2, 3])
    again.include(counts.rows())
    assert again.summary() == counts.summary()


def test_even_use_of_a_codebook() -> None:
    counts = CodeCounts((64,))
    counts.add(torch.arange(64).repeat(7)[None, None])
    (use,) = counts.summary()
    assert (use.entries, use.codes, use.entropy, use.perplexity) == pytest.approx((64, 7 * 64, 6, 64))


def test_one_entry_only_and_nothing_at_all() -> None:
    assert entropy(torch.tensor([0, 9, 0, 0])) == 0
    assert entropy(torch.zeros(4, dtype=torch.int64)) == 0


def test_entropy_of_an_uneven_codebook() -> None:
    assert entropy(torch.tensor([2, 1, 1])) == pytest.approx(1.5)
