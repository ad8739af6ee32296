"""Lengths: masks, distributions, mechanisms, the policy on both axes."""

import inspect
from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from omegaconf import OmegaConf

from varitok import UserError
from varitok.codecs.build import build, build_codec
from varitok.codecs.lengths.distributions import (
    Curriculum,
    FallingMinimum,
    FixedSet,
    Full,
    LogUniform,
    PowerLaw,
    PowersOfTwo,
    Range,
    RoundedUp,
    TruncatedNormal,
    Uniform,
    ladder,
)
from varitok.codecs.lengths.policy import Axis, BatchShard, LengthPolicy, MaskToken, Truncate, Zeros
from varitok.codecs.masking import masked_mean, prefix_mask
from varitok.export.exporters.frozen import FrozenCodec

from ...composing import composed
from ..examples import SIZE, TOKENS, WIDTH, tiny_codec

MECHANISMS = {"truncate": Truncate, "mask_token": lambda: MaskToken(WIDTH), "zeros": Zeros}
DISTRIBUTIONS = {
    "full": Full(),
    "uniform": Uniform(),
    "uniform_from": Uniform(0.3),
    "log_uniform": LogUniform(),
    "powers_of_two": PowersOfTwo(),
    "rounded_up": RoundedUp(),
    "fixed_set": FixedSet([1]),
    "range": Range(),
    "range_stride": Range(1, None, 7),
    "truncated_normal": TruncatedNormal(),
    "truncated_normal_tails": TruncatedNormal(mean=-3, deviation=0.1, low=0.5),
    "truncated_normal_other_tail": TruncatedNormal(mean=4, deviation=0.1, low=0.1, high=0.7),
    "power_law": PowerLaw(-2, 40),
    "falling_minimum": FallingMinimum(),
    "curriculum": Curriculum(Full(), LogUniform(), until=0.7, power=2),
}
CONFIGS = [
    "tail_drop", "full", "nested_dropout", "elastic", "adaptive_normal", "quantizer_dropout", "two_axes", "curriculum",
    "halting",
]  # fmt: skip


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def configured(name):
    """Compose a small run with a length policy."""
    return composed(f"length={name}", "codec=register_vit_tiny")


def shares(distribution, total, progress=1.0, count=40000):
    """Count how often each length from 1 on is drawn."""
    return distribution(count, total, seeded(), progress).bincount(minlength=total + 1)[1:] / count


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


@pytest.mark.parametrize("name", DISTRIBUTIONS)
@given(total=st.integers(1, 300), seed=st.integers(0, 5), progress=st.floats(0, 1))
def test_lengths_lie_in_range_and_come_again(name, total, seed, progress):
    lengths = DISTRIBUTIONS[name](50, total, seeded(seed), progress)
    assert lengths.dtype == torch.int64 and lengths.shape == (50,) and lengths.device.type == "cpu"
    assert lengths.min() >= 1 and lengths.max() <= total
    assert torch.equal(lengths, DISTRIBUTIONS[name](50, total, seeded(seed), progress))


@pytest.mark.parametrize(
    ("distribution", "total", "expected"),
    [
        (Full(), 3, [0, 0, 1]),
        (Uniform(), 4, [1 / 4] * 4),
        (Uniform(0.5), 4, [0, 1 / 3, 1 / 3, 1 / 3]),
        (LogUniform(), 3, [0.5, 0.29248, 0.20752]),
        (PowersOfTwo(), 6, [1 / 4, 1 / 4, 0, 1 / 4, 0, 1 / 4]),
        (RoundedUp(), 8, [1 / 8, 1 / 8, 0, 2 / 8, 0, 0, 0, 4 / 8]),
        (RoundedUp(), 6, [1 / 6, 1 / 6, 0, 2 / 6, 0, 2 / 6]),
        (FixedSet([1, 2, 2, 4]), 5, [1 / 4, 1 / 2, 0, 1 / 4, 0]),
        (Range(3, 5), 6, [0, 0, 1 / 3, 1 / 3, 1 / 3, 0]),
        (Range(2, None, 2), 7, [0, 1 / 3, 0, 1 / 3, 0, 1 / 3, 0]),
        (PowerLaw(0, 2), 3, [1 / 14, 4 / 14, 9 / 14]),
        (FallingMinimum(), 3, [1 / 3] * 3),
        (Curriculum(Full(), Uniform()), 2, [1 / 2, 1 / 2]),
    ],
)
def test_distributions_are_what_they_say(distribution, total, expected):
    torch.testing.assert_close(
        shares(distribution, total), torch.tensor(expected, dtype=torch.float32), atol=0.01, rtol=0
    )


