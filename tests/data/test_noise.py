"""Noise is a function of seed, channel and position, by integers that any language has."""

import math

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from varitok.data.noise import gaussian

MASK = (1 << 64) - 1


def mix(number):
    number = ((number ^ (number >> 30)) * 0xBF58476D1CE4E5B9) & MASK
    number = ((number ^ (number >> 27)) * 0x94D049BB133111EB) & MASK
    return number ^ (number >> 31)


def uniform(place, *key):
    """Compute a number in whole numbers alone, as JavaScript's BigInt would."""
    state = len(key)
    for number in key:
        state = mix((state + 0x9E3779B97F4A7C15) & MASK ^ mix(number))
    return (mix((place * 0x9E3779B97F4A7C15 + state) & MASK) >> 11) / (1 << 53)


@settings(max_examples=20)
@given(seed=st.integers(0, 2**32 - 1), channel=st.integers(0, 3), place=st.integers(0, 34))
def test_it_is_what_its_definition_says(seed, channel, place):
    first, second = uniform(2 * place, seed, channel), uniform(2 * place + 1, seed, channel)
    wanted = math.sqrt(-2 * math.log(1 - first)) * math.cos(2 * math.pi * second)
    assert abs(gaussian((4, 5, 7), seed)[channel].flat[place] - wanted) < 1e-6


def test_known_values():
    """They must never change: codes would decode to other signals."""
    wanted = [[0.9953635, -2.3737295, -1.2865376, -0.7364666], [1.5331186, 0.0201443, 0.8805634, 1.9968412]]
    found = gaussian((2, 4), seed=7)
    np.testing.assert_allclose(found, wanted, atol=1e-6)
    assert found.dtype == np.float32 and torch.from_numpy(found).dtype == torch.float32


def test_a_longer_signal_begins_with_the_noise_of_a_shorter_one():
    for longer, shorter in (((2, 9), (2, 5)), ((3, 6, 4), (3, 2, 4)), ((3, 4, 4), (1, 4, 4))):
        np.testing.assert_array_equal(gaussian(longer, 3)[: shorter[0], : shorter[1]], gaussian(shorter, 3))


def test_numbers_are_normal_and_independent():
    found = gaussian((3, 200, 100), seed=1).astype(float)
    count = found.size
    for power, moment in ((1, 0), (2, 1), (3, 0), (4, 3)):
        spread = math.sqrt(math.prod(range(2 * power - 1, 0, -2)) / count)  # of the mean of a normal number's power
        assert abs((found**power).mean() - moment) < 4 * spread, power
    for other in (found[:, 1:], found[:, :, 1:], found[1:], gaussian(found.shape, seed=2)):
        one = found[tuple(slice(side) for side in other.shape)]
        assert abs(np.corrcoef(one.ravel(), other.ravel())[0, 1]) < 4 / math.sqrt(other.size)
