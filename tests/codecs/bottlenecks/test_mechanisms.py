"""What each bottleneck is for: every test here fails without the mechanism that it names."""

import math
from functools import partial

import pytest
import torch
from torch.nn import functional

from varitok import UserError
from varitok.codecs.bottlenecks.binary import BernoulliQuantizer, BinarySphericalQuantizer
from varitok.codecs.bottlenecks.bins import DimensionBins
from varitok.codecs.bottlenecks.continuous import Autoencoder, KLBottleneck
from varitok.codecs.bottlenecks.fsq import DitheredScalarQuantizer
from varitok.codecs.bottlenecks.product import Product, grouped
from varitok.codecs.bottlenecks.residual import Residual, Split, masked_channels, residual
from varitok.codecs.bottlenecks.shared import SharedIndexQuantizer
from varitok.codecs.bottlenecks.vq import EMAVectorQuantizer, VectorQuantizer

from ..examples import example


def _draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def _quantize(bottleneck, latents, depth=None):
    lengths = torch.full((len(latents),), latents.shape[1])
    depth = bottleneck.depths(latents) if depth is None else torch.full((len(latents),), depth)
    return bottleneck(latents, lengths, depth)


def _correlated(seed, dim=12):
    """Draw Gaussian latents whose energy is along few directions, as a trained encoder's does."""
    turn = torch.linalg.qr(_draw(dim, dim, seed=99))[0]
    return _draw(4, 64, dim, seed=seed) * torch.linspace(2, 0.2, dim) @ turn


def _explained(bottleneck, depth):
    """Return the share of energy in the first `depth` codebooks."""
    latents = _correlated(1000)
    left = latents - _quantize(bottleneck.eval(), latents, depth).latents
    return 1 - float(left.square().sum() / latents.square().sum())


def test_masked_channels_take_the_energy_from_codebook_1():
    level = partial(EMAVectorQuantizer, codebook_size=32, decay=0.9)
    plain, masked = residual(partial(level, dim=12), 6), masked_channels(level, 12, 3, 6)
    for step in range(60):
        for bottleneck in (plain, masked):
            _quantize(bottleneck, _correlated(step))
            bottleneck.update()
    shares = [[_explained(bottleneck, depth) for depth in range(1, 7)] for bottleneck in (plain, masked)]
    assert shares[1][0] < 0.6 * shares[0][0]
    gains = [after - before for before, after in zip([0.0, *shares[1]], shares[1][:3], strict=False)]
    assert max(gains) < 3 * min(gains), "the first codebooks share the energy"
    assert all(sorted(share) == share for share in shares), "a codebook takes away what others gave"
    assert shares[1][5] > 0.8 * shares[0][5], "all codebooks together hold about as much"


def test_every_residual_level_pulls_the_latents():
    """With a straight-through estimator at each level, the penalties after the first have no gradient."""
    bottleneck = residual(partial(VectorQuantizer, 5, 8, commitment=1.0), 4)
    for level in bottleneck.parts:
        torch.nn.init.normal_(level.codebook, std=0.5)
    latents = _draw(2, 6, 5).requires_grad_()
    quantized = _quantize(bottleneck, latents)
    gradients = []
    for depth in range(1, 5):
        (gradient,) = torch.autograd.grad(_quantize(bottleneck, latents, depth).penalties["commitment"], latents)
        gradients.append(gradient)
    remaining, expected = latents.detach(), torch.zeros_like(latents)
    for depth, gradient in enumerate(gradients):
        remaining = latents.detach() - bottleneck.decode(quantized.codes[:, : depth + 1])
        expected = expected + 2 * remaining / latents.numel()
        torch.testing.assert_close(gradient, expected, atol=1e-6, rtol=1e-4)
        assert gradient.abs().sum() > 0


@pytest.mark.parametrize("codebooks", [1, 4])
def test_the_residual_sum_passes_the_gradient_once(codebooks):
    weights = _draw(2, 6, 5, seed=3)
    for depth in range(1, codebooks + 1):
        latents = _draw(2, 6, 5).requires_grad_()
        (
            _quantize(residual(partial(VectorQuantizer, 5, 8), codebooks), latents, depth).latents * weights
        ).sum().backward()
        assert torch.equal(latents.grad, weights)


def test_a_shared_codebook_learns_from_all_its_levels():
    bottleneck = residual(partial(EMAVectorQuantizer, 4, 6, revival=0.0, kmeans_init=False), 3, shared=True)
    latents = _draw(2, 10, 4)
    quantized = _quantize(bottleneck, latents)
    counts = bottleneck.parts[0].codebook.gathered[-7:-1]
    assert torch.equal(counts, torch.bincount(quantized.codes.flatten(), minlength=6).float())
    assert len(list(bottleneck.buffers())) < 10, "one codebook, not three"


