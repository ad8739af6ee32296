"""The contract of every bottleneck, run over all of them."""

import numpy as np
import pytest
import torch
import vector_quantize_pytorch
from hypothesis import given, settings
from hypothesis import strategies as st

from varitok import UserError
from varitok.codecs.bottlenecks.fsq import FiniteScalarQuantizer
from varitok.codecs.bottlenecks.nearest import nearest

from .examples import BOTTLENECKS

ALL = pytest.mark.parametrize("name", BOTTLENECKS)


def _latents(dim: int, b: int = 3, n: int = 7) -> torch.Tensor:
    return torch.randn(b, n, dim, generator=torch.Generator().manual_seed(0)) * 1.5


def _quantize(bottleneck, latents, lengths=None):
    lengths = torch.full((len(latents),), latents.shape[1]) if lengths is None else lengths
    return bottleneck(latents, lengths, bottleneck.depths(latents))


@ALL
def test_decoded_codes_are_the_latents_bit_for_bit(name):
    bottleneck = BOTTLENECKS[name]().eval()
    latents = _latents(bottleneck.dim)
    quantized = _quantize(bottleneck, latents)
    assert torch.equal(bottleneck.decode(bottleneck.encode(latents)), quantized.latents)
    assert torch.equal(bottleneck.encode(latents), quantized.codes)


@ALL
def test_codes_have_the_promised_shape_and_range(name):
    bottleneck = BOTTLENECKS[name]()
    codes = _quantize(bottleneck, _latents(bottleneck.dim) * 10).codes
    assert codes.dtype == torch.int64
    assert codes.shape == (3, len(bottleneck.book_sizes), 7)
    for book, size in enumerate(bottleneck.book_sizes):
        assert 0 <= codes[:, book].min() and codes[:, book].max() < size


@ALL
def test_gradient_reaches_the_latents(name):
    bottleneck = BOTTLENECKS[name]()
    latents = _latents(bottleneck.dim).requires_grad_()
    _quantize(bottleneck, latents).latents.sum().backward()
    assert latents.grad is not None and (latents.grad.abs().sum(-1) > 0).all()


@ALL
def test_padding_changes_nothing_valid(name):
    bottleneck = BOTTLENECKS[name]()
    latents, lengths = _latents(bottleneck.dim), torch.tensor([7, 3, 1])
    junk = torch.where(torch.arange(7)[None, :, None] < lengths[:, None, None], latents, 99.0)
    one, other = (_quantize(bottleneck, z, lengths) for z in (latents, junk))
    for row, length in enumerate(lengths):
        assert torch.equal(one.codes[row, :, :length], other.codes[row, :, :length])
        assert torch.equal(one.latents[row, :length], other.latents[row, :length])
    for key, penalty in one.penalties.items():
        assert torch.equal(penalty, other.penalties[key]), key


@ALL
def test_batch_equals_single_items(name):
    bottleneck = BOTTLENECKS[name]()
    latents, lengths = _latents(bottleneck.dim), torch.tensor([7, 3, 5])
    whole = _quantize(bottleneck, latents, lengths)
    parts = [_quantize(bottleneck, latents[i : i + 1], lengths[i : i + 1]) for i in range(3)]
    assert torch.equal(whole.codes, torch.cat([part.codes for part in parts]))
    for key, penalty in whole.penalties.items():
        torch.testing.assert_close(penalty, torch.stack([part.penalties[key] for part in parts]).mean())


@ALL
def test_autocast_does_not_reach_the_codes(name):
    bottleneck = BOTTLENECKS[name]()
    latents = _latents(bottleneck.dim)
    with torch.autocast("cpu", torch.bfloat16):
        mixed = _quantize(bottleneck, latents)
    assert torch.equal(mixed.codes, _quantize(bottleneck, latents).codes)
    assert mixed.latents.dtype == torch.float32


@ALL
def test_frozen_form_agrees(name):
    bottleneck = BOTTLENECKS[name]().eval()
    frozen = bottleneck.frozen().eval()
    latents = _latents(bottleneck.dim, 4, 500)
    codes = bottleneck.encode(latents)
    assert torch.equal(frozen.encode(latents), codes)
    assert torch.equal(frozen.decode(codes), bottleneck.decode(codes))


@pytest.mark.parametrize("levels", [[8, 8, 8, 6, 5], [4, 6], [7, 5, 5, 5], [3]])
def test_fsq_gives_the_codes_of_vector_quantize_pytorch(levels):
    ours, theirs = FiniteScalarQuantizer(levels), vector_quantize_pytorch.FSQ(levels)
    latents = _latents(len(levels), 4, 1000)
    their_latents, their_codes = theirs(latents)
    assert torch.equal(ours.encode(latents)[:, 0], their_codes.long())
    torch.testing.assert_close(ours.decode(ours.encode(latents)), their_latents, atol=1e-6, rtol=0)


def test_fsq_reaches_every_code():
    bottleneck = FiniteScalarQuantizer([8, 5, 5])
    codes = torch.arange(200).view(1, 1, 200)
    grid = bottleneck.decode(codes)
    assert len(torch.unique(grid[0], dim=0)) == 200
    wide = torch.randn(1, 200000, 3, generator=torch.Generator().manual_seed(0)) * 3
    assert len(bottleneck.encode(wide).unique()) == 200


def test_fsq_refuses_two_levels():
    with pytest.raises(UserError, match=r"bottleneck\.levels"):
        FiniteScalarQuantizer([8, 2])


@settings(max_examples=30, deadline=None)
@given(size=st.integers(1, 300), dim=st.integers(1, 9), offset=st.floats(-50, 50), seed=st.integers(0, 9))
def test_nearest_agrees_with_double_precision(size, dim, offset, seed):
    random = torch.Generator().manual_seed(seed)
    book = torch.randn(size, dim, generator=random) + offset
    latents = torch.randn(50, dim, generator=random) + offset
    distances = torch.cdist(latents.double(), book.double())
    chosen = distances.gather(1, nearest(latents, book)[:, None])[:, 0]
    np.testing.assert_allclose(chosen, distances.min(1).values, rtol=1e-4, atol=1e-3)


def test_nearest_survives_a_book_far_from_the_origin():
    random = torch.Generator().manual_seed(0)
    book = torch.randn(256, 8, generator=random) * 0.01 + 3
    latents = torch.randn(4000, 8, generator=random) * 0.01 + 3
    truth = torch.cdist(latents.double(), book.double()).argmin(1)
    assert (nearest(latents, book) == truth).all()
    textbook = (latents.square().sum(1, keepdim=True) - 2 * latents @ book.T + book.square().sum(1)).argmin(1)
    assert (textbook != truth).float().mean() > 0.02  # what centring is there for
