"""How much is kept, against brute force."""

from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from varitok import UserError
from varitok.export.bitstream.rate_control import Encoded, Quality, Target, fit_to_target, psnr

N = 12


def row(seed):
    """Return a row of bright pixels, and its code: a token for each."""
    original = np.random.default_rng(seed).uniform(0.3, 1, (1, 1, 1, N)).astype(np.float32)
    return original, Encoded(np.arange(N)[None, None], (), np.ones(N, np.int64), None)


def decode(part, original):
    """Decode a prefix of the row: missing pixels are black."""
    return np.where(np.arange(N) < part.codes.shape[2], original, 0).astype(np.float32)


def kept(whole, quality, measure):
    """Return how many tokens are kept for a quality."""
    return fit_to_target(SimpleNamespace(tokens=N), whole, Target(quality=quality), measure).codes.shape[2]


def l1(back, original):
    return float(np.abs(back - original).mean())


@pytest.mark.parametrize("name", ["psnr", "l1"])
@given(share=st.floats(-0.2, 1.2), seed=st.integers(0, 3))
def test_the_fewest_tokens_that_reach_a_quality(name, share, seed):
    (original, whole), lower = row(seed), name == "l1"
    metric = l1 if lower else psnr(0).measure

    def measure(part):
        return metric(decode(part, original), original)

    every = [measure(whole.cut(k, True)) for k in range(1, N + 1)]
    assert every == sorted(every, reverse=lower) and len(set(every)) == N, "the example has to be monotone"
    wanted = min(every) + share * (max(every) - min(every))
    enough = [k for k, value in enumerate(every, 1) if (value <= wanted if lower else value >= wanted)]
    if enough:
        assert kept(whole, Quality(name, wanted, metric, lower), measure) == enough[0]
    else:
        with pytest.raises(UserError, match="ask for no better than that"):
            kept(whole, Quality(name, wanted, metric, lower), measure)


@given(wanted=st.floats(0, 1), values=st.lists(st.floats(0, 1), min_size=N, max_size=N))
def test_where_more_tokens_are_not_always_better_the_quality_still_holds(wanted, values):
    found = Quality("luck", wanted, l1)
    try:
        assert values[kept(row(0)[1], found, lambda part: values[part.codes.shape[2] - 1]) - 1] >= wanted
    except UserError:
        assert all(values[k - 1] < wanted for k in (1, 2, 4, 8, N))


@pytest.mark.parametrize(("given", "found"), [(12, [1, 5, 12]), (7, [1, 5, 7])])
def test_layers_of_codebooks_are_kept_whole(given, found):
    """VAR's decoder never sees a part of a scale in training."""
    bundle = SimpleNamespace(tokens=0, codebook_layers=(1, 4, 7))
    whole = Encoded(np.zeros((1, given, 2, 2), np.int64), (), np.ones(2, np.int64), None)
    for wanted in range(1, given + 1):
        target = Target(quality=Quality("codes", wanted, l1))
        kept = fit_to_target(bundle, whole, target, lambda part: part.codes.shape[1]).codes.shape[1]
        assert kept == next(k for k in found if k >= wanted)


def test_what_has_no_quality_is_told():
    with pytest.raises(UserError, match="luck is undefined"):
        kept(row(0)[1], Quality("luck", 1.0, l1), lambda _: float("nan"))


def test_psnr_in_decibels():
    measure = psnr(0).measure
    assert measure(np.full((1, 3, 4, 4), 0.2), np.zeros((1, 3, 4, 4), np.float32)) == pytest.approx(20)
    assert measure(*np.ones((2, 1, 1, 4, 4), np.float32)) == 100


@given(cuts=st.lists(st.integers(1, 99), unique=True), seed=st.integers(0, 3))
def test_the_psnr_of_parts_is_the_wholes(cuts, seed):
    quality = psnr(0)
    back, original = np.random.default_rng(seed).uniform(-1, 1, (2, 1, 2, 100)).astype(np.float32)
    parts = list(zip(*(np.split(one, sorted(cuts), axis=2) for one in (back, original)), strict=True))
    values, lengths = [quality.measure(*part) for part in parts], [part[0].shape[2] for part in parts]
    assert quality.combine(values, lengths) == pytest.approx(quality.measure(back, original))