def test_a_product_is_its_parts_side_by_side():
    parts = [residual(partial(VectorQuantizer, 3, 7), 2), VectorQuantizer(4, 9)]
    bottleneck, latents = Product(parts), _draw(2, 6, 7)
    whole = _quantize(bottleneck, latents)
    first, second = (_quantize(part, piece) for part, piece in zip(parts, latents.split([3, 4], -1), strict=True))
    assert bottleneck.codebook_sizes == (7, 9, 7), "first codebooks come first"
    assert torch.equal(whole.codes, torch.stack([first.codes[:, 0], second.codes[:, 0], first.codes[:, 1]], 1))
    assert torch.equal(whole.latents, torch.cat([first.latents, second.latents], -1))
    for name, penalty in whole.penalties.items():  # means over the width, where a residual's levels add up
        torch.testing.assert_close(penalty, (first.penalties[name] + second.penalties[name]) / 2)


@pytest.mark.parametrize(("levels", "codebooks"), [(5, 2), (3, 4), (17, 1)])
def test_dithered_levels_split_after_training(levels, codebooks):
    """TAAE: 17 levels are 2 codebooks of 5, or 4 codebooks of 3."""
    whole = DitheredScalarQuantizer([17, 17, 17]).eval()
    parts = whole.split([levels] * 3, codebooks)
    latents = _draw(3, 500, 3)
    expected = whole.decode(whole.encode(latents))
    torch.testing.assert_close(_quantize(parts, latents).latents, expected, atol=1e-6, rtol=0)
    torch.testing.assert_close(parts.decode(parts.encode(latents)), expected, atol=1e-6, rtol=0)
    errors = [
        float((_quantize(parts, latents, depth).latents - torch.tanh(latents)).square().mean())
        for depth in range(1, codebooks + 1)
    ]
    assert errors == sorted(errors, reverse=True) and len(set(errors)) == codebooks
    with pytest.raises(UserError, match="don't make"):
        whole.split([4, 4, 4], 2)


def test_dithering_shows_the_decoder_more_than_the_grid():
    bottleneck = DitheredScalarQuantizer([5, 5], noise=0.5, bypass=0.25)
    latents = _draw(400, 3, 2)
    grid = bottleneck.decode(bottleneck.encode(latents))
    seen = _quantize(bottleneck, latents).latents
    bounded = torch.tanh(latents)
    rounded = (seen == grid).all(2).all(1)
    passed = (seen == bounded).all(2).all(1)
    noisy = ~rounded & ~passed
    for share, expected in ((rounded, 0.25), (passed, 0.25), (noisy, 0.5)):
        assert abs(float(share.float().mean()) - expected) < 0.08
    away = (seen - bounded)[noisy] * 4  # in steps, which are 2 / (levels - 1) wide: uniform in +- half of one
    assert away.abs().max() <= 1.0 + 1e-5 and abs(float(away.std()) - 1 / math.sqrt(3)) < 0.05
    assert torch.equal(_quantize(bottleneck.eval(), latents).latents, grid)


def test_disentangling_turns_parts_apart():
    def overlap(weight):
        torch.manual_seed(0)
        bottleneck = grouped(partial(VectorQuantizer, 4, 64, cosine=True), 2, disentangle=weight)
        half = _draw(1, 64, 4)
        latents = torch.cat([half, half + 0.3 * _draw(1, 64, 4, seed=1)], -1).requires_grad_()  # nearly the same twice
        optimizer = torch.optim.Adam([latents, *bottleneck.parameters()], 0.05)
        for _ in range(60):
            optimizer.zero_grad()
            sum(_quantize(bottleneck, latents).penalties.values()).backward()
            optimizer.step()
        first, second = _quantize(bottleneck, latents).latents.detach().tensor_split(2, -1)
        return float((first * second).sum(-1).square().mean())

    assert overlap(1.0) < 0.5 * overlap(0.0)
    first, second = torch.eye(4)[:2]
    bottleneck = grouped(partial(VectorQuantizer, 4, 2, cosine=True), 2, disentangle=0.5)
    with torch.no_grad():
        bottleneck.parts[0].codebook.copy_(torch.stack([first, first]))
        bottleneck.parts[1].codebook.copy_(torch.stack([first, second]))
    same = _quantize(bottleneck, torch.cat([first, first])[None, None]).penalties["disentangle"]
    apart = _quantize(bottleneck, torch.cat([first, second])[None, None]).penalties["disentangle"]
    assert (same.item(), apart.item()) == (0.5, 0.0)
    with pytest.raises(UserError, match="disentangle"):
        Product([VectorQuantizer(4, 2), VectorQuantizer(3, 2)], disentangle=0.1)


