"""Layers of codebooks over nested cells (HiTVideo), and over squares of several sizes (VAR)."""

from collections.abc import Callable
from functools import partial

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional

from varitok import UserError
from varitok.codecs.bottlenecks.hierarchy import Hierarchy, hierarchy, multi_scale
from varitok.codecs.bottlenecks.residual import residual
from varitok.codecs.bottlenecks.vq import EMAVectorQuantizer, VectorQuantizer
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


def scaled(scales: list[int], refinements: int, entries: int = 23) -> Hierarchy:
    torch.manual_seed(0)
    made = multi_scale(partial(VectorQuantizer, DIM, entries), scales, refinements)
    with torch.no_grad():
        for weight in made.parameters():
            weight.normal_(0, 0.5)
    return made.eval()


@given(
    scales=st.lists(st.integers(1, 5), min_size=1, max_size=4, unique=True).map(sorted),
    refinements=st.integers(0, 2),
    steps=st.integers(1, 3),
)
def test_each_scale_codes_the_rest_reduced_by_area(scales: list[int], refinements: int, steps: int) -> None:
    """Against VAR's algorithms 1 and 2, with torch's interpolation of squares of cells."""
    refinements = min(refinements, len(scales))
    bottleneck, whole = scaled(scales, refinements), scales[-1]
    latents = torch.randn(2, steps, bottleneck.dim)
    codes = bottleneck.encode(latents)
    remaining = latents.reshape(-1, whole, whole, DIM).permute(0, 3, 1, 2)  # (b * n, d, rows, columns)
    total, codebook, table = torch.zeros_like(remaining), 0, bottleneck.levels[0].codebook.detach()
    assert len({id(level) for level in bottleneck.levels}) == 1
    for index, side in enumerate(scales):
        reduced = functional.interpolate(remaining, (side, side), mode="area").permute(0, 2, 3, 1).flatten(1, 2)
        found = codes[:, codebook : codebook + side * side].transpose(1, 2).flatten(0, 1)  # (b * n, side^2)
        distances = torch.cdist(reduced, table[None])
        sure = distances.sort(2).values[..., 1] - distances.amin(2) > 1e-3
        assert torch.equal(found[sure], distances.argmin(2)[sure])
        entries = table[found].transpose(1, 2).reshape(-1, DIM, side, side)
        large = functional.interpolate(entries, (whole, whole), mode="bicubic")
        if refinements:
            kernel = bottleneck.scales[index].refinement.conv.weight.detach()
            large = large / 2 + functional.conv2d(large, kernel, padding=1) / 2
        remaining, total, codebook = remaining - large, total + large, codebook + side * side
        wanted = total.permute(0, 2, 3, 1).reshape(2, steps, -1)
        torch.testing.assert_close(bottleneck.decode(codes[:, :codebook]), wanted, atol=1e-4, rtol=1e-4)
    assert codebook == codes.shape[1] and bottleneck.codebook_layers == tuple(side * side for side in scales)
    kernels = {id(scale.refinement) for scale in bottleneck.scales}
    assert len(kernels) == (refinements or 1)


def test_refinements_begin_as_the_identity_and_learn_with_the_latents() -> None:
    """A refinement starts as the identity; the sums of the first scales then teach it and the encoder."""
    made = multi_scale(partial(EMAVectorQuantizer, DIM, 9, 0.0), [1, 2, 4], refinements=2)
    x = torch.randn(5, DIM, 4, 4)
    torch.testing.assert_close(made.scales[0].refinement(x), x)
    latents = torch.randn(2, 1, made.dim, requires_grad=True)
    found = made(latents, torch.tensor([1, 1]), torch.tensor([21, 5]))
    torch.stack([*found.penalties.values()]).sum().backward()
    kernels = [made.scales[index].refinement.conv.weight for index in (0, 2)]
    assert all(kernel.grad.any() for kernel in kernels) and latents.grad.any()
    # The last scale isn't kept by the second sample, and so teaches nobody from it.
    alone = made(latents[1:], torch.tensor([1]), torch.tensor([5]))
    gradient = torch.autograd.grad(alone.penalties["scales"], kernels[1], allow_unused=True)[0]
    assert gradient is None or not gradient.any()


@pytest.mark.parametrize("made", [lambda: scaled([1, 2, 3], 2), lambda: quantizer([1, 4])])
def test_a_frozen_one_trains_on(made: Callable[[], Hierarchy]) -> None:
    trained, other = made(), made()
    with torch.no_grad():
        for weight in other.parameters():
            weight.zero_()
    other.thaw(trained.frozen())
    latents = torch.randn(2, 2, trained.dim)
    codes = trained.encode(latents)
    assert torch.equal(other.encode(latents), codes) and torch.equal(other.decode(codes), trained.decode(codes))


@pytest.mark.parametrize(("scales", "refinements", "words"), [
    ([], 0, "each larger than the last"), ([2, 2], 0, "each larger"), ([1, 2], 3, "at most one for each of 2 scales"),
])  # fmt: skip
def test_scales_that_do_not_grow(scales: list[int], refinements: int, words: str) -> None:
    with pytest.raises(UserError, match=words):
        scaled(scales, refinements)


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


@given(side=st.integers(2, 4), grid=st.tuples(st.integers(1, 3), st.integers(1, 2)), valid=st.integers(1, 3))
def test_a_square_of_an_image_is_a_token_row_by_row(side: int, grid: tuple[int, int], valid: int) -> None:
    form = {"width": 3, "downsample": (1, 1), "channels": 3}
    encoder, decoder = NestedEncoder(_Rows(**form), 1, side), NestedDecoder(_Pixels(**form), 1, side)
    assert encoder.downsample == (side, side) and encoder.width == 3 * side * side
    images = torch.randn(2, 3, grid[0] * side, grid[1] * side)
    tokens = encoder(images)
    assert torch.equal(decoder(tokens, None, [*grid]), images)
    cells = tokens.reshape(2, *grid, side, side, 3)
    assert torch.equal(cells[:, -1, -1], images[:, :, -side:, -side:].permute(0, 2, 3, 1))
    mask = (torch.arange(grid[0] * grid[1]) < valid * grid[1]).expand(2, -1)
    rows = encoder.cell_mask(mask, *grid).reshape(2, grid[0] * side, -1)
    assert torch.equal(rows, (torch.arange(grid[0] * side) < valid * side)[None, :, None].expand_as(rows))


def test_the_preset_has_scales() -> None:
    codec = build_codec(composed("experiment=image/var_64", "codec.encoder.network.base=8")).eval()
    assert codec.downsample == (64, 64) and Ladder(codec).keeps == [1, 5, 14, 30, 55, 91, 155]
    codes = codec.encode(torch.rand(1, 3, 65, 3) * 2 - 1)
    assert codes.shape == (1, 155, 2, 1) and codec.bits(2, 14) == 2 * 14 * 12
    assert codec.decode(codes[:, :14], (65, 3)).shape == (1, 3, 65, 3)


def test_the_preset_has_layers() -> None:
    config = composed("experiment=video/hitvideo_small", "codec.encoder.network.base=8")
    codec = build_codec(config).eval()
    assert codec.downsample == (4, 32, 32) and ChunkedCodec(codec).streams
    assert Ladder(codec).keeps == [1, 5, 21] and Ladder(codec, [2]).keeps == [2]
    codes = codec.encode(torch.rand(1, 3, 5, 64, 40) * 2 - 1)
    assert codes.shape == (1, 21, 2, 2, 2) and codec.bits(8) == 8 * 21 * 10 and codec.bits(8, 5) == 8 * 5 * 10