@pytest.mark.parametrize(("mean", "low", "high"), [(0.5, 0.0625, 1.0), (0.2, 0.5, 0.9), (0.9, 0.1, 0.4)])
def test_truncated_normal_is_a_normal_distribution_in_its_bounds(mean, low, high):
    drawn = TruncatedNormal(mean, 0.25, low, high)(40000, 4096, seeded()) / 4096
    normal = torch.randn(2_000_000, generator=seeded(1)) * 0.25 + mean
    expected = normal[(normal >= low) & (normal <= high)]
    assert drawn.min() >= low - 2e-4 and drawn.max() <= high + 2e-4
    at = torch.tensor([0.05, 0.25, 0.5, 0.75, 0.95])
    torch.testing.assert_close(drawn.quantile(at), expected[:200_000].quantile(at), atol=0.01, rtol=0)


def test_bounds_that_are_far_from_the_mean():
    assert TruncatedNormal(mean=-3, deviation=0.1, low=0.5)(500, 10, seeded()).unique().tolist() == [5]
    assert TruncatedNormal(mean=4, deviation=0.1, low=0.1, high=0.7)(500, 10, seeded()).unique().tolist() == [7]
    assert PowerLaw(-2000, 0)(500, 100, seeded(), 0.0).unique().tolist() == [1]


def test_curricula_move():
    def mean(distribution, progress):
        return distribution(20000, 101, seeded(), progress).float().mean().item()

    for distribution, start, halfway, end in [
        (FallingMinimum(1.0), 101, 76, 51),
        (FallingMinimum(0.5), 101, 51, 51),
        (FallingMinimum(1.0, power=2), 101, 88.5, 51),
        (Curriculum(Full(), Uniform(), until=1.0), 101, 76, 51),
        (Curriculum(Full(), Uniform(), until=0.5), 101, 51, 51),
        (Curriculum(Full(), Uniform(), until=1.0, power=2), 101, 88.5, 51),
        (PowerLaw(0, 1), 51, 61, 67.7),
    ]:
        found = [mean(distribution, progress) for progress in (0, 0.5, 1)]
        assert found == pytest.approx([start, halfway, end], abs=1.0)
    policy = LengthPolicy(FallingMinimum(), Truncate(), codebooks=Axis(FallingMinimum()))
    for kept in policy.sample(8, 100, 100, progress=0.0)[:2]:
        assert set(kept.tolist()) == {100}
    for kept in policy.sample(8, 100, 100, progress=1.0)[:2]:
        assert kept.min() < 100


@pytest.mark.parametrize(
    "wrong",
    [
        lambda: FixedSet([]),
        lambda: FixedSet([1, 9])(4, 8, None),
        lambda: Range(5, 4),
        lambda: Range(9)(4, 8, None),
        lambda: Range(3, 9)(4, 8, None),
        lambda: TruncatedNormal(low=0.5, high=0.4),
        lambda: LengthPolicy(Full(), Truncate(), codebooks=Axis(Uniform())).sample(2, 8, 0),
    ],
)
def test_what_can_not_be_is_one_line(wrong):
    with pytest.raises(UserError, match=r"^[^\n]+$"):
        wrong()


@given(share=st.floats(0, 1), deep=st.floats(0, 1), seed=st.integers(0, 3))
def test_share_of_full_length_on_each_axis(share, deep, seed):
    policy = LengthPolicy(PowersOfTwo(), Truncate(), full_share=share, codebooks=Axis(PowersOfTwo(), full_share=deep))
    lengths, depth, _ = policy.sample(40000, 1024, 8, seed=(seed,))
    assert (lengths == 1024).float().mean().item() == pytest.approx(share + (1 - share) / 11, abs=0.015)
    assert (depth == 8).float().mean().item() == pytest.approx(deep + (1 - deep) / 4, abs=0.015)


def test_axes_are_drawn_apart():
    policy = LengthPolicy(Uniform(), Truncate(), codebooks=Axis(Uniform()))
    lengths, depth, _ = policy.sample(20000, 16, 16)
    assert abs(torch.corrcoef(torch.stack([lengths, depth]).float())[0, 1]) < 0.03
    assert depth.min() == 1 and depth.max() == 16
    # What the codebooks do doesn't move the steps.
    assert torch.equal(LengthPolicy(Uniform(), Truncate()).sample(20000, 16, 16).lengths, lengths)
    assert set(LengthPolicy(Uniform(), Truncate()).sample(5, 16, 3).n_codebooks.tolist()) == {3}
    assert set(LengthPolicy(Uniform(), Truncate()).sample(5, 16, 0).n_codebooks.tolist()) == {0}


@pytest.mark.parametrize("axis", ["lengths", "n_codebooks"])
def test_granularity(axis):
    def draw(granularity, rank, batch):
        policy = LengthPolicy(Uniform(), Truncate(), granularity, codebooks=Axis(Uniform(), granularity))
        return getattr(policy.sample(64, 1000, 1000, seed=(3, batch), dealt=BatchShard(rank, 2)), axis)

    for granularity in ("sample", "batch", "step"):
        first = draw(granularity, 0, 0)
        assert first.shape == (64,) and torch.equal(first, draw(granularity, 0, 0))
        assert (len(first.unique()) > 30) if granularity == "sample" else (len(first.unique()) == 1)
        assert torch.equal(first, draw(granularity, 1, 0)) == (granularity == "step")
        assert not torch.equal(first, draw(granularity, 0, 1))