def test_the_pixel_weight_chooses_between_meaning_and_looks():
    meaning, looks = torch.eye(3)[:2], torch.eye(2)
    latent = torch.cat([meaning[0], looks[1]])[None, None]  # entry 0 means the same, entry 1 looks the same
    for weight, expected in ((0.1, 0), (10.0, 1)):
        bottleneck = SharedIndexQuantizer(3, 2, 2, pixel_weight=weight)
        with torch.no_grad():
            bottleneck.codebook.copy_(torch.cat([meaning, looks], 1) * 3)  # of any length: halves are scaled
        quantized = _quantize(bottleneck, latent * torch.tensor([5, 5, 5, 0.1, 0.1]))
        assert int(quantized.codes) == int(bottleneck.encode(latent)) == expected
        torch.testing.assert_close(quantized.latents[0, 0], torch.cat([meaning[expected], looks[expected]]))
        distances = float(quantized.metrics["semantic_distance"]), float(quantized.metrics["pixel_distance"])
        assert distances == pytest.approx((0.0, 2.0) if expected == 0 else (2.0, 0.0), abs=1e-5)


def test_bits_are_drawn_in_training_until_annealed():
    bottleneck = BernoulliQuantizer(8, temperature=1.0, anneal=3)
    latents = torch.full((1, 4000, 8), 0.7)
    shares = []
    for _ in range(5):
        bits = _quantize(bottleneck, latents).latents > 0
        shares.append(float(bits.float().mean()))
        bottleneck.update()
    assert shares[0] == pytest.approx(float(torch.sigmoid(torch.tensor(0.7))), abs=0.01), "bits have the odds they say"
    assert shares[1] == pytest.approx(float(torch.sigmoid(torch.tensor(0.7 * 1.5))), abs=0.01)
    assert shares[3] == shares[4] == 1.0
    fresh = BernoulliQuantizer(8, temperature=1.0, anneal=3).eval()
    assert (_quantize(fresh, latents).latents == 1).all()
    z = torch.tensor([[[-1.0, 0.2]]], requires_grad=True)
    _quantize(BernoulliQuantizer(2), z).latents.sum().backward()
    torch.testing.assert_close(z.grad, (1 - torch.tanh(z.detach() / 2).square()) / 2)


def test_bins_of_a_gaussian_are_equally_likely():
    latents = _draw(50, 2000, 2) * torch.tensor([0.5, 3.0]) + torch.tensor([2.0, -7.0])
    errors = []
    for bins in (2, 4, 16, 64):
        bottleneck = DimensionBins(KLBottleneck(2), bins).eval()
        bottleneck.measure(latents.transpose(1, 2))
        codes = bottleneck.encode(latents)
        counts = torch.stack([torch.bincount(codes[:, i].flatten(), minlength=bins) for i in range(2)])
        even = 100_000 / bins
        assert (counts - even).abs().max() < 6 * math.sqrt(even), "more than six deviations"
        left = (latents - bottleneck.decode(codes)) / torch.tensor([0.5, 3.0])
        errors.append(float(left.square().mean()))
        # Each bin decodes to its mean, so that errors add up to nothing.
        assert left.mean().abs() < 0.01
    assert errors == sorted(errors, reverse=True)
    assert errors[0] == pytest.approx(1 - 2 / math.pi, abs=0.01)  # a Gaussian's best two bins (Max, 1960)
    assert errors[-1] < 0.01


