"""The codec and its networks."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from varitok import UserError

from .examples import BOTTLENECKS, MECHANISMS, PATCH, SIZE, STARTS, TOKENS, tiny_codec

CODECS = pytest.mark.parametrize(
    ("bottleneck", "mechanism", "start"),
    [(b, m, s) for b in BOTTLENECKS for m in MECHANISMS for s in STARTS],
)


def _images(b=3, h=SIZE, w=SIZE):
    return torch.rand(b, 3, h, w, generator=torch.Generator().manual_seed(1)) * 2 - 1


def _awake(codec):
    """Set every parameter to a random value: branches that start at zero would hide mistakes."""
    random = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in codec.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=random) * 0.2)
    return codec.eval()


@CODECS
def test_a_prefix_decodes_like_the_same_length_kept(bottleneck, mechanism, start):
    codec = _awake(tiny_codec(bottleneck, mechanism, start))
    images = _images()
    codes = codec.encode(images)
    assert codes.shape == (3, 1, TOKENS)
    for k in range(1, TOKENS + 1):
        kept = codec(images, torch.full((3,), k)).signal
        torch.testing.assert_close(codec.decode(codes[..., :k]), kept, atol=1e-5, rtol=0)
    assert not torch.allclose(codec.decode(codes[..., :1]), kept, atol=1e-3)


@CODECS
def test_each_sample_has_its_own_length(bottleneck, mechanism, start):
    codec = _awake(tiny_codec(bottleneck, mechanism, start))
    images, lengths = _images(), torch.tensor([1, TOKENS, 3])
    together = codec(images, lengths).signal
    alone = torch.cat([codec(images[i : i + 1], lengths[i : i + 1]).signal for i in range(3)])
    torch.testing.assert_close(together, alone, atol=1e-5, rtol=0)


@pytest.mark.parametrize("start", STARTS)
@settings(max_examples=8, deadline=None)
@given(rows=st.integers(1, 5), columns=st.integers(1, 5))
def test_any_size_that_the_patch_divides(start, rows, columns):
    codec = _awake(tiny_codec(start=start))
    images = _images(2, rows * PATCH, columns * PATCH)
    assert codec(images).signal.shape == images.shape
    again = codec.decode(codec.encode(images), images.shape[2:])
    torch.testing.assert_close(again, codec(images).signal, atol=1e-5, rtol=0)


@pytest.mark.parametrize("shape", [(1, 3, 1, 1), (1, 3, SIZE, SIZE + 1), (1, 3, PATCH - 1, SIZE)])
def test_other_sizes_are_refused_in_one_line(shape):
    with pytest.raises(UserError, match="multiples of the patch"):
        tiny_codec().encode(torch.zeros(shape))


@pytest.mark.parametrize("k", [0, TOKENS + 1])
def test_number_of_tokens_out_of_range(k):
    with pytest.raises(UserError, match=f"from 1 to {TOKENS}"):
        tiny_codec().decode(torch.zeros(1, 1, k, dtype=torch.int64))


@CODECS
def test_every_parameter_learns(bottleneck, mechanism, start):
    codec = tiny_codec(bottleneck, mechanism, start).train()
    with torch.no_grad():
        for parameter in codec.parameters():
            parameter.add_(torch.randn(parameter.shape) * 0.1)
    result = codec(_images(), torch.tensor([1, 3, 5]))
    (result.signal.square().mean() + sum(result.quantized.penalties.values())).backward()
    assert [name for name, p in codec.named_parameters() if p.grad is None or not p.grad.any()] == []


def test_bits_follow_from_the_codebooks():
    assert tiny_codec("fsq").bits(3) == pytest.approx(3 * 7.643856)


def test_codes_depend_on_the_image_from_the_start():
    """The collapse that `unit_latents` and `cosines` are there against: a fresh codec uses many codes."""
    codec = tiny_codec("fsq").eval()
    assert len(codec.encode(_images(64)).unique()) > 30
