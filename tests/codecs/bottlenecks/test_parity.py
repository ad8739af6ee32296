"""Bottlenecks against vector-quantize-pytorch and against plain implementations of their definitions."""

import pytest
import torch
import vector_quantize_pytorch
from torch.nn import functional

from varitok.codecs.bottlenecks.binary import BinarySphericalQuantizer, LookupFreeQuantizer
from varitok.codecs.bottlenecks.factorized import FactorizedResidualQuantizer
from varitok.codecs.bottlenecks.fsq import DitheredScalarQuantizer, FiniteScalarQuantizer, ResidualScalarQuantizer
from varitok.codecs.bottlenecks.residual import Residual
from varitok.codecs.bottlenecks.vq import EMAVectorQuantizer, SimVectorQuantizer, VectorQuantizer

DIM, SIZE = 6, 20


def _draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def _quantize(bottleneck, latents, depth=None):
    lengths = torch.full((len(latents),), latents.shape[1])
    return bottleneck(latents, lengths, bottleneck.depths(latents) if depth is None else depth)


def _set_codebook(quantizer, entries):
    """Set a moving codebook's entries, as if each had been chosen once."""
    for name in ("entries", "sums"):
        getattr(quantizer.codebook, name).copy_(entries)
    quantizer.codebook.counts.fill_(1)


def _their_vq(entries, **options):
    """Make a VectorQuantize with given entries, and without what ours has as options of its own."""
    made = vector_quantize_pytorch.VectorQuantize(
        entries.shape[1], len(entries), **{"rotation_trick": False, "threshold_ema_dead_code": 0, **options}
    )
    with torch.no_grad():
        made._codebook.embed.copy_(entries[None])
        made._codebook.embed_avg.copy_(entries[None])
    return made


@pytest.mark.parametrize("levels", [[8, 8, 8, 6, 5], [4, 6], [7, 5, 5, 5], [3]])
def test_fsq(levels):
    ours, theirs = FiniteScalarQuantizer(levels), vector_quantize_pytorch.FSQ(levels)
    latents, weights = _draw(4, 1000, len(levels)) * 1.5, _draw(4, 1000, len(levels), seed=1)
    gradients = []
    for module in (lambda z: _quantize(ours, z)[:2], theirs):
        z = latents.clone().requires_grad_()
        quantized, codes = module(z)
        (quantized * weights).sum().backward()
        gradients.append((quantized.detach(), codes.flatten().long(), z.grad))
    (one, codes, gradient), (other, their_codes, their_gradient) = gradients
    assert torch.equal(codes, their_codes)
    torch.testing.assert_close(one, other, atol=1e-6, rtol=0)
    torch.testing.assert_close(gradient, their_gradient, atol=1e-6, rtol=1e-4)
    assert torch.equal(ours.encode(latents).flatten(), their_codes)


@pytest.mark.parametrize("levels", [[8, 5, 5, 3], [2, 2], [17, 17, 17]])
@pytest.mark.parametrize("codebooks", [1, 2, 4])
def test_residual_fsq(levels, codebooks):
    ours = ResidualScalarQuantizer(levels, codebooks)
    theirs = vector_quantize_pytorch.ResidualFSQ(levels=levels, num_quantizers=codebooks).eval()
    latents = _draw(4, 500, len(levels)) * 1.5
    quantized, codes = theirs(latents)
    mine = _quantize(ours, latents)
    # A latent on the border of two cells may fall to either side.
    agree = (mine.codes.transpose(1, 2) == codes).all(-1)
    assert agree.float().mean() > 0.999
    torch.testing.assert_close(mine.latents[agree], quantized[agree], atol=2e-6, rtol=0)
    z, other = latents.clone().requires_grad_(), latents.clone().requires_grad_()
    _quantize(ours, z).latents.sum().backward()
    theirs.soft_clamp_input_value.mul(torch.tanh(other / theirs.soft_clamp_input_value)).sum().backward()
    # Theirs adds up one straight-through gradient for each codebook and clamps it at the border; ours passes it once.
    torch.testing.assert_close(z.grad, other.grad, atol=1e-6, rtol=1e-5)


def test_dithered_levels():
    ours = DitheredScalarQuantizer([17, 5, 4]).eval()
    theirs = vector_quantize_pytorch.FSQ([17, 5, 4], preserve_symmetry=True).eval()
    latents = _draw(4, 1000, 3)
    quantized, codes = theirs(latents)
    assert (ours.encode(latents)[:, 0] == codes).float().mean() > 0.999
    agree = ours.encode(latents)[:, 0] == codes
    torch.testing.assert_close(_quantize(ours, latents).latents[agree], quantized[agree], atol=1e-6, rtol=0)


