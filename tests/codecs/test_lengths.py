"""Lengths: masks, distributions, the policy."""

from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from varitok.codecs.lengths import (
    Full,
    LengthPolicy,
    PowersOfTwo,
    Truncate,
    Uniform,
    ladder,
    masked_mean,
    prefix_mask,
)

from .examples import MECHANISMS, WIDTH


@given(st.integers(1, 5000))
def test_ladder_rises_by_doubling_and_ends_at_the_total(total):
    rungs = ladder(total)
    assert rungs[0] == 1 and rungs[-1] == total and rungs == sorted(set(rungs))
    assert all(b <= 2 * a for a, b in pairwise(rungs))


@given(st.lists(st.integers(0, 9), min_size=1, max_size=6))
def test_masked_mean_is_the_mean_over_valid_steps(lengths):
    values = torch.arange(len(lengths) * 9.0).view(-1, 9)
    means = [values[i, :k].mean() if k else torch.tensor(0.0) for i, k in enumerate(lengths)]
    mask = prefix_mask(torch.tensor(lengths), 9)
    torch.testing.assert_close(masked_mean(values, mask), torch.stack(means).mean())


@pytest.mark.parametrize("distribution", [Full(), Uniform(), PowersOfTwo()])
@given(total=st.integers(1, 300), seed=st.integers(0, 5))
def test_lengths_lie_in_range(distribution, total, seed):
    lengths = distribution(50, total, torch.Generator().manual_seed(seed))
    assert lengths.dtype == torch.int64 and lengths.shape == (50,)
    assert lengths.min() >= 1 and lengths.max() <= total


def test_distributions_are_what_they_say():
    random = torch.Generator().manual_seed(0)
    uniform = Uniform()(40000, 8, random).bincount(minlength=9)[1:] / 40000
    torch.testing.assert_close(uniform, torch.full((8,), 1 / 8), atol=0.01, rtol=0)
    powers = PowersOfTwo()(40000, 12, random).bincount(minlength=13) / 40000
    torch.testing.assert_close(powers[[1, 2, 4, 8, 12]], torch.full((5,), 1 / 5), atol=0.01, rtol=0)
    assert set(Full()(9, 12, None).tolist()) == {12}


def test_share_of_full_length():
    policy = LengthPolicy(PowersOfTwo(), Truncate(), full_share=0.3)
    lengths = policy.sample(40000, 1024, torch.Generator().manual_seed(0))
    assert (lengths == 1024).float().mean().item() == pytest.approx(0.3 + 0.7 / 11, abs=0.01)


def test_granularity():
    random = torch.Generator().manual_seed(0)
    batch = LengthPolicy(Uniform(), Truncate(), granularity="batch").sample(64, 1000, random)
    sample = LengthPolicy(Uniform(), Truncate(), granularity="sample").sample(64, 1000, random)
    assert batch.shape == sample.shape == (64,)
    assert len(batch.unique()) == 1 and len(sample.unique()) > 30


@pytest.mark.parametrize("name", MECHANISMS)
def test_what_is_dropped_can_not_be_seen(name):
    latents, lengths = torch.randn(4, 6, WIDTH), torch.tensor([6, 1, 3, 5])
    mechanism = MECHANISMS[name]()
    hidden, mask = mechanism(latents, lengths)
    kept = prefix_mask(lengths, 6)
    assert torch.equal(hidden[kept], latents[kept])
    if mask is None:
        assert not torch.isin(hidden[~kept], latents).any()
    else:
        assert torch.equal(mask, kept)