@pytest.mark.parametrize("mechanism", MECHANISMS)
@torch.no_grad()
def test_samples_of_one_length_are_cut_instead_of_masked(mechanism):
    """The decoder of a `truncate` codec sees only the tokens kept, without a mask; the signals are the same."""
    codec, images = codec_with(mechanism), torch.rand(3, 3, SIZE, SIZE) * 2 - 1
    for granularity in ("sample", "batch"):
        kept = LengthPolicy(Uniform(), Truncate(), granularity).sample(3, TOKENS)
        assert kept.common == (kept.lengths[0] if granularity == "batch" else None)
    seen = []
    codec.decoder.register_forward_pre_hook(lambda _, given: seen.append(given[:2]))
    cut = codec(images, kept.lengths, common=kept.common).signal
    torch.testing.assert_close(cut, codec(images, kept.lengths).signal, atol=1e-5, rtol=0)
    assert seen[0][1] is None and seen[0][0].shape[1] == (kept.common if mechanism == "truncate" else TOKENS)


@given(each=st.integers(1, 5), processes=st.integers(1, 4), blocks=st.integers(1, 3))
def test_a_samples_length_is_its_own_whichever_process_has_it(each, processes, blocks):
    policy = LengthPolicy(Uniform(), Truncate(), codebooks=Axis(Uniform()))
    whole = policy.sample(each * processes * blocks, 1000, 1000, dealt=BatchShard(blocks=blocks))
    for rank in range(processes):
        part = policy.sample(each * blocks, 1000, 1000, dealt=BatchShard(rank, processes, blocks))
        for all_of_them, mine in zip(whole[:2], part[:2], strict=True):
            assert torch.equal(all_of_them.view(-1, blocks)[rank::processes], mine.view(-1, blocks))


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
    assert mechanism.name == name


def codec_with(mechanism):
    """Make a codec with a mechanism, every parameter random."""
    codec = tiny_codec("vq")
    codec.length = LengthPolicy(Uniform(), MECHANISMS[mechanism]())
    with torch.no_grad():
        for parameter in codec.parameters():
            parameter.copy_(torch.randn(parameter.shape) * 0.2)
    return codec.eval()


@pytest.mark.parametrize("mechanism", MECHANISMS)
@torch.no_grad()
def test_a_batch_of_lengths_equals_single_signals_and_the_frozen_codec(mechanism):
    codec = codec_with(mechanism)
    images, lengths = torch.rand(3, 3, SIZE, SIZE) * 2 - 1, torch.tensor([2, TOKENS, 4])
    codes = codec.encode(images)
    together = codec.decode(codes, lengths=lengths)
    torch.testing.assert_close(codec(images, lengths).signal, together, atol=1e-5, rtol=0)
    scripted = torch.jit.script(FrozenCodec(codec))
    for i, k in enumerate(lengths.tolist()):
        single = codec.decode(codes[i : i + 1, :, :k])
        torch.testing.assert_close(together[i : i + 1], single, atol=1e-5, rtol=0)
        exported = scripted.decode(codes[i : i + 1, :, :k])
        torch.testing.assert_close(exported, single.clamp(-1, 1), atol=1e-5, rtol=0)
    # The tail makes no difference.
    other = codes.clone()
    other[0, :, 2:] = (other[0, :, 2:] + 1) % 37
    assert torch.equal(codec.decode(other, lengths=lengths), together)


def test_lengths_that_are_not_there():
    codec = codec_with("zeros")
    codes = torch.zeros(2, 1, 3, dtype=torch.int64)
    for lengths in ([0, 1], [1, 4]):
        with pytest.raises(UserError, match="1 to 3 tokens"):
            codec.decode(codes, lengths=torch.tensor(lengths))


@pytest.mark.parametrize("name", CONFIGS)
def test_every_configuration_builds_and_draws(name):
    config = configured(name)
    codec = build_codec(config)
    policy = codec.length
    lengths, depth, _ = policy.sample(512, codec.tokens, 4, progress=1.0)
    assert lengths.min() >= 1 and codec.tokens // 2 < lengths.max() <= codec.tokens
    assert (len(depth.unique()) > 1) == (policy.codebooks is not None) == (name in ("quantizer_dropout", "two_axes"))
    assert (len(lengths.unique()) > 1) == (name not in ("full", "quantizer_dropout"))
    assert (policy.halting is not None) == (name == "halting")


@pytest.mark.parametrize("name", CONFIGS)
def test_a_configuration_leaves_no_argument_of_a_target_out(name):
    def visit(node):
        if not isinstance(node, dict):
            return
        if "_target_" in node:
            target = build({**node, "_partial_": True}).func
            known = inspect.signature(target).parameters.values()
            assert {p.name for p in known if p.kind is not p.VAR_POSITIONAL and p.kind is not p.VAR_KEYWORD} <= set(
                node
            )
        for child in node.values():
            visit(child)

    config = configured(name)
    visit(OmegaConf.to_container(config, resolve=True)["length"])
