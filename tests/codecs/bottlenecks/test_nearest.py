"""The search for the nearest entry, and the gradients of looking it up."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional

from varitok.codecs.bottlenecks.nearest import COLUMNS, GROUP, FrozenTable, lookup, nearest


def _draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@given(size=st.integers(1, 300), dim=st.integers(1, 9), offset=st.floats(-50, 50), seed=st.integers(0, 9))
def test_nearest_agrees_with_double_precision(size, dim, offset, seed):
    codebook, latents = _draw(size, dim, seed=seed) + offset, _draw(50, dim, seed=seed + 10) + offset
    distances = torch.cdist(latents.double(), codebook.double())
    chosen = distances.gather(1, nearest(latents, codebook)[:, None])[:, 0]
    np.testing.assert_allclose(chosen, distances.min(1).values, rtol=1e-4, atol=1e-3)


def test_nearest_survives_a_codebook_far_from_the_origin():
    random = torch.Generator().manual_seed(0)
    codebook = torch.randn(256, 8, generator=random) * 0.01 + 3
    latents = torch.randn(4000, 8, generator=random) * 0.01 + 3
    truth = torch.cdist(latents.double(), codebook.double()).argmin(1)
    assert (nearest(latents, codebook) == truth).all()
    textbook = (latents.square().sum(1, keepdim=True) - 2 * latents @ codebook.T + codebook.square().sum(1)).argmin(1)
    assert (textbook != truth).float().mean() > 0.02  # what centring is there for


@pytest.mark.parametrize("inner", [False, True], ids=["distance", "inner"])
@settings(max_examples=12)
@given(
    border=st.sampled_from([1, GROUP, 2 * GROUP, COLUMNS, COLUMNS + GROUP, 2 * COLUMNS]),
    shift=st.integers(-1, 1),
    rows=st.integers(1, 300),
)
def test_every_entry_is_found_around_the_borders_of_blocks(inner, border, shift, rows):
    """Codebooks are gone through in columns and groups, rows in blocks: an entry at any place must be found."""
    size = max(1, border + shift)
    # On the sphere the entry itself is the nearest, by either measure.
    codebook = functional.normalize(_draw(size, 8), dim=1)
    places = torch.cat([torch.tensor([0, size - 1]), torch.randint(0, size, (rows,))])
    assert torch.equal(nearest(codebook[places], codebook, inner), places)


@settings(max_examples=15)
@given(size=st.integers(1, 300), offset=st.floats(-3, 3), seed=st.integers(0, 9))
def test_inner_products_agree_with_double_precision(size, offset, seed):
    codebook, latents = _draw(size, 6, seed=seed) + offset, _draw(2, 25, 6, seed=seed + 10) + offset
    products = latents.double() @ codebook.double().T
    codes = nearest(latents, codebook, inner=True)
    assert codes.shape == (2, 25)
    chosen = products.gather(2, codes[..., None])[..., 0]
    np.testing.assert_allclose(chosen, products.max(2).values, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("size", [5, GROUP + 6, COLUMNS + 3])
def test_ties_go_to_the_first(size):
    codebook = torch.ones(size, 4)
    codebook[0] = -1.0  # the others are equal, in several groups and columns
    assert (nearest(torch.full((9, 4), 0.9), codebook) == 1).all()


def test_codes_do_not_depend_on_the_batch():
    """Rows of a block are summed in another order than a row alone; a wide gap decides, not rounding."""
    codebook, latents = _draw(500, 16), _draw(3000, 16, seed=1)
    together = nearest(latents, codebook)
    assert torch.equal(together[:7], nearest(latents[:7], codebook))
    assert torch.equal(together[-1:], nearest(latents[-1:], codebook))


def _plain(latents, codebook, rotate):
    """Look up by ordinary autograd."""
    codes = torch.cdist(latents, codebook).argmin(-1)
    found = codebook[codes]
    if rotate:
        with torch.no_grad():
            start, end = functional.normalize(latents, dim=-1), functional.normalize(found, dim=-1)
            between = functional.normalize(start + end, dim=-1)
            identity = torch.eye(latents.shape[-1], dtype=latents.dtype)
            # The rotation of the plane of both, as a matrix, scaled (section 4.2, equation 4).
            turn = identity - 2 * between[..., :, None] * between[..., None, :]
            turn = turn + 2 * end[..., :, None] * start[..., None, :]
            turn = turn * (found.norm(dim=-1) / latents.norm(dim=-1))[..., None, None]
        quantized = (turn @ latents[..., None])[..., 0]
    else:
        quantized = latents + (found - latents).detach()
    pull = (latents.detach() - found).square().mean(-1)
    return quantized, codes, pull, (latents - found.detach()).square().mean(-1)


@pytest.mark.parametrize("rotate", [False, True], ids=["straight", "rotated"])
@pytest.mark.parametrize("rows", [3, 1 << 15])  # the second is more than one block of rows, (1 << 17) / 6
def test_lookup_has_the_gradients_of_its_definition(rotate, rows):
    codebook, latents = _draw(9, 6), _draw(1, rows, 6, seed=1)
    weights, one, two = _draw(1, rows, 6, seed=2), _draw(1, rows, seed=3), _draw(1, rows, seed=4)
    outcomes = []
    for make, dtype in ((lookup, torch.float32), (_plain, torch.float64)):
        z = latents.to(dtype).clone().requires_grad_()
        e = codebook.to(dtype).clone().requires_grad_()
        quantized, codes, pull, commitment = make(z, e, rotate)
        ((quantized * weights).sum() + (pull * one).sum() + (commitment * two).sum()).backward()
        outcomes.append((quantized.detach().float(), pull, commitment, z.grad.float(), e.grad.float(), codes))
    for ours, plain in zip(*outcomes, strict=True):
        torch.testing.assert_close(
            ours.detach(), plain.to(ours.dtype).detach(), atol=2e-3 if rows > 3 else 1e-5, rtol=1e-4
        )
    assert torch.equal(outcomes[0][0], codebook[outcomes[0][5]]), "not the entry bit for bit"


@pytest.mark.parametrize("which", ["latents", "codebook", "neither"])
def test_lookup_with_one_side_fixed(which):
    latents, codebook = _draw(2, 5, 4), _draw(7, 4, seed=1)
    latents.requires_grad_(which == "latents")
    codebook.requires_grad_(which == "codebook")
    found = lookup(latents, codebook)
    assert found.commitment.requires_grad == found.pull.requires_grad == (which != "neither")
    if which != "neither":
        (found.latents.sum() + found.pull.sum() + found.commitment.sum()).backward()
    assert (latents.grad is not None) == (which == "latents")
    assert (codebook.grad is not None) == (which == "codebook")


def test_lookup_of_nothing():
    latents = torch.zeros(0, 5, 4, requires_grad=True)
    found = lookup(latents, _draw(7, 4))
    assert found.codes.shape == (0, 5)
    found.latents.sum().backward()


@given(size=st.integers(1, 200), normalize=st.booleans(), inner=st.booleans(), offset=st.floats(-5, 5))
def test_frozen_table_finds_the_same(size, normalize, inner, offset):
    codebook = _draw(size, 5) + (0 if normalize else offset)
    codebook = functional.normalize(codebook, dim=1) if normalize else codebook
    latents = _draw(2, 30, 5, seed=1) + (0 if normalize else offset)
    table = FrozenTable(codebook, normalize, inner)
    codes = table.encode(latents)[:, 0]
    scaled = functional.normalize(latents, dim=-1) if normalize else latents
    scores = scaled.double() @ codebook.double().T if inner else -torch.cdist(scaled.double(), codebook.double())
    chosen = scores.gather(2, codes[..., None])[..., 0]
    np.testing.assert_allclose(chosen, scores.max(2).values, rtol=1e-4, atol=1e-4)
    assert torch.equal(table.decode(codes[:, None]), codebook[codes])
