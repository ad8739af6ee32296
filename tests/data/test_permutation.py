"""Permutations and random numbers that are computed, not drawn."""

import tracemalloc

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from varitok.data.permutation import Permutation, uniform


@settings(max_examples=15)
@given(length=st.integers(1, 3000), key=st.tuples(st.integers(0, 2**63), st.integers(0, 99)))
def test_each_element_comes_once(length, key):
    order = Permutation(length, *key)
    whole = order(np.arange(length))
    np.testing.assert_array_equal(np.sort(whole), np.arange(length))
    some = np.arange(length)[::-7]
    np.testing.assert_array_equal(order(some), whole[some])


@pytest.mark.parametrize("length", [5000, 2**20 + 1])
def test_elements_and_their_neighbors_are_spread_evenly(length):
    rows, columns, following = [], [], []
    for number in range(60):
        some = (uniform(np.arange(60), number) * (length - 1)).astype(int)
        order = Permutation(length, number, 1)
        rows.append(some)
        columns.append(order(some))
        following.append(order(some + 1))
    for pair in ((rows, columns), (columns, following)):
        seen = np.zeros((8, 8))
        np.add.at(seen, tuple(np.concatenate(one) * 8 // length for one in pair), 1)
        expected = seen.sum(1, keepdims=True) * seen.sum(0, keepdims=True) / seen.sum()
        assert ((seen - expected) ** 2 / expected).sum() < 95  # chi-squared, 49 degrees of freedom: p = 1e-4


def test_a_permutation_needs_no_memory():
    tracemalloc.start()
    order = Permutation(10**12, 0, 1)
    found = order(np.arange(10**11, 10**11 + 100))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert len(set(found.tolist())) == 100 and found.max() < 10**12 and peak < 100_000
    assert not (Permutation(10**12, 0, 2)(np.arange(100)) == Permutation(10**12, 1, 1)(np.arange(100))).any()


def test_random_numbers_are_uniform_and_independent_of_what_else_is_asked():
    found = uniform(np.arange(10_000), 3)
    assert 0 <= found.min() and found.max() < 1
    np.testing.assert_allclose(np.histogram(found, 10)[0], 1000, rtol=0.12)
    np.testing.assert_array_equal(uniform(np.array([77, 5]), 3), found[[77, 5]])
    assert abs(np.corrcoef(found[:-1], found[1:])[0, 1]) < 0.03
    assert not (uniform(np.arange(10_000), 4) == found).any()