@pytest.mark.parametrize("cosine", [False, True], ids=["distance", "cosine"])
@pytest.mark.parametrize("decay", [0.5, 0.99])
def test_moving_averages(cosine, decay):
    """Codes, commitment and gradients of three updates, and the codebook after each."""
    entries = functional.normalize(_draw(SIZE, DIM), dim=1) if cosine else _draw(SIZE, DIM)
    ours = EMAVectorQuantizer(DIM, SIZE, 0.7, cosine, decay=decay, revival=0.0, kmeans_init=False)
    _set_codebook(ours, entries)
    theirs = _their_vq(entries, decay=decay, use_cosine_sim=cosine, commitment_weight=0.7)
    before = entries
    for step in range(3):
        latents = _draw(3, 40, DIM, seed=step + 1)
        z, other = latents.clone().requires_grad_(), latents.clone().requires_grad_()
        mine = _quantize(ours, z)
        quantized, codes, loss = theirs(other)
        assert torch.equal(mine.codes[:, 0], codes)
        torch.testing.assert_close(mine.latents, quantized, atol=1e-6, rtol=0)
        torch.testing.assert_close(mine.penalties["commitment"], loss.squeeze())
        (mine.latents.square().sum() + mine.penalties["commitment"]).backward()
        (quantized.square().sum() + loss.squeeze()).backward()
        torch.testing.assert_close(z.grad, other.grad, atol=1e-5, rtol=1e-4)
        assert torch.equal(ours.codebook.entries, before)  # nothing moves but by `update`
        ours.update()
        before = ours.codebook.entries.clone()
        torch.testing.assert_close(ours.codebook.entries, theirs.codebook, atol=1e-6, rtol=1e-5)
        torch.testing.assert_close(ours.codebook.counts, theirs._codebook.cluster_size[0], atol=1e-5, rtol=1e-5)


def test_batches_of_one_update_are_one_batch():
    """Gradient accumulation: theirs moves at each forward, ours once, by both, as their one batch of both does."""
    entries, latents = _draw(SIZE, DIM), _draw(4, 40, DIM, seed=1)
    ours = EMAVectorQuantizer(DIM, SIZE, decay=0.9, revival=0.0, kmeans_init=False)
    _set_codebook(ours, entries)
    theirs = _their_vq(entries, decay=0.9)
    for half in (latents[:1], latents[1:]):
        _quantize(ours, half)
    ours.update()
    theirs(latents)
    torch.testing.assert_close(ours.codebook.entries, theirs.codebook, atol=1e-6, rtol=1e-5)


def test_learnt_by_gradient():
    entries, latents = _draw(SIZE, DIM), _draw(3, 40, DIM, seed=1)
    ours = VectorQuantizer(DIM, SIZE, commitment=1.0)
    theirs = _their_vq(entries, learnable_codebook=True, ema_update=False, commitment_weight=1.0)
    with torch.no_grad():
        ours.codebook.copy_(entries)
    z, other = latents.clone().requires_grad_(), latents.clone().requires_grad_()
    mine = _quantize(ours, z)
    _, codes, loss = theirs(other)
    assert torch.equal(mine.codes[:, 0], codes)
    # Theirs is one distance with both gradients; ours is two, so that each has a weight (VQ-VAE, equation 3).
    torch.testing.assert_close(mine.penalties["codebook"], loss.squeeze())
    torch.testing.assert_close(mine.penalties["commitment"], loss.squeeze())
    sum(mine.penalties.values()).backward()
    loss.squeeze().backward()
    torch.testing.assert_close(z.grad, other.grad)
    torch.testing.assert_close(ours.codebook.grad, theirs._codebook.embed.grad[0])


