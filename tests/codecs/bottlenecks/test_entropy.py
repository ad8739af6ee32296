"""The entropies of soft choices, against sums over all codes in double precision."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from varitok import UserError
from varitok.codecs.bottlenecks.binary import BinarySphericalQuantizer, LookupFreeQuantizer
from varitok.codecs.bottlenecks.entropy import codebook_entropies, entropy_groups, grid_entropies
from varitok.codecs.bottlenecks.fsq import FiniteScalarQuantizer
from varitok.codecs.masking import prefix_mask


def _draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def _entropy(shares):
    return -torch.special.xlogy(shares, shares).sum(-1)


def _brute(joint, valid):
    """Take confidence and diversity of probabilities of all codes `(b, n, codes)`; every sample counts the same.

    One without a valid token counts as 0, as in `masked_mean`: both are weighted by the share of the others.
    """
    joint = joint.double()
    samples = [shares[mask] for shares, mask in zip(joint, valid, strict=True) if mask.any()]
    confidence = torch.stack([_entropy(shares).mean() for shares in samples]).sum() / len(joint)
    diversity = _entropy(torch.stack([shares.mean(0) for shares in samples]).mean(0)) * len(samples) / len(joint)
    return confidence, diversity


def _joint(choices):
    """Multiply out all digits, the obvious way."""
    joint = torch.ones(*choices[0].shape[:2], 1, dtype=torch.float64)
    for choice in choices:
        joint = (joint[..., :, None] * choice.double().exp()[..., None, :]).flatten(-2)
    return joint


@settings(max_examples=20)
@given(levels=st.lists(st.integers(2, 5), min_size=1, max_size=5), width=st.integers(0, 6), data=st.data())
def test_grid_entropies_are_those_of_all_codes(levels, width, data):
    lengths = torch.tensor(data.draw(st.lists(st.integers(0, 6), min_size=3, max_size=3).filter(any)))
    valid = prefix_mask(lengths, 6)
    logits = [(_draw(3, 6, level, seed=i) * 2).requires_grad_() for i, level in enumerate(levels)]
    groups = entropy_groups(levels, width, "here")
    assert [i for group in groups for i in range(len(levels))[group]] == list(range(len(levels)))
    sure, varied = grid_entropies([logit.log_softmax(-1) for logit in logits], valid, groups)
    (sure - 0.7 * varied).backward()
    ours = [logit.grad.clone() for logit in logits]

    for logit in logits:
        logit.grad = None
    expected = [_brute(_joint([logit.double().log_softmax(-1) for logit in logits][group]), valid) for group in groups]
    all_sure, all_varied = (sum(part[i] for part in expected) for i in range(2))
    torch.testing.assert_close(sure, all_sure.float(), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(varied, all_varied.float(), atol=1e-5, rtol=1e-5)
    (all_sure - 0.7 * all_varied).backward()
    for logit, gradient in zip(logits, ours, strict=True):
        torch.testing.assert_close(gradient, logit.grad, atol=1e-5, rtol=1e-3)


@pytest.mark.parametrize("inner", [False, True], ids=["distance", "inner"])
@pytest.mark.parametrize("size", [1, 7, 300])
def test_codebook_entropies_are_those_of_all_entries(inner, size):
    latents, codebook = _draw(3, 50, 4).requires_grad_(), _draw(size, 4, seed=1).requires_grad_()
    valid = prefix_mask(torch.tensor([50, 13, 0]), 50)
    sure, varied = codebook_entropies(latents, codebook, valid, 0.6, inner)
    (sure - 0.7 * varied).backward()
    ours = latents.grad.clone(), codebook.grad.clone()

    latents.grad = codebook.grad = None
    rows, entries = latents.double(), codebook.double()
    scores = rows @ entries.T if inner else -(rows[:, :, None] - entries).square().sum(-1)
    all_sure, all_varied = _brute((scores / 0.6).softmax(-1), valid)
    torch.testing.assert_close(sure, all_sure.float(), atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(varied, all_varied.float(), atol=1e-5, rtol=1e-4)
    (all_sure - 0.7 * all_varied).backward()
    for gradient, expected in zip(ours, (latents.grad, codebook.grad), strict=True):
        torch.testing.assert_close(gradient, expected, atol=1e-5, rtol=1e-3)


def test_blocks_of_tokens_add_up():
    """More tokens than a block holds: 1200 tokens over 8192 entries are three blocks."""
    latents, codebook = _draw(2, 600, 3), _draw(8192, 3, seed=1)
    valid = prefix_mask(torch.tensor([600, 200]), 600)
    sure, varied = codebook_entropies(latents, codebook, valid, 0.5)
    joint = (-torch.cdist(latents.double(), codebook.double()).square() / 0.5).softmax(-1)
    expected = _brute(joint, valid)
    torch.testing.assert_close((sure, varied), tuple(part.float() for part in expected), atol=1e-4, rtol=1e-4)
    choices = [(_draw(2, 600, 2, seed=i) * 2).log_softmax(-1) for i in range(14)]
    whole = grid_entropies(choices, valid, [slice(0, 14)])
    expected = _brute(_joint(choices), valid)
    torch.testing.assert_close(tuple(whole), tuple(part.float() for part in expected), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("inner", [False, True])
def test_sure_choices_have_no_entropy_and_finite_gradient(inner):
    """At a low temperature shares are 0 or 1, where log and its gradient are not finite."""
    codebook = torch.eye(8)
    latents = (torch.eye(8).repeat(1, 2, 1)[:, :16]).requires_grad_()
    valid = torch.ones(1, 16, dtype=torch.bool)
    sure, varied = codebook_entropies(latents, codebook, valid, 1e-4, inner)
    (sure - varied).backward()
    torch.testing.assert_close(float(sure.detach()), 0.0, atol=1e-6, rtol=0)
    torch.testing.assert_close(float(varied.detach()), math.log(8), atol=1e-5, rtol=0)
    assert latents.grad.isfinite().all()
    far = (torch.ones(1, 4, 6) * 50).requires_grad_()
    quantized = LookupFreeQuantizer(6)(far, torch.tensor([4]), torch.tensor([1]))
    quantized.penalties["entropy"].backward()
    assert quantized.penalties["entropy"].isfinite() and far.grad.isfinite().all()


def _metrics(bottleneck, latents):
    lengths = torch.full((len(latents),), latents.shape[1])
    return bottleneck(latents, lengths, bottleneck.depths(latents))


@pytest.mark.parametrize("group", [0, 1, 2])
def test_binary_entropies_are_those_of_distances_to_all_corners(group):
    bits, temperature = 6, 0.3
    latents = _draw(2, 9, bits) * 0.3
    valid = torch.ones(2, 9, dtype=torch.bool)
    for make, scale in ((LookupFreeQuantizer, 1.0), (BinarySphericalQuantizer, 1 / math.sqrt(bits))):
        bottleneck = make(bits, temperature=temperature, entropy_group=group, entropy=0.5, diversity=0.8)
        quantized = _metrics(bottleneck, latents)
        z = latents if scale == 1.0 else torch.nn.functional.normalize(latents, dim=-1)
        width, expected = group or bits, torch.zeros(2, dtype=torch.float64)
        for start in range(0, bits, width):
            corners = torch.cartesian_prod(*[torch.tensor([-scale, scale])] * width).view(-1, width)
            part = z[..., start : start + width].double()
            distances = (part[:, :, None] - corners.double()).square().sum(-1)
            expected += torch.stack(_brute((-distances / temperature).softmax(-1), valid))
        torch.testing.assert_close(float(quantized.metrics["confidence"]), float(expected[0]), atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(float(quantized.metrics["diversity"]), float(expected[1]), atol=1e-5, rtol=1e-5)
        penalty = float(0.5 * (expected[0] - 0.8 * expected[1]))
        torch.testing.assert_close(float(quantized.penalties["entropy"]), penalty, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("levels", [[8, 5, 3], [4, 4], [3]])
def test_fsq_entropies_are_those_of_distances_to_all_codes(levels):
    bottleneck = FiniteScalarQuantizer(levels, entropy=1.0, temperature=0.1)
    latents = _draw(2, 9, len(levels))
    quantized = _metrics(bottleneck, latents)
    codes = bottleneck.decode(torch.arange(math.prod(levels)).view(1, 1, -1))[0].double()
    zero = torch.tensor([level // 2 for level in levels])
    even = torch.tensor([0.5 * (level % 2 == 0) for level in levels])
    half = torch.tensor([(level - 1) * 1.001 / 2 for level in levels])
    bounded = (torch.tanh(latents + torch.atanh(even / half)) * half - even) / zero  # FSQ, appendix A.1
    distances = (bounded.double()[:, :, None] - codes).square().sum(-1)
    expected = _brute((-distances / 0.1).softmax(-1), torch.ones(2, 9, dtype=torch.bool))
    torch.testing.assert_close(float(quantized.metrics["confidence"]), float(expected[0]), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(float(quantized.metrics["diversity"]), float(expected[1]), atol=1e-5, rtol=1e-5)


def test_a_step_on_the_penalty_raises_diversity():
    torch.manual_seed(0)
    latents = (_draw(4, 32, 6) * 0.2 + 0.5).requires_grad_()  # all in one corner
    bottleneck = LookupFreeQuantizer(6, temperature=1.0, entropy=1.0, commitment=0.0)
    optimizer = torch.optim.Adam([latents], 0.05)
    before = _metrics(bottleneck, latents)
    for _ in range(60):
        optimizer.zero_grad()
        _metrics(bottleneck, latents).penalties["entropy"].backward()
        optimizer.step()
    after = _metrics(bottleneck, latents)
    assert after.metrics["diversity"] > before.metrics["diversity"]
    assert after.metrics["confidence"] < before.metrics["confidence"]
    assert len(after.codes.unique()) > len(before.codes.unique())


def test_too_large_a_group_is_refused():
    with pytest.raises(UserError, match="fewer dimensions"):
        LookupFreeQuantizer(21)
    assert LookupFreeQuantizer(21, entropy_group=7).groups == [slice(0, 7), slice(7, 14), slice(14, 21)]