def test_a_gaussian_bottleneck_draws_in_training_and_takes_the_mean_in_evaluation():
    bottleneck = KLBottleneck(3, weight=0.5)
    with torch.no_grad():
        bottleneck.log_variance.bias.copy_(torch.log(torch.tensor([0.01, 0.25, 4.0])))
        bottleneck.mean.bias.copy_(torch.tensor([1.0, 0.0, -2.0]))
    latents = torch.zeros(1, 20000, 3)
    drawn = _quantize(bottleneck, latents).latents[0].detach()
    torch.testing.assert_close(drawn.std(0), torch.tensor([0.1, 0.5, 2.0]), atol=0.03, rtol=0.03)
    torch.testing.assert_close(drawn.mean(0), torch.tensor([1.0, 0.0, -2.0]), atol=0.05, rtol=0)
    quantized = _quantize(bottleneck.eval(), latents)
    assert torch.equal(quantized.latents, bottleneck.mean(latents))
    given = torch.distributions.Normal(torch.tensor([1.0, 0.0, -2.0]), torch.tensor([0.1, 0.5, 2.0]))
    divergence = torch.distributions.kl_divergence(given, torch.distributions.Normal(0.0, 1.0)).sum()
    torch.testing.assert_close(quantized.metrics["divergence"], divergence, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(quantized.penalties["kl"].detach(), 0.5 * divergence, atol=1e-4, rtol=1e-4)


def test_a_split_gaussian_takes_the_mean_and_the_log_variance_as_they_are():
    given, bottleneck = _draw(2, 5, 6), KLBottleneck(3, split=True).eval()
    assert (bottleneck.inputs, bottleneck.dim, bottleneck.rows) == (6, 3, 3)
    assert torch.equal(bottleneck.encode(given), given[..., :3].transpose(1, 2))
    mean, deviation = given[..., :3], (given[..., 3:] / 2).exp()
    posterior = torch.distributions.Normal(mean, deviation)
    divergence = torch.distributions.kl_divergence(posterior, torch.distributions.Normal(0.0, 1.0)).sum(-1).mean()
    torch.testing.assert_close(_quantize(bottleneck, given).metrics["divergence"], divergence)


def test_an_autoencoder_bounds_or_not():
    latents = _draw(2, 5, 3) * 10
    assert torch.equal(_quantize(Autoencoder(3), latents).latents, latents)
    assert torch.equal(_quantize(Autoencoder(3, "tanh"), latents).latents, torch.tanh(latents))


@pytest.mark.parametrize("bits", [2, 18, 36])
def test_the_error_on_the_sphere_is_bounded(bits):
    """BSQ, arXiv 2406.07548, section 3.2: |u - q| <= sqrt(2 - 2 / sqrt(L)), attained along an axis."""
    bottleneck = BinarySphericalQuantizer(bits, entropy=0.0)
    bound = math.sqrt(2 - 2 / math.sqrt(bits))
    axes = torch.eye(bits)[None]
    latents = torch.cat([_draw(1, 500, bits) * 100, _draw(1, 500, bits) ** 9, axes, -axes], 1)
    quantized = _quantize(bottleneck, latents).latents
    unit = functional.normalize(latents, dim=-1)
    errors = (unit - quantized).norm(dim=-1)[0]
    torch.testing.assert_close(quantized.norm(dim=-1), torch.ones(1, latents.shape[1]))
    assert errors.max() <= bound + 1e-5
    torch.testing.assert_close(errors[1000 : 1000 + bits], torch.full((bits,), bound), atol=1e-5, rtol=0)


def test_rotation_keeps_the_angle_of_the_gradient():
    weights, angles = _draw(2, 30, 5, seed=2), {}
    for rotation in (False, True):
        torch.manual_seed(0)
        bottleneck = VectorQuantizer(5, 8, rotation=rotation)
        torch.nn.init.normal_(bottleneck.codebook)
        latents = _draw(2, 30, 5).requires_grad_()
        quantized = _quantize(bottleneck, latents).latents
        (quantized * weights).sum().backward()
        to_entry = functional.cosine_similarity(weights, quantized.detach(), -1)
        to_latent = functional.cosine_similarity(latents.grad, latents.detach(), -1)
        angles[rotation] = float((to_entry - to_latent).abs().max())
        stretch = latents.grad.norm(dim=-1) / weights.norm(dim=-1)
        if rotation:
            torch.testing.assert_close(stretch, quantized.detach().norm(dim=-1) / latents.detach().norm(dim=-1))
    assert angles[True] < 1e-4 and angles[False] > 0.1


def test_the_semantic_codebook_does_not_bend_the_others():
    """Mimi: acoustic codes don't depend on the semantic side, as they would behind it in a residual stack."""
    torch.manual_seed(0)
    level = partial(VectorQuantizer, 6, 20)
    latents = _draw(2, 9, 6)
    for make, kept in ((lambda a, b: Split(a, b, 6), True), (lambda a, b: Residual([a, *b.parts]), False)):
        semantic, acoustic = level(), residual(level, 2)
        for part in (semantic, *acoustic.parts):
            torch.nn.init.normal_(part.codebook)
        bottleneck = make(semantic, acoustic)
        before = bottleneck.encode(latents)
        torch.nn.init.normal_(semantic.codebook)
        after = bottleneck.encode(latents)
        assert not torch.equal(before[:, 0], after[:, 0])
        assert torch.equal(before[:, 1:], after[:, 1:]) == kept


def test_features_of_two_levels_keep_to_their_own_codebooks():
    """DualToken: what the high-level features say changes no low-level code, and no gradient crosses over."""
    bottleneck = example("dual_token", 0).eval()
    latents = torch.randn(2, 9, bottleneck.dim)
    other = latents.clone()
    half = bottleneck.widths[0]
    other[..., :half] = torch.randn(2, 9, half)
    high, low = (bottleneck.positions[side] for side in (0, 1))
    one, two = bottleneck.encode(latents), bottleneck.encode(other)
    assert torch.equal(one[:, low], two[:, low]) and not torch.equal(one[:, high], two[:, high])
    latents.requires_grad_()
    lengths = torch.full((2,), 9)
    bottleneck(latents, lengths, bottleneck.depths(latents)).latents[..., half:].sum().backward()
    assert latents.grad[..., :half].abs().max() == 0 and latents.grad[..., half:].abs().min() > 0
