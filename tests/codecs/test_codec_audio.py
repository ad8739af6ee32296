"""A codec of sounds: tokens placed along time, any length, codebooks to leave out."""

from functools import cache

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from varitok import UserError
from varitok.codecs.codec import Codec
from varitok.codecs.lengths.distributions import Uniform
from varitok.codecs.lengths.policy import LengthPolicy, Truncate

from .examples import HOP, sound_codec


@cache
def _codec(unit_latents: bool = False) -> Codec:
    """Make a codec that only evaluates, so that all tests may share it."""
    return sound_codec(unit_latents).eval()


def _sound(*shape: int) -> torch.Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(0)) * 2 - 1


@settings(max_examples=15, deadline=None)
@given(samples=st.integers(1, 4 * HOP + 1))
def test_any_length_comes_back_at_its_length(samples):
    codec = _codec()
    sound = _sound(2, 1, samples)
    codes = codec.encode(sound)
    assert codes.shape == (2, codec.num_codebooks, codec.layout.count((samples,)))
    whole = codec(sound)
    assert whole.signal.shape == sound.shape and torch.equal(whole.quantized.codes, codes)
    torch.testing.assert_close(codec.decode(codes, (samples,)), whole.signal, atol=1e-6, rtol=0)
    assert codec.decode(codes).shape == (2, 1, codes.shape[2] * HOP)


@pytest.mark.parametrize("unit_latents", [True, False])
@settings(max_examples=15, deadline=None)
@given(lengths=st.lists(st.integers(1, 5 * HOP), min_size=3, max_size=3))
def test_padding_changes_nothing_valid(unit_latents, lengths):
    codec = _codec(unit_latents)
    sounds = [_sound(1, 1, length) for length in lengths]
    longest = max(lengths)
    batch = torch.cat([torch.nn.functional.pad(sound, (0, longest - sound.shape[2])) for sound in sounds])
    tokens = codec.layout.valid(torch.tensor(lengths), (longest,))
    together = codec(batch, tokens)
    for row, sound in enumerate(sounds):
        alone = codec(sound)
        count = int(tokens[row])
        assert count == codec.layout.count(sound.shape[2:])
        assert torch.equal(together.quantized.codes[row, :, :count], alone.quantized.codes[0])
        torch.testing.assert_close(together.signal[row, :, : lengths[row]], alone.signal[0], atol=1e-5, rtol=0)


def test_a_prefix_of_the_codebooks_decodes_like_the_same_depth_kept():
    codec = _codec()
    sound = _sound(3, 1, 3 * HOP)
    codes = codec.encode(sound)
    for depth in range(1, codec.num_codebooks + 1):
        kept = codec(sound, n_codebooks=torch.full((3,), depth)).signal
        torch.testing.assert_close(codec.decode(codes[:, :depth]), kept, atol=1e-6, rtol=0)


def test_bits_follow_from_the_codebooks():
    codec = sound_codec()
    assert codec.bits(10) == 10 * 4 * 5 and codec.bits(10, num_codebooks=2) == 10 * 2 * 5  # 4 codebooks of 32 entries


def test_placed_tokens_have_no_most_and_cannot_be_dropped():
    codec = sound_codec()
    assert not codec.layout.ordered
    with pytest.raises(UserError, match="has tokens on a grid"):
        _ = codec.tokens
    with pytest.raises(UserError, match="can't be dropped; choose full or quantizer_dropout"):
        Codec(codec.encoder, codec.bottleneck, codec.decoder, LengthPolicy(Uniform(), Truncate()))


def test_latents_of_quiet_sounds_differ_from_the_start():
    """Were biases louder than the signal, all latents would be alike, and all of them would get one code."""
    codec = sound_codec(unit_latents=True).eval()
    quiet = 0.02 * torch.randn(4, 1, 40 * HOP, generator=torch.Generator().manual_seed(0))
    latents = codec.latents(quiet)[:, 3:-3]  # away from the padding
    assert latents.std((0, 1)).norm() > 3 * latents.mean((0, 1)).norm()
