"""A codec of images on a grid: any size, padded to whole patches and cropped back."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from varitok import UserError
from varitok.codecs.codec import Codec
from varitok.codecs.evaluation.ladder import Ladder
from varitok.codecs.modalities.registry import modality_of

from .examples import photo_codec, tiny_codec

SIDES = st.integers(1, 40)


@pytest.fixture(scope="module")
def codec() -> Codec:
    return photo_codec()


def test_both_kinds_of_codec_are_of_images(codec: Codec) -> None:
    assert modality_of(codec).name == modality_of(tiny_codec()).name == "image"
    assert not codec.layout.ordered and codec.layout.axes == "b q h w"
    with pytest.raises(UserError, match="tokens on a grid"):
        _ = codec.tokens


@torch.no_grad()
@settings(max_examples=25, deadline=None)
@given(height=SIDES, width=SIDES)
def test_an_image_of_any_size_is_padded_and_cropped(codec: Codec, height: int, width: int) -> None:
    image = torch.rand(2, 3, height, width, generator=torch.Generator().manual_seed(0)) * 2 - 1
    codes = codec.encode(image)
    rows, columns = -(-height // 4), -(-width // 4)
    assert codes.shape == (2, 1, rows, columns) and codes.dtype == torch.int64
    down, right = (torch.arange(4 * steps).clamp(max=side - 1) for steps, side in ((rows, height), (columns, width)))
    padded = image[:, :, down][:, :, :, right]  # copies of the last row and column
    assert torch.equal(codec.encode(padded), codes)
    whole = codec.decode(codes)
    assert whole.shape == padded.shape
    assert torch.equal(codec.decode(codes, (height, width)), whole[:, :, :height, :width])
    torch.testing.assert_close(codec(image).signal, whole[:, :, :height, :width], atol=1e-5, rtol=0)


@torch.no_grad()
def test_the_ladder_keeps_codebooks(codec: Codec) -> None:
    ladder, image = Ladder(codec), torch.zeros(2, 3, 9, 17)
    assert ladder.keeps == [1] and ladder.axis == "codebooks"
    code = ladder.encode(image, torch.full((2,), 9))
    assert code.tokens.tolist() == [15, 15] and ladder.decode(code, 1).shape == image.shape
    assert ladder.price(code, 1) == (pytest.approx(2 * codec.bits(15)), 2 * 15)  # 200 codes: a byte each
