"""Token layouts: numbers, shapes and prefixes of each of the three agree."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from varitok import UserError
from varitok.codecs.layout import BlockLayout, GridLayout, OrderedLayout, TokenLayout, token_layout
from varitok.codecs.masking import prefix_mask

# Each with a size that a signal may have, and the shape of its codes of two codebooks, in a batch of three.
IMAGE = (token_layout((4, 4), tokens=6), (8, 12), (3, 2, 6))
CLIP_OF_BLOCKS = (token_layout((4, 8, 8), 3, 6, 4), (7, 8, 16), (3, 2, 3, 6))
SOUND = (token_layout((5,)), (23,), (3, 2, 5))
SOUND_OF_FOURS = (token_layout((5,), multiple=4), (23,), (3, 2, 8))
PICTURE = (token_layout((4, 8)), (7, 16), (3, 2, 2, 2))
CLIP = (token_layout((4, 8, 8), 3), (7, 11, 16), (3, 2, 3, 2, 2))
EACH = pytest.mark.parametrize(
    ("layout", "size", "shape"),
    [IMAGE, CLIP_OF_BLOCKS, SOUND, SOUND_OF_FOURS, PICTURE, CLIP],
    ids=["image", "clip of blocks", "sound", "sound of fours", "picture", "clip"],
)


def test_what_an_encoder_says_makes_the_layout() -> None:
    assert [type(layout) for layout, *_ in (IMAGE, CLIP_OF_BLOCKS, SOUND, PICTURE, CLIP)] == [
        OrderedLayout, BlockLayout, GridLayout, GridLayout, GridLayout,
    ]  # fmt: skip
    assert token_layout((4, 8, 8), tokens=6).later_tokens == 6


@EACH
def test_codes_come_to_the_bottleneck_and_back(layout: TokenLayout, size: tuple[int, ...], shape: list[int]) -> None:
    codes = torch.arange(int(torch.tensor(shape).prod())).reshape(shape)
    flat = layout.flatten(codes)
    assert flat.shape == (3 * layout.blocks(size), 2, layout.count(size))
    assert torch.equal(layout.to_grid(flat, 3, layout.grid(size)), codes)
    assert len(layout.axes.split()) == codes.ndim


@EACH
def test_padding_makes_whole_steps_and_cropping_undoes_it(
    layout: TokenLayout, size: tuple[int, ...], shape: list[int]
) -> None:
    signal = torch.rand(3, 1, *size)
    whole = layout.pad(signal, layout.causal_pad)
    assert layout.steps(whole) == layout.grid(size)
    assert torch.equal(layout.crop(whole, size), signal)
    assert layout.crop(whole).shape[2] == whole.shape[2] - layout.causal_pad


@EACH
def test_whole_signals_have_all_tokens(layout: TokenLayout, size: tuple[int, ...], shape: list[int]) -> None:
    valid = layout.valid(torch.tensor([size[0]] * 3), size).reshape(3, -1)
    assert (valid.max(1).values == layout.count(size)).all() and valid.shape[1] == layout.blocks(size)


@given(length=st.integers(1, 60), hop=st.integers(1, 5), multiple=st.integers(1, 4))
def test_steps_come_in_multiples(length: int, hop: int, multiple: int) -> None:
    layout = token_layout((hop,), multiple=multiple)
    (steps,) = layout.grid((length,))
    assert steps % multiple == 0 and (steps - multiple) * hop < length <= steps * hop
    assert layout.pad(torch.zeros(1, 1, length), 0).shape[2] == steps * hop
    assert layout.valid(torch.tensor([length, 0]), (length,)).tolist() == [steps, 0]
    assert layout.describe((1, length)).get("multiple", 1) == multiple


@EACH
def test_a_length_keeps_a_prefix_of_every_block(layout: TokenLayout, size: tuple[int, ...], shape: list[int]) -> None:
    codes = torch.ones(shape, dtype=torch.int64)
    flat, lengths = layout.prefix(codes, torch.tensor([1, 2, 2]))
    assert flat.shape == (3 * layout.blocks(size), 2, layout.count(size))
    assert lengths is not None and lengths.tolist() == [n for n in (1, 2, 2) for _ in range(layout.blocks(size))]
    with pytest.raises(UserError, match="lengths from 0 to 2"):
        layout.prefix(codes, torch.tensor([0, 1, 2]))
    # Ordered tokens may be fewer; lengths count them.
    flat, lengths = layout.prefix(codes[..., :1], None)
    if layout.ordered:
        assert flat.shape[2] == 6 and lengths is not None and set(lengths.tolist()) == {1}
    else:
        assert lengths is None
    with pytest.raises(UserError, match="0 tokens"):
        layout.prefix(codes[..., :0], None)


def test_blocks_are_those_of_the_size_and_have_lengths_of_their_own() -> None:
    layout, size, shape = CLIP_OF_BLOCKS
    codes = torch.zeros(shape, dtype=torch.int64)
    each = torch.arange(1, 4).repeat(3, 1)
    lengths = layout.prefix(codes, each)[1]
    assert lengths is not None and torch.equal(lengths, each.flatten())
    assert layout.decoder_grid(codes, None) == [3] and layout.decoder_grid(codes, size) == [3, 1, 2]
    with pytest.raises(UserError, match="codes of 3 blocks: a clip of 3 frames has 2"):
        layout.decoder_grid(codes, (3, 8, 16))
    # Of 7, 5 and 1 valid frames: the first block holds one frame and the lead, later blocks 4 tokens at most.
    assert layout.valid(torch.tensor([7, 5, 1]), size).tolist() == [6, 4, 4, 6, 4, 0, 6, 0, 0]
    values = torch.arange(7.0)[None, None, :, None, None].expand(3, 1, *size)
    assert layout.signal_means(values).tolist() == [0, 2.5, 5.75] * 3  # the 6 once more


def test_latents_are_scaled_by_what_all_have() -> None:
    latents = torch.rand(2, 6, 8) + 1
    one = layout_power(IMAGE[0].normalize(latents))
    torch.testing.assert_close(one.mean(1), torch.ones(2))
    blocks = layout_power(CLIP_OF_BLOCKS[0].normalize(latents))
    torch.testing.assert_close(blocks[:, :4].mean(1), torch.ones(2))  # the tokens that later blocks have
    torch.testing.assert_close(layout_power(CLIP[0].normalize(latents)), torch.ones(2, 6))
    lengths = torch.tensor([6, 3])
    sound = layout_power(SOUND[0].normalize(latents, lengths))
    torch.testing.assert_close((sound * prefix_mask(lengths, 6)).sum(1) / lengths, torch.ones(2))


def layout_power(latents: Tensor) -> Tensor:
    return latents.square().mean(2)


@EACH
def test_a_length_says_what_is_paid_for(layout: TokenLayout, size: tuple[int, ...], shape: list[int]) -> None:
    if layout.ordered:
        assert layout.rungs(2) == 6 and layout.count_kept(4, 6) == (4, None) and layout.count_kept(4, 3) == (3, None)
    else:
        assert layout.rungs(2) == 2 and layout.rungs(0) == 1 and layout.count_kept(4, 1) == (4, 1)
    assert torch.zeros(shape).shape[layout.cut_axis] == layout.rungs(2)


class Scripted(nn.Module):
    """What a frozen codec asks of its layout."""

    def __init__(self, layout: TokenLayout) -> None:
        super().__init__()
        self.layout = layout

    def forward(self, signal: Tensor, codes: Tensor, latents: Tensor) -> tuple[Tensor, Tensor, list[int], Tensor]:
        whole = self.layout.pad(signal, self.layout.causal_pad)
        back = self.layout.to_grid(self.layout.flatten(codes), signal.shape[0], self.layout.steps(whole))
        return self.layout.cut_lead(whole), back, self.layout.code_grid(codes), self.layout.normalize(latents)


@EACH
def test_torchscript_compiles_what_frozen_codecs_call(
    layout: TokenLayout, size: tuple[int, ...], shape: list[int]
) -> None:
    given = torch.rand(3, 1, *size), torch.arange(int(torch.tensor(shape).prod())).reshape(shape), torch.rand(3, 6, 4)
    module = Scripted(layout)
    for found, wanted in zip(torch.jit.script(module)(*given), module(*given), strict=True):
        assert torch.equal(torch.as_tensor(found), torch.as_tensor(wanted))
    assert not module.state_dict()


def test_a_patch_divides_an_image_of_ordered_tokens() -> None:
    with pytest.raises(UserError, match="image of 12 x 9 pixels: both sides must be multiples of the patch, 4"):
        IMAGE[0].grid((9, 12))
