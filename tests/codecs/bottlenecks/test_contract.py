"""The contract of every bottleneck, run over all of them."""

import copy
import importlib
import inspect
import math
from functools import cache
from pathlib import Path

import pytest
import torch

import varitok.codecs.bottlenecks
from varitok.codecs.bottlenecks.binary import BinarySphericalQuantizer, LookupFreeQuantizer
from varitok.codecs.bottlenecks.bins import UniformBins
from varitok.codecs.bottlenecks.continuous import KLBottleneck
from varitok.codecs.bottlenecks.contract import Bottleneck
from varitok.codecs.bottlenecks.grid import Grid
from varitok.codecs.bottlenecks.statistics import Annealed, Gathering, MovingCodebook

from ..examples import CONFIGURED, EXAMPLES, FOLDER, example

BATCH, STEPS = 3, 7
ALL = pytest.mark.parametrize("name", EXAMPLES)


def _latents(dim, b=BATCH, n=STEPS, seed=0):
    return torch.randn(b, n, dim, generator=torch.Generator().manual_seed(seed)) * 1.5


def _quantize(bottleneck, latents, lengths=None, depth=None):
    """Quantize with the same draws each time."""
    lengths = torch.full((len(latents),), latents.shape[1]) if lengths is None else lengths
    torch.manual_seed(5)
    return bottleneck(latents, lengths, bottleneck.depths(latents) if depth is None else depth)


def _gathered(bottleneck):
    return [module.gathered.clone() for module in bottleneck.modules() if isinstance(module, Gathering)]


def _trained(name):
    """Make one whose codebooks, averages and counts are no longer those of a fresh one."""
    return copy.deepcopy(_trained_once(name))


@cache
def _trained_once(name):
    bottleneck = example(name)
    parameters = [parameter for parameter in bottleneck.parameters() if parameter.requires_grad]
    optimizer = torch.optim.SGD(parameters, 0.01) if parameters else None
    for step in range(3):
        latents = _latents(bottleneck.inputs, 4, 12, seed=step + 1).requires_grad_()
        quantized = _quantize(bottleneck, latents)
        (quantized.latents.square().mean() + sum(quantized.penalties.values())).backward()
        if optimizer:
            optimizer.step()
            optimizer.zero_grad()
        bottleneck.update()
    return bottleneck


def _same(one, other):
    """Return whether two state dicts are equal, bit for bit."""
    return one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)


def test_every_bottleneck_is_an_example():
    modules = [
        importlib.import_module(f"varitok.codecs.bottlenecks.{path.stem}")
        for folder in varitok.codecs.bottlenecks.__path__
        for path in sorted(Path(folder).glob("*.py"))
    ]
    public = {
        found
        for module in modules
        for found in vars(module).values()
        if inspect.isclass(found)
        and issubclass(found, Bottleneck)
        and not inspect.isabstract(found)
        and not found.__name__.startswith("_")
    }
    seen = {type(module) for name in EXAMPLES for module in example(name).modules()}
    assert len(public) > 15, "nothing was discovered"
    assert not public - seen


def test_every_configuration_is_an_example():
    assert {path.stem for path in FOLDER.glob("*.yaml")} <= set(EXAMPLES)
    assert len(CONFIGURED) > 25


@ALL
def test_decoded_codes_are_the_latents_bit_for_bit(name):
    """In evaluation, where nothing is drawn; bfloat16 is taken as the numbers that it is."""
    bottleneck = _trained(name).eval()
    for latents in (_latents(bottleneck.inputs), _latents(bottleneck.inputs).bfloat16()):
        quantized = _quantize(bottleneck, latents)
        assert torch.equal(bottleneck.encode(latents), quantized.codes)
        assert torch.equal(bottleneck.decode(quantized.codes), quantized.latents)
        torch.manual_seed(6)
        again = bottleneck(latents.float(), torch.full((BATCH,), STEPS), bottleneck.depths(latents))
        assert torch.equal(again.codes, quantized.codes)
        assert torch.equal(again.latents, quantized.latents)
        assert quantized.latents.dtype == torch.float32


