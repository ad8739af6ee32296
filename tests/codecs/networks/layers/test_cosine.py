"""The cosine transform: all its coefficients are the image, and the first are the best."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.fft import dctn

from varitok import UserError
from varitok.codecs.build import build
from varitok.codecs.networks.layers.cosine import CosineTransform
from varitok.codecs.networks.register_vit import RegisterEncoder
from varitok.data.batch import normalize

from ....composing import composed


def _images(*size, seed=0):
    return torch.rand(2, *size, generator=torch.Generator().manual_seed(seed)) * 2 - 1


@settings(max_examples=10, deadline=None)
@given(
    channels=st.integers(1, 4),
    frames=st.lists(st.integers(1, 4), max_size=1),
    side=st.integers(1, 7),
    seed=st.integers(0, 9),
)
def test_all_coefficients_are_the_image_or_the_clip(channels, frames, side, seed):
    size = [channels, *frames, side, side]
    transform, signals = CosineTransform(size, math.prod(size)), _images(*size, seed=seed)
    again = transform.synthesize(transform.analyze(signals), size)
    torch.testing.assert_close(again, signals, atol=1e-5, rtol=0)


def test_it_is_scipys_up_to_order_and_scale():
    transform, images = CosineTransform([3, 6, 6], 108), _images(3, 6, 6)
    ours = (transform.analyze(images) * transform.scale).square().sort(1).values
    theirs = torch.tensor(dctn(images.numpy(), axes=(1, 2, 3), norm="ortho")).flatten(1) / images[0].numel() ** 0.5
    torch.testing.assert_close(ours, theirs.square().sort(1).values.float(), atol=1e-6, rtol=1e-4)


def test_gray_comes_first_then_slow_waves():
    transform = CosineTransform([3, 16, 16], 20)
    rows = torch.linspace(0, 3.14159, 33)[:-1] + 3.14159 / 64
    wave = rows.cos().expand(1, 3, 32, 32)  # one half period from left to right
    found = transform.analyze(torch.cat([torch.ones(1, 3, 32, 32), wave]))
    assert found[0].abs().argmax() == 0 and found[0, 1:].abs().max() < 1e-5
    assert found[1].abs().argmax() in (1, 2)


@pytest.mark.parametrize("size", [(64, 64), (8, 24), (2, 2), (40, 8)])
def test_coefficients_dont_depend_on_the_size(size):
    """But for waves that the smaller image cannot hold: those are 0."""
    transform = CosineTransform([3, 16, 16], 30)
    wide = torch.randn(2, 30, generator=torch.Generator().manual_seed(0))
    held = transform.analyze(transform.synthesize(wide, [3, *size]))
    assert held.shape == (2, 30)
    kept = held.abs() > 1e-4
    torch.testing.assert_close(held[kept], wide[kept], atol=1e-4, rtol=0)
    assert kept.all() or min(size) < 6


def test_coefficients_of_photos_are_about_one():
    splits = build(composed("experiment=image/demo").data)
    photos = torch.stack([normalize(splits.val[0, index]) for index in range(len(splits.val))])
    transform = CosineTransform([3, 64, 64], 256)
    power = transform.analyze(photos).square().mean(0)
    assert 0.5 < power.mean().sqrt() < 1.5
    assert (power.view(8, 32).mean(1).sqrt() - 1).abs().max() < 0.5, "some frequencies are expected to be others"


def test_coefficients_of_clips_are_about_one():
    clips = composed("experiment=video/adaptok_small", "data.root=${embedded:clips}").data
    data = build(clips).train
    signals = torch.stack([normalize(data[0, index])[:, 1:] for index in range(len(data))])
    # (n, c, blocks * 4, h, w) -> (n, blocks, c, 4, h, w) -> (n * blocks, c, 4, h, w)
    blocks = signals.unflatten(2, [-1, 4]).transpose(1, 2).flatten(0, 1)
    power = CosineTransform([3, 4, 64, 64], 256).analyze(blocks).square().mean(0)
    assert (power.view(8, 32).mean(1).sqrt() - 1).abs().max() < 0.5, "some frequencies are expected to be others"


@pytest.mark.parametrize("k", [1, 7, 29])
def test_a_prefix_is_the_rest_as_zeros(k):
    transform, coefficients = CosineTransform([3, 16, 16], 30), torch.randn(2, 30)
    rest = torch.cat([coefficients[:, :k], torch.zeros(2, 30 - k)], dim=1)
    short, full = (transform.synthesize(given, [3, 16, 16]) for given in (coefficients[:, :k], rest))
    torch.testing.assert_close(short, full)


def test_more_coefficients_than_values_are_refused():
    with pytest.raises(UserError, match=r"^codec\.encoder\.cosines=4: 50 x 4 is more than an image has values$"):
        RegisterEncoder(image_size=8, patch=8, tokens=50, width=8, depth=1, heads=1, cosines=4)