@pytest.mark.parametrize("cosine", [False, True], ids=["distance", "cosine"])
def test_rotation_trick(cosine):
    entries, latents = _draw(SIZE, DIM), _draw(3, 40, DIM, seed=1)
    weights = _draw(3, 40, DIM, seed=2)
    entries = functional.normalize(entries, dim=1) if cosine else entries
    ours = EMAVectorQuantizer(DIM, SIZE, 0.0, cosine, rotation=True, revival=0.0, kmeans_init=False)
    _set_codebook(ours, entries)
    theirs = _their_vq(entries, rotation_trick=True, use_cosine_sim=cosine, commitment_weight=0.0)
    z, other = latents.clone().requires_grad_(), latents.clone().requires_grad_()
    (_quantize(ours, z).latents * weights).sum().backward()
    quantized, _, _ = theirs(other)
    (quantized * weights).sum().backward()
    # Theirs gives the latent rotated, which is the entry but for rounding; ours the entry bit for bit.
    torch.testing.assert_close(_quantize(ours, latents).latents, quantized, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(z.grad, other.grad, atol=1e-4, rtol=1e-3)


def test_residual_codebooks():
    codebooks, entries = 4, [_draw(SIZE, DIM, seed=i) / 2**i for i in range(4)]
    ours = Residual(
        [EMAVectorQuantizer(DIM, SIZE, 1.0, revival=0.0, kmeans_init=False, decay=0.8) for _ in range(codebooks)]
    )
    theirs = vector_quantize_pytorch.ResidualVQ(
        dim=DIM,
        codebook_size=SIZE,
        num_quantizers=codebooks,
        rotation_trick=False,
        threshold_ema_dead_code=0,
        decay=0.8,
    )
    with torch.no_grad():
        for mine, layer, values in zip(ours.parts, theirs.layers, entries, strict=True):
            _set_codebook(mine, values)
            layer._codebook.embed.copy_(values[None])
            layer._codebook.embed_avg.copy_(values[None])
    for step in range(3):
        latents = _draw(3, 40, DIM, seed=step + 1)
        mine = _quantize(ours, latents.clone().requires_grad_())
        quantized, codes, losses = theirs(latents.clone().requires_grad_())
        assert torch.equal(mine.codes.transpose(1, 2), codes)
        torch.testing.assert_close(mine.latents, quantized, atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(mine.penalties["commitment"], losses.sum())
        ours.update()
        for part, layer in zip(ours.parts, theirs.layers, strict=True):
            torch.testing.assert_close(part.codebook.entries, layer._codebook.embed[0], atol=1e-5, rtol=1e-4)
    ours.eval()
    theirs.eval()
    for kept in range(1, codebooks + 1):
        some = theirs.get_codes_from_indices(codes)[:kept].sum(0)
        torch.testing.assert_close(ours.decode(codes.transpose(1, 2)[:, :kept]), some, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("rotation", [False, True], ids=["straight", "rotated"])
def test_sim_vq(rotation):
    ours = SimVectorQuantizer(DIM, SIZE, commitment=0.25, rotation=rotation)
    theirs = vector_quantize_pytorch.SimVQ(DIM, SIZE, rotation_trick=rotation)
    with torch.no_grad():
        theirs.frozen_codebook.copy_(ours.basis)
        theirs.code_transform.weight.copy_(ours.map.weight)
    latents, weights = _draw(3, 40, DIM), _draw(3, 40, DIM, seed=2)
    z, other = latents.clone().requires_grad_(), latents.clone().requires_grad_()
    mine = _quantize(ours, z)
    quantized, codes, loss = theirs(other)
    assert torch.equal(mine.codes[:, 0], codes)
    torch.testing.assert_close(sum(mine.penalties.values()), loss)
    ((mine.latents * weights).sum() + sum(mine.penalties.values()) * 100).backward()
    ((quantized * weights).sum() + loss * 100).backward()
    torch.testing.assert_close(z.grad, other.grad, atol=1e-4, rtol=1e-3)
    torch.testing.assert_close(ours.map.weight.grad, theirs.code_transform.weight.grad, atol=1e-4, rtol=1e-3)


BITS = 8


def _reversed_bits(codes):
    """Theirs has the first dimension in the highest bit, ours in the lowest, as its FSQ has."""
    places = torch.arange(BITS)
    return ((codes[..., None].long() >> places & 1) << places.flip(0)).sum(-1)


@pytest.mark.parametrize("spherical", [False, True], ids=["lfq", "bsq"])
@pytest.mark.parametrize("group", [0, 1])
def test_binary(spherical, group):
    temperature = 0.5 if spherical else 0.01
    theirs = vector_quantize_pytorch.LFQ(
        dim=BITS, codebook_size=2**BITS, spherical=spherical, entropy_loss_weight=0.3, diversity_gamma=0.9,
        commitment_loss_weight=0.0 if spherical else 0.25,
    )  # fmt: skip
    if spherical:
        ours = BinarySphericalQuantizer(BITS, 0.3, 0.9, temperature, group)
    else:
        ours = LookupFreeQuantizer(BITS, 0.25, 0.3, 0.9, temperature, group)
    # Small ones, or all choices would be sure, at a hundredth of a unit.
    latents, weights = _draw(3, 40, BITS) * 0.01, _draw(3, 40, BITS, seed=2)
    z, other = latents.clone().requires_grad_(), latents.clone().requires_grad_()
    mine = _quantize(ours, z)
    (quantized, codes, loss), parts = theirs(other, inv_temperature=1 / temperature, return_loss_breakdown=True)
    assert torch.equal(mine.codes[:, 0], _reversed_bits(codes))
    torch.testing.assert_close(mine.latents, quantized, atol=1e-6, rtol=0)
    # Theirs clamps the logarithm at 1e-5, so that its rarest codes add less.
    torch.testing.assert_close(mine.metrics["confidence"], parts.per_sample_entropy.detach(), atol=2e-3, rtol=2e-3)
    if group == 0:
        torch.testing.assert_close(mine.metrics["diversity"], parts.batch_entropy.detach(), atol=2e-3, rtol=2e-3)
        torch.testing.assert_close(sum(mine.penalties.values()), loss, atol=2e-3, rtol=2e-3)
        ((mine.latents * weights).sum() + sum(mine.penalties.values())).backward()
        ((quantized * weights).sum() + loss).backward()
        torch.testing.assert_close(z.grad, other.grad, atol=2e-2 * float(other.grad.abs().max()), rtol=0)
    else:  # independent bits have at least the entropy of what they are, together (BSQ, equation 8)
        assert mine.metrics["diversity"] >= parts.batch_entropy
    if not spherical:
        torch.testing.assert_close(mine.penalties["commitment"], 0.25 * parts.commitment)


def _plain_factorized(ours, latents, lengths, depth):
    """Follow DAC's definition (arXiv 2306.06546, section 3.2) level by level on the full width, in double precision."""
    codebooks, width = ours.num_codebooks, ours.width
    into, out = ours.into.weight.view(codebooks, width, -1), ours.out.weight.view(-1, codebooks, width)
    remaining, total, codes = latents, 0.0, []
    penalties = {"codebook": 0.0, "commitment": 0.0}
    valid = torch.arange(latents.shape[1]) < lengths[:, None]
    for i in range(codebooks):
        level = functional.linear(remaining, into[i], ours.into.bias.view(codebooks, width)[i])
        unit, table = functional.normalize(level, dim=-1), ours.codebooks[i]
        chosen = torch.cdist(unit, functional.normalize(table, dim=-1)).argmin(-1)
        entry = table[chosen]
        kept = (depth > i)[:, None] & valid
        for name, distance in {
            "codebook": (level.detach() - entry).square().mean(-1),
            "commitment": ours.commitment * (level - entry.detach()).square().mean(-1),
        }.items():
            per_sample = torch.where(kept, distance, 0.0).sum(1) / kept.sum(1).clamp(min=1)
            penalties[name] = penalties[name] + per_sample.mean()
        found = functional.linear(level + (entry - level).detach(), out[:, i], ours.out_bias[i])
        total = total + torch.where((depth > i)[:, None, None], found, 0.0)
        remaining = remaining - found
        codes.append(chosen)
    return total, torch.stack(codes, 1), penalties


@pytest.mark.parametrize("codebooks", [1, 5])
def test_factorized_codebooks_against_their_definition(codebooks):
    torch.manual_seed(0)
    ours = FactorizedResidualQuantizer(24, codebooks, 30, 4, commitment=0.25)
    torch.nn.init.normal_(ours.out_bias, std=0.3)  # zeros would hide its effect
    exact = FactorizedResidualQuantizer(24, codebooks, 30, 4, commitment=0.25).double()
    exact.load_state_dict({name: value.double() for name, value in ours.state_dict().items()})
    latents, weights = _draw(4, 50, 24, seed=1), _draw(4, 50, 24, seed=2)
    lengths, depth = torch.tensor([50, 31, 8, 50]), torch.tensor([codebooks, 1, (codebooks + 1) // 2, codebooks])
    z, other = latents.clone().requires_grad_(), latents.double().requires_grad_()
    mine = ours(z, lengths, depth)
    total, codes, penalties = _plain_factorized(exact, other, lengths, depth)
    assert torch.equal(mine.codes, codes)
    torch.testing.assert_close(mine.latents, total.float(), atol=1e-4, rtol=1e-4)
    for name, value in penalties.items():
        torch.testing.assert_close(mine.penalties[name], value.float(), atol=1e-5, rtol=1e-4)
    ((mine.latents * weights).mean() + sum(mine.penalties.values())).backward()
    ((total * weights).mean() + sum(penalties.values())).backward()
    torch.testing.assert_close(z.grad, other.grad.float(), atol=1e-6, rtol=1e-4)
    for (name, parameter), its in zip(ours.named_parameters(), exact.parameters(), strict=True):
        close = torch.allclose(parameter.grad, its.grad.float(), atol=1e-4 * float(its.grad.abs().max()), rtol=1e-4)
        assert close, name
