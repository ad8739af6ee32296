"""Codes of a grid are exact integers, whatever their number of bits."""

import random

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from varitok import UserError
from varitok.codecs.bottlenecks.binary import LookupFreeQuantizer
from varitok.codecs.bottlenecks.fsq import FiniteScalarQuantizer
from varitok.codecs.bottlenecks.grid import Grid

from ..examples import example


@given(bits=st.integers(1, 62), seed=st.integers(0, 1000))
def test_codes_are_exact_integers(bits, seed):
    """Packed in float32 a 36-bit code is nearly always wrong; here they are held against Python's own integers."""
    bottleneck = LookupFreeQuantizer(bits, entropy=0.0)
    draw = random.Random(seed)
    codes = [0, 2**bits - 1, 2 ** (bits - 1), *(draw.randrange(2**bits) for _ in range(20))]
    given_codes = torch.tensor(codes)[None, None]
    latents = bottleneck.decode(given_codes)
    expected = [[2.0 * (code >> bit & 1) - 1 for bit in range(bits)] for code in codes]
    assert latents[0].tolist() == expected
    assert torch.equal(bottleneck.encode(latents), given_codes)
    assert torch.equal(bottleneck.frozen().encode(latents), given_codes)
    assert torch.equal(bottleneck.frozen().decode(given_codes), latents)


def test_36_bits_are_exact():
    bottleneck = example("bsq_36").eval()
    assert bottleneck.codebook_sizes == (2**36,) and bottleneck.bits == 36
    draw = random.Random(0)
    codes = [0, 1, 2**24 + 1, 2**35, 2**36 - 2, 2**36 - 1, *(draw.randrange(2**36) for _ in range(2000))]
    digits = bottleneck.grid.digits(torch.tensor(codes)[None, None])[0].tolist()
    assert digits == [[code >> bit & 1 for bit in range(36)] for code in codes]
    latents = bottleneck.decode(torch.tensor(codes)[None, None])
    assert bottleneck(latents, torch.tensor([len(codes)]), bottleneck.depths(latents)).codes[0, 0].tolist() == codes
    assert bottleneck.encode(latents * 7)[0, 0].tolist() == codes


@given(levels=st.lists(st.integers(2, 40), min_size=1, max_size=8), seed=st.integers(0, 1000))
def test_mixed_radix_codes_are_exact(levels, seed):
    grid, draw = Grid(levels), random.Random(seed)
    digits = [[draw.randrange(level) for level in levels] for _ in range(10)]
    digits.append([level - 1 for level in levels])
    expected = []
    for row in digits:
        code, place = 0, 1
        for digit, level in zip(row, levels, strict=True):
            code, place = code + digit * place, place * level
        expected.append(code)
    codes = grid.code(torch.tensor(digits)[None])
    assert codes[0, 0].tolist() == expected
    assert grid.digits(codes)[0].tolist() == digits


def test_fsq_reaches_every_code():
    bottleneck = FiniteScalarQuantizer([8, 5, 5])
    codes = torch.arange(200).view(1, 1, 200)
    grid = bottleneck.decode(codes)
    assert len(torch.unique(grid[0], dim=0)) == 200
    wide = torch.randn(1, 200000, 3, generator=torch.Generator().manual_seed(0)) * 3
    assert len(bottleneck.encode(wide).unique()) == 200


@pytest.mark.parametrize("levels", [[], [2**32, 2**31]])
def test_a_code_must_fit_an_integer(levels):
    with pytest.raises(UserError, match=r"bottleneck\.levels=\[.*\]: give one or more, with a product below 2\^63"):
        FiniteScalarQuantizer(levels)
