"""What one looks at and listens to: spectrograms and WAV files."""

import math
import wave
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from PIL import Image

from varitok import UserError
from varitok.codecs.modalities.media import decibels, draw_spectrograms, write_wav

RATE = 16_000


def sine(frequency: float, samples: int, level: float = 1.0, rate: int = RATE) -> torch.Tensor:
    return level * torch.sin(2 * math.pi * frequency * torch.arange(samples) / rate)[None]


@pytest.mark.parametrize(("rate", "lines"), [(8_000, 129), (16_000, 257), (24_000, 513), (44_100, 513), (48_000, 1025)])
def test_a_sine_of_full_scale_is_0_db_at_its_frequency(rate, lines):
    frequency = rate / 2 * 32 / (lines - 1)  # a line's own
    for level, decibel in ((1.0, 0.0), (0.1, -20.0), (0.01, -40.0)):
        levels = decibels(sine(frequency, rate, level, rate), rate)
        assert levels.shape[0] == lines and levels.dtype == np.float32
        middle = levels[:, levels.shape[1] // 2]
        assert middle.argmax() == 32 and middle[32] == pytest.approx(decibel, abs=0.1)
        assert middle[40:].max() < -75


def test_silence_is_at_the_bottom_and_nothing_is_outside_the_range():
    assert (decibels(torch.zeros(1, 5000), RATE) == -80).all()
    levels = decibels(3 * torch.randn(2, 20_000, generator=torch.Generator().manual_seed(0)), RATE)
    assert levels.max() <= 0 and levels.min() >= -80


def test_the_power_of_channels_is_averaged():
    left, right = sine(1000, RATE, 0.5), sine(3000, RATE, 0.5)
    both = decibels(torch.cat([left, right]), RATE)
    for frequency, alone in ((1000, left), (3000, right)):
        line = frequency * 512 // RATE
        assert both[line, 50] == pytest.approx(decibels(alone, RATE)[line, 50] - 10 * math.log10(2), abs=0.05)


@pytest.mark.parametrize("seconds", [0.5, 3.0, 12.0, 31.0, 200.0])
def test_time_runs_to_the_right_and_long_sounds_are_not_wider(seconds):
    samples = round(seconds * RATE)
    sound = torch.zeros(1, samples)
    start = samples * 3 // 4
    sound[:, start : start + samples // 8] = sine(2000, samples // 8, 0.5)
    levels = decibels(sound, RATE)
    loud = levels[2000 * 512 // RATE] > -20
    assert 60 <= len(loud) <= 1300
    where = np.flatnonzero(loud) / len(loud)
    assert where.min() == pytest.approx(0.75, abs=0.03) and where.max() == pytest.approx(0.875, abs=0.03)


@pytest.mark.parametrize("samples", [1, 2, 100, 511, 513])
def test_sounds_shorter_than_a_window_have_a_picture(samples):
    levels = decibels(sine(3000, samples) + 0.5, RATE)
    assert levels.shape[0] == 257 and levels.shape[1] >= 1 and np.isfinite(levels).all() and levels.max() > -60


def test_low_rates_have_a_picture():
    assert decibels(sine(10, 500, rate=100), 100).shape[0] == 9


def _panels(path: Path) -> np.ndarray:
    return np.asarray(Image.open(path).convert("RGB")).astype(int)


def test_a_grid_is_drawn_with_a_row_for_each_code_and_a_column_for_each_sound(tmp_path):
    sounds = [sine(1000, RATE), sine(3000, 2 * RATE)]
    quiet = [0 * sound for sound in sounds]
    draw_spectrograms(tmp_path / "new" / "one.png", [("original", sounds)], RATE)
    draw_spectrograms(tmp_path / "new" / "two.png", [("original", sounds), ("k = 1", quiet)], RATE)
    draw_spectrograms(tmp_path / "new" / "wide.png", [("original", [*sounds, sounds[0]])], RATE)
    one, two, wide = (_panels(tmp_path / "new" / f"{name}.png") for name in ("one", "two", "wide"))
    assert two.shape[0] > 1.5 * one.shape[0] - 60 and two.shape[1] == one.shape[1]
    assert wide.shape[1] > one.shape[1] + 200 and wide.shape[0] == one.shape[0]
    # A bright line of full scale (pale yellow of "magma") is in the upper row alone.
    bright = (two[..., 0] > 245) & (two[..., 1] > 200) & (two[..., 2] < 215)
    bright[:, round(two.shape[1] * 0.85) :] = False  # the scale of dB
    rows = np.flatnonzero(bright.sum(1) > 20)
    assert len(rows) and rows.max() < two.shape[0] / 2
    # Low frequencies are at the bottom: the tone of the left panel, 1 kHz, is under that of the right one, 3 kHz.
    half = round(two.shape[1] * 0.45)
    left, right = (np.flatnonzero(side.sum(1) > 20).mean() for side in (bright[:, :half], bright[:, half:]))
    assert left > right + 10


def test_grids_with_holes_are_refused(tmp_path):
    sound = sine(1000, 4000)
    for rows in ([], [("original", [])], [("original", [sound]), ("k = 1", [sound, sound])]):
        with pytest.raises(UserError, match="all must have the same number"):
            draw_spectrograms(tmp_path / "x.png", rows, RATE)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("channels", [1, 2, 3])
def test_a_wav_file_is_16_bits_rounded_and_clamped(tmp_path, channels):
    values = torch.tensor([[-2.0, -1.0, -0.6 / 32768, 0.4 / 32768, 0.25, 1.0, 2.0]])
    sound = torch.cat([values / (1 + channel) for channel in range(channels)])
    write_wav(tmp_path / "new" / "sound.wav", sound, 24_000)
    with wave.open(str(tmp_path / "new" / "sound.wav")) as file:
        assert (file.getnchannels(), file.getsampwidth(), file.getframerate()) == (channels, 2, 24_000)
    read, rate = soundfile.read(tmp_path / "new" / "sound.wav", dtype="int16", always_2d=True)
    assert rate == 24_000 and read.shape == (7, channels)
    assert read[:, 0].tolist() == [-32768, -32768, -1, 0, 8192, 32767, 32767]
    expected = (sound * 32768).round().clamp(-32768, 32767)
    assert torch.equal(torch.from_numpy(read.T.astype(np.float32)), expected)


def test_what_cannot_be_written_is_said_in_a_line(tmp_path):
    sound = sine(1000, 4000)
    (tmp_path / "file").write_text("")
    for path in (tmp_path / "file" / "x.wav", tmp_path):
        with pytest.raises(UserError, match=r"^[^\n]+: [^\n]+$"):
            write_wav(path, sound, RATE)
    sound[0, 7] = math.nan
    for act in (
        lambda: write_wav(tmp_path / "x.wav", sound, RATE),
        lambda: decibels(sound, RATE),
        lambda: draw_spectrograms(tmp_path / "x.png", [("original", [sound])], RATE),
    ):
        with pytest.raises(UserError, match="NaN or infinite"):
            act()
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