@ALL
def test_codes_have_the_promised_shape_type_and_range(name):
    for scale in (0.01, 10.0):
        bottleneck = example(name)
        quantized = _quantize(bottleneck, _latents(bottleneck.inputs) * scale)
        codes = quantized.codes
        assert quantized.latents.shape == (BATCH, STEPS, bottleneck.dim)
        assert codes.shape == (BATCH, bottleneck.rows, STEPS)
        assert codes.dtype == (torch.int64 if bottleneck.codebook_sizes else torch.float32)
        for codebook, size in enumerate(bottleneck.codebook_sizes):
            assert 0 <= codes[:, codebook].min() and codes[:, codebook].max() < size, scale
        for value in (*quantized.penalties.values(), *quantized.metrics.values()):
            assert value.shape == () and value.isfinite(), scale
        assert not any(value.requires_grad for value in quantized.metrics.values())


@ALL
def test_gradient_reaches_every_latent_and_every_parameter(name):
    bottleneck = _trained(name)
    latents = _latents(bottleneck.inputs).requires_grad_()
    quantized = _quantize(bottleneck, latents)
    weights = torch.randn(quantized.latents.shape, generator=torch.Generator().manual_seed(3))
    (quantized.latents * weights).sum().add(sum(quantized.penalties.values())).backward()
    assert latents.grad.isfinite().all()
    assert (latents.grad.abs().sum(-1) > 0).all()
    for key, parameter in bottleneck.named_parameters():
        if parameter.requires_grad and name != "token_bridge":  # learns nothing
            assert parameter.grad is not None and parameter.grad.isfinite().all() and parameter.grad.any(), key


@ALL
def test_padding_changes_nothing_valid(name):
    lengths = torch.tensor([STEPS, 3, 1])
    valid = torch.arange(STEPS) < lengths[:, None]
    outcomes = []
    for filled in (0.5, 99.0, float("nan")):
        bottleneck = example(name)
        latents = torch.where(valid[..., None], _latents(bottleneck.inputs), filled).requires_grad_()
        quantized = _quantize(bottleneck, latents, lengths)
        loss = quantized.latents[valid].square().sum() + sum(quantized.penalties.values())
        if not math.isnan(filled):  # no number has no gradient: 0 times it is none either, in any linear map
            loss.backward()
        gathered = _gathered(bottleneck)
        bottleneck.update()
        outcomes.append((quantized, gathered, latents.grad, bottleneck))
    for outcome in outcomes[1:]:
        _check_same(valid, outcomes[0], outcome)


def _check_same(valid, expected, found):
    (one, one_gathered, one_gradient, first), (other, other_gathered, other_gradient, second) = expected, found
    kept = valid[:, None].expand_as(one.codes)
    assert torch.equal(one.codes[kept], other.codes[kept])
    assert torch.equal(one.latents[valid], other.latents[valid])
    for values, others in ((one.penalties, other.penalties), (one.metrics, other.metrics)):
        for key, value in values.items():
            assert torch.equal(value, others[key]), key
    if other_gradient is not None:
        assert torch.equal(one_gradient[valid], other_gradient[valid])
        for (key, parameter), its in zip(first.named_parameters(), second.parameters(), strict=True):
            assert (parameter.grad is None) == (its.grad is None), key
            assert parameter.grad is None or torch.equal(parameter.grad, its.grad), key
    for module, its, theirs in zip(
        (module for module in first.modules() if isinstance(module, MovingCodebook)), one_gathered, other_gathered,
        strict=False,
    ):  # fmt: skip
        size, dim = module.entries.shape
        # The last entry collects the padding, and is never looked at.
        for part in ((slice(0, size * dim)), slice((size + 1) * dim, (size + 1) * dim + size)):
            assert torch.equal(its[part], theirs[part])
    assert _same(first.state_dict(), second.state_dict())


@ALL
def test_a_batch_is_the_mean_of_its_items(name):
    bottleneck = _trained(name).eval()
    latents, lengths = _latents(bottleneck.inputs), torch.tensor([STEPS, 3, 5])
    whole = _quantize(bottleneck, latents, lengths)
    parts = [_quantize(bottleneck, latents[i : i + 1], lengths[i : i + 1]) for i in range(BATCH)]
    assert torch.equal(whole.codes, torch.cat([part.codes for part in parts]))
    torch.testing.assert_close(whole.latents, torch.cat([part.latents for part in parts]), atol=1e-6, rtol=1e-5)
    for key, penalty in whole.penalties.items():
        if key != "entropy":  # its diversity is the batch's
            torch.testing.assert_close(penalty, torch.stack([part.penalties[key] for part in parts]).mean())


