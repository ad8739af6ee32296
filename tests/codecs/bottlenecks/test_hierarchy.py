"""Layers of codebooks over nested cells (HiTVideo)."""

from functools import partial

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from varitok import UserError
from varitok.codecs.bottlenecks.hierarchy import Hierarchy, hierarchy
from varitok.codecs.bottlenecks.residual import residual
from varitok.codecs.bottlenecks.vq import VectorQuantizer
from varitok.codecs.build import build_codec
from varitok.codecs.evaluation.ladder import Ladder
from varitok.codecs.networks.contract import Decoder, Encoder
from varitok.codecs.networks.nested import NestedDecoder, NestedEncoder
from varitok.codecs.streaming import ChunkedCodec

from ...composing import composed

DIM = 3
GROUPS = st.lists(st.integers(1, 4), min_size=1, max_size=3).map(
    lambda steps: [torch.tensor(steps[: place + 1]).prod().item() for place in range(len(steps))]
)


def quantizer(groups: list[int]) -> Hierarchy:
    torch.manual_seed(0)
    made = hierarchy(partial(VectorQuantizer, DIM, 23), groups)
    for level in made.levels:
        nn.init.normal_(level.codebook)
    return made.eval()


@given(groups=GROUPS, steps=st.integers(1, 5))
def test_each_layer_codes_the_mean_of_what_is_left(groups: list[int], steps: int) -> None:
    """Against the definition, group by group."""
    bottleneck = quantizer(groups)
    latents = torch.randn(2, steps, bottleneck.dim)
    codes = bottleneck.encode(latents)
    remaining = latents.reshape(2, steps, groups[-1], DIM).clone()
    codebook = 0
    for count, level in zip(groups, bottleneck.levels, strict=True):
        for cells in remaining.split(groups[-1] // count, 2):  # views
            mean = cells.mean(2)
            distances = (mean.unsqueeze(2) - level.codebook).square().sum(3)
            sure = distances.sort(2).values[:, :, 1] - distances.amin(2) > 1e-4
            assert torch.equal(codes[:, codebook][sure], distances.argmin(2)[sure])
            cells.sub_(level.codebook[codes[:, codebook]].detach().unsqueeze(2))
            codebook += 1
        kept = latents - remaining.flatten(2)
        torch.testing.assert_close(bottleneck.decode(codes[:, :codebook]), kept, atol=1e-5, rtol=1e-5)
    assert codebook == len(bottleneck.codebook_sizes) == codes.shape[1]


def test_groups_of_one_are_the_residual_quantizer() -> None:
    bottleneck = quantizer([1, 1, 1])
    plain = residual(partial(VectorQuantizer, DIM, 23), 3)
    plain.parts.load_state_dict(bottleneck.levels.state_dict())
    latents = torch.randn(2, 7, DIM)
    assert torch.equal(bottleneck.encode(latents), plain.eval().encode(latents))


def test_a_part_of_a_layer_can_be_kept() -> None:
    """What isn't there leaves its cells to the layers before, and teaches its layer nothing."""
    bottleneck = quantizer([1, 4])
    latents = torch.randn(1, 2, 4 * DIM)
    whole, first = torch.tensor([2]), bottleneck.levels[0].codebook
    found = bottleneck(latents, whole, torch.tensor([3]))
    cells = found.latents.reshape(1, 2, 4, DIM)
    assert torch.equal(cells[:, :, 2:], first[found.codes[:, 0]].unsqueeze(2).expand(-1, -1, 2, -1))
    assert torch.equal(found.latents, bottleneck.decode(found.codes[:, :3]))
    assert not torch.equal(found.latents, bottleneck.decode(found.codes))
    # A hundred times as far away, in cells that aren't kept, makes the layer's penalty no larger.
    far = latents.clone()
    far[:, :, 2 * DIM : 3 * DIM] += 100
    far[:, :, 3 * DIM :] -= 100  # so that the mean, which the first layer sees, stays
    again = bottleneck(far, whole, torch.tensor([3]))
    for name, penalty in found.penalties.items():
        torch.testing.assert_close(again.penalties[name], penalty, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("groups", [[], [4, 1], [2, 3]])
def test_groups_that_do_not_nest(groups: list[int]) -> None:
    with pytest.raises(UserError, match="each divides the next"):
        quantizer(groups)


def test_levels_of_several_codebooks() -> None:
    with pytest.raises(UserError, match="one codebook and one width"):
        hierarchy(partial(residual, partial(VectorQuantizer, DIM, 5), 2), [1, 4])


class _Rows(Encoder):
    """Gives the pixels themselves as latents of cells."""

    def forward(self, signal, mask=None, memory=None):
        return signal.flatten(2).transpose(1, 2)


class _Pixels(Decoder):
    def forward(self, latents, mask, grid, memory=None):
        return latents.transpose(1, 2).reshape(-1, 3, *grid)


@given(halvings=st.integers(1, 3), grid=st.tuples(st.integers(1, 3), st.integers(1, 2), st.integers(1, 2)))
def test_cells_nest(halvings: int, grid: tuple[int, int, int]) -> None:
    """The mean of a run of a token's cells is that of a square of pixels, at each halving."""
    form = {"width": 3, "downsample": (1, 1, 1), "channels": 3, "causal": True}
    encoder, decoder = NestedEncoder(_Rows(**form), halvings), NestedDecoder(_Pixels(**form), halvings)
    side = 2**halvings
    clips = torch.randn(2, 3, grid[0], grid[1] * side, grid[2] * side)
    tokens = encoder(clips)
    assert tokens.shape == (2, grid[0] * grid[1] * grid[2], encoder.width)
    assert torch.equal(decoder(tokens, None, [*grid]), clips)
    cells = tokens.reshape(2, *grid, -1, 3)
    for halving in range(halvings + 1):
        count = 2**halving
        squares = nn.functional.avg_pool3d(clips, (1, side // count, side // count))
        means = cells.reshape(2, *grid, count * count, -1, 3).mean(5)
        for place in range(count * count):
            # Of each halving, a bit for the row and one for the column, the coarsest first.
            row = sum((place >> (2 * bit + 1) & 1) << bit for bit in range(halving))
            column = sum((place >> (2 * bit) & 1) << bit for bit in range(halving))
            found = means[..., place, :].permute(0, 4, 1, 2, 3)
            torch.testing.assert_close(found, squares[:, :, :, row::count, column::count])


def test_the_preset_has_layers() -> None:
    config = composed("experiment=video/hitvideo_small", "codec.encoder.network.base=8")
    codec = build_codec(config).eval()
    assert codec.downsample == (4, 32, 32) and ChunkedCodec(codec).streams
    assert Ladder(codec).keeps == [1, 5, 21] and Ladder(codec, [2]).keeps == [2]
    codes = codec.encode(torch.rand(1, 3, 5, 64, 40) * 2 - 1)
    assert codes.shape == (1, 21, 2, 2, 2) and codec.bits(8) == 8 * 21 * 10 and codec.bits(8, 5) == 8 * 5 * 10
