"""Sounds made from nothing."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from varitok import UserError
from varitok.codecs.build import build
from varitok.data.synthetic.audio import Voices, voices


@settings(max_examples=20, deadline=None)
@given(
    rate=st.sampled_from([4000, 16000, 44100]),
    samples=st.integers(1, 9000),
    channels=st.integers(1, 2),
    index=st.integers(0, 9),
)
def test_any_rate_and_length(rate, samples, channels, index):
    sound = Voices(rate, samples, channels, length=10)[0, index]
    assert sound.shape == (channels, samples) and sound.dtype == torch.float32
    assert sound.isfinite().all() and sound.abs().max() <= 1


def test_the_same_key_is_the_same_sound_and_no_other():
    one, other, third = (Voices(16000, 4000, length=10, seed=seed) for seed in (0, 0, 1))
    assert torch.equal(one[3, 7], other[3, 7])
    assert not torch.equal(one[3, 7], one[4, 7]) and not torch.equal(one[3, 7], one[3, 6])
    assert not torch.equal(one[3, 7], third[3, 7])


def test_evaluation_has_its_own_sounds_the_same_in_every_epoch():
    splits = voices(16000, 25, 160, 0.25, length=10, val_length=3)
    assert len(splits.train) == 10 and len(splits.val) == 3
    assert torch.equal(splits.val[0, 1], splits.val[5, 1])
    assert not torch.equal(splits.val[0, 1], splits.train[0, 1])
    assert splits.val[0, 0].shape == (1, 4000)


def test_sounds_have_pitch_and_are_not_all_alike():
    """Half of them or more repeat themselves within 20 ms, as voices and tones do; noise would not."""
    made = Voices(16000, 16000, length=40)
    repeating = 0
    for index in range(40):
        sound = made[0, index][0]
        spectrum = torch.fft.rfft(sound, 32000).abs().square()
        echo = torch.fft.irfft(spectrum)[: 16000 // 50]
        repeating += bool(echo[16000 // 400 :].max() > 0.4 * echo[0])
    assert 15 <= repeating < 40
    levels = torch.stack([made[0, index].square().mean().sqrt() for index in range(40)])
    assert levels.max() > 2 * levels.min()


@pytest.mark.parametrize(
    "wrong",
    [{"sample_rate": 100}, {"crop_tokens": 0}, {"channels": 3}, {"val_length": 0}, {"val_seconds": 0.0}, {"length": 0}],
)
def test_wrong_numbers_are_told(wrong):
    with pytest.raises(UserError, match=next(iter(wrong))):
        build({"_target_": "varitok.data.synthetic.audio.voices"} | wrong)


def test_an_index_out_of_range():
    with pytest.raises(IndexError):
        Voices(16000, 100, length=3)[0, 3]