@ALL
def test_fewer_codebooks_are_a_prefix(name):
    bottleneck = _trained(name).eval()
    if not bottleneck.codebook_sizes:
        return
    latents = _latents(bottleneck.inputs)
    codes, count = bottleneck.encode(latents), len(bottleneck.codebook_sizes)
    prefixes = [bottleneck.decode(codes[:, :k]) for k in range(1, count + 1)]
    for k, prefix in enumerate(prefixes, start=1):
        quantized = _quantize(bottleneck, latents, depth=torch.full((BATCH,), k))
        assert torch.equal(quantized.codes, codes), k
        assert torch.equal(quantized.latents, prefix), k
    mixed = torch.tensor([1, count, (count + 1) // 2])
    several = _quantize(bottleneck, latents, depth=mixed).latents
    for row, depth in enumerate(mixed):
        assert torch.equal(several[row], prefixes[depth - 1][row])
    for k in range(1, count):
        assert not torch.equal(prefixes[k], prefixes[k - 1]), f"codebook {k + 1} adds nothing"


@ALL
def test_codebooks_left_out_are_not_measured(name):
    """What a sample doesn't keep enters neither penalties nor statistics; in a mixed batch it is measured as alone."""
    trained = _trained_once(name)
    if len(trained.codebook_sizes) < 2:
        return
    count, tokens = len(trained.codebook_sizes), BATCH * STEPS
    totals, latents = [], _latents(trained.inputs).requires_grad_()
    for depth in (1, count):
        bottleneck = copy.deepcopy(trained)
        quantized = _quantize(bottleneck, latents, depth=torch.full((BATCH,), depth))
        sum(quantized.penalties.values(), quantized.latents.sum() * 0).backward()
        codebooks = [module for module in bottleneck.modules() if isinstance(module, MovingCodebook)]
        learnt = [parameter.grad for key, parameter in bottleneck.named_parameters() if key.endswith("codebook")]
        stacks = [parameter.grad for key, parameter in bottleneck.named_parameters() if key.endswith("codebooks")]
        learnt += [gradient for stack in stacks if stack is not None for gradient in stack]
        moved = sum(float(codebook.gathered[-len(codebook.entries) - 1 : -1].sum()) for codebook in codebooks)
        totals.append((moved / tokens, sum(gradient is not None and bool(gradient.any()) for gradient in learnt)))
    assert max(totals[0]) <= 1, "more than the one codebook that is kept learns"
    still = Grid | KLBottleneck | UniformBins
    learns = name != "library_random_projection" and not any(isinstance(module, still) for module in trained.modules())
    assert not learns or sum(totals[1]) == count, "a codebook that is kept learns nothing"
    latents, depth = _latents(trained.inputs), torch.tensor([count, 1, (count + 1) // 2])
    mixed, alone = copy.deepcopy(trained), copy.deepcopy(trained)
    whole = _quantize(mixed, latents, depth=depth)
    parts = [_quantize(alone, latents[i : i + 1], depth=depth[i : i + 1]) for i in range(BATCH)]
    for key, penalty in whole.penalties.items():
        if key != "entropy":  # its diversity is the batch's
            torch.testing.assert_close(penalty, torch.stack([part.penalties[key] for part in parts]).mean())
    for one, other in zip(_gathered(mixed), _gathered(alone), strict=True):
        torch.testing.assert_close(one, other, atol=1e-4, rtol=1e-5)


@ALL
def test_autocast_does_not_reach_the_codes(name):
    bottleneck = _trained(name)
    latents = _latents(bottleneck.inputs)
    for training in (True, False):
        bottleneck.train(training)
        with torch.autocast("cpu", torch.bfloat16):
            mixed = _quantize(bottleneck, latents)
            codes = bottleneck.encode(latents)
            decoded = bottleneck.decode(codes)
        plain = _quantize(bottleneck, latents)
        assert torch.equal(mixed.codes, plain.codes), training
        assert torch.equal(mixed.latents, plain.latents), training
        assert mixed.latents.dtype == decoded.dtype == torch.float32
        assert all(value.dtype == torch.float32 for value in mixed.penalties.values())
        assert torch.equal(codes, bottleneck.encode(latents))
        assert torch.equal(decoded, bottleneck.decode(codes))


@ALL
def test_frozen_form_agrees(name):
    bottleneck = _trained(name).eval()
    frozen = bottleneck.frozen().eval()
    latents = _latents(bottleneck.inputs, 4, 100)
    codes = bottleneck.encode(latents)
    torch.testing.assert_close(frozen.encode(latents), codes, atol=0 if bottleneck.codebook_sizes else 1e-6, rtol=0)
    for k in range(1, len(bottleneck.codebook_sizes) + 1) if bottleneck.codebook_sizes else [bottleneck.dim]:
        expected = bottleneck.decode(codes[:, :k])
        torch.testing.assert_close(frozen.decode(codes[:, :k]), expected, atol=1e-6, rtol=1e-5)
    assert not {id(tensor) for tensor in frozen.state_dict(keep_vars=True).values()} & {
        id(tensor) for tensor in bottleneck.state_dict(keep_vars=True).values()
    }, "the frozen form shares weights, and would change with them"


@ALL
def test_state_dict_round_trip(name):
    bottleneck = _trained(name)
    other = example(name, seed=1)
    other.load_state_dict(bottleneck.state_dict())
    latents = _latents(bottleneck.inputs)
    for training in (False, True):
        one, two = (_quantize(which.train(training), latents) for which in (bottleneck, other))
        assert torch.equal(one.codes, two.codes)
        assert torch.equal(one.latents, two.latents)
        for key, penalty in one.penalties.items():
            assert torch.equal(penalty, two.penalties[key]), key
        assert _same(bottleneck.state_dict(), other.state_dict()), "the first forward began anew"
    for its, theirs in zip(_gathered(bottleneck), _gathered(other), strict=True):
        assert torch.equal(its, theirs)
    bottleneck.update()
    other.update()
    assert _same(bottleneck.state_dict(), other.state_dict())


@ALL
def test_a_deep_copy_is_its_own(name):
    bottleneck = _trained(name)
    before = copy.deepcopy(bottleneck.state_dict())
    other = copy.deepcopy(bottleneck)
    assert _same(other.state_dict(), before)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.add_(1)
    _quantize(other, _latents(bottleneck.inputs))
    other.update()
    assert _same(bottleneck.state_dict(), before)
    assert not any(gathered.any() for gathered in _gathered(bottleneck))
    copy.deepcopy(bottleneck.frozen())


@ALL
def test_evaluation_and_no_grad_leave_no_trace(name):
    for bottleneck in (example(name), _trained(name)):
        before = copy.deepcopy(bottleneck.state_dict())
        gathered = _gathered(bottleneck)
        _quantize(bottleneck.eval(), _latents(bottleneck.inputs))
        bottleneck.encode(_latents(bottleneck.inputs))
        bottleneck.update()
        with torch.no_grad():
            _quantize(bottleneck.train(), _latents(bottleneck.inputs))
        assert _same(bottleneck.state_dict(), before)
        assert all(torch.equal(a, b) for a, b in zip(_gathered(bottleneck), gathered, strict=True))


@ALL
def test_a_single_valid_token_and_none_at_all(name):
    """A process may get a batch without a valid token, and must take the same way as the others."""
    bottleneck = example(name)
    latents = _latents(bottleneck.inputs).requires_grad_()
    for lengths in (torch.zeros(BATCH, dtype=torch.int64), torch.tensor([1, 0, 0])):
        quantized = _quantize(bottleneck, latents, lengths)
        sum(quantized.penalties.values(), quantized.latents.sum()).backward()
        bottleneck.update()
        assert all(value.isfinite() for value in quantized.penalties.values())
        assert latents.grad.isfinite().all()
        assert all(value.isfinite().all() for value in bottleneck.state_dict().values())


def test_annealing_ends_where_it_should():
    annealed = Annealed(2.0, 0.5, 4)
    values = []
    for _ in range(6):
        values.append(float(annealed.value))
        annealed.advance(annealed.gathered)
    assert values == [2.0, 1.625, 1.25, 0.875, 0.5, 0.5]


@pytest.mark.parametrize("kind", [BinarySphericalQuantizer, LookupFreeQuantizer])
def test_an_entropy_weight_may_be_annealed(kind):
    """BSQ-ViT: from three times to once its value. A weight that stays adds nothing to checkpoints."""
    latents = _latents(6)
    annealed, plain = kind(6, entropy=0.1, entropy_start=0.3, anneal=4), kind(6, entropy=0.1)
    whole = _quantize(plain, latents).penalties["entropy"]
    for share in (3, 2.5, 2, 1.5, 1, 1):
        torch.testing.assert_close(_quantize(annealed, latents).penalties["entropy"], share * whole)
        annealed.update()
    assert not plain.state_dict() and list(annealed.state_dict()) == ["annealed.passed"]
    kind(6, entropy_start=0.3).thaw(annealed.frozen())
