"""Sound files of every kind: a part is the same as in the whole file, and a bad file is named, never a crash."""

import math
import re
import struct
from pathlib import Path

import av
import numpy as np
import pytest
import soundfile
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torchaudio.transforms import Resample

from varitok.data.decoding.audio import MOST_SAMPLES, AudioFile, decode_audio
from varitok.data.decoding.errors import BadSample
from varitok.data.decoding.resampling import BETA, ROLLOFF, ZEROS, resampled_length, resampler

RATE = 16_000


def _tone(frames: int, rate: int = RATE, frequency: float = 300.0, channels: int = 1) -> np.ndarray:
    """Return `(frames, channels)`; each channel half as loud as the one before."""
    sine = 0.5 * np.sin(2 * math.pi * frequency * np.arange(frames) / rate)
    return (sine[:, None] * 0.5 ** np.arange(channels)).astype(np.float32)


def _noise(frames: int, channels: int = 1) -> np.ndarray:
    return np.random.default_rng(0).uniform(-0.4, 0.4, (frames, channels)).astype(np.float32)


def _encode(path: Path, sound: np.ndarray, rate: int, codec: str, picture: bool = False) -> Path:
    """Write a sound with FFmpeg, into a video where wanted; `codec` "" writes no sound."""
    with av.open(str(path), "w") as container:
        video = container.add_stream("mpeg4", rate=10) if picture else None
        if video is not None:
            video.width = video.height = 32
            video.pix_fmt = "yuv420p"
        audio = container.add_stream(codec, rate=rate, layout="mono", bit_rate=128_000) if codec else None
        if video is not None:
            for _ in range(10):
                container.mux(video.encode(av.VideoFrame.from_ndarray(np.zeros((32, 32, 3), np.uint8))))
            container.mux(video.encode())
        if audio is not None:
            frame = av.AudioFrame.from_ndarray(np.ascontiguousarray(sound.T), "fltp", "mono")
            frame.rate, frame.pts = rate, 0
            container.mux(audio.encode(frame))
            container.mux(audio.encode())
    return path


FORMS = {
    "16.wav": "PCM_16",
    "24.wav": "PCM_24",
    "float.wav": "FLOAT",
    "a.flac": "PCM_16",
    "a.ogg": "VORBIS",
    "a.mp3": "MPEG_LAYER_III",
    "a.m4a": "aac",
    "a.webm": "libopus",
    "a.mp4": "aac",
    "aac.mkv": "aac",
}


def _write(folder: Path, name: str, sound: np.ndarray, rate: int = 48_000) -> Path:
    path = folder / name
    form = FORMS.get(name, "PCM_16")
    if form.isupper():
        soundfile.write(path, sound, rate, subtype=form)
        return path
    return _encode(path, sound, rate, form, picture=name == "a.mp4")


@pytest.fixture(scope="module")
def kinds(tmp_path_factory):
    """Two seconds in each form."""
    folder = tmp_path_factory.mktemp("kinds")
    return {name: _write(folder, name, _tone(96_000, 48_000)) for name in FORMS}


def _is_named(path: Path, match: str = ".", **wanted) -> None:
    with pytest.raises(BadSample, match=match) as told:
        decode_audio(path, **wanted)
    assert str(path) in str(told.value)
    assert "\n" not in str(told.value)


@pytest.mark.parametrize("name", FORMS)
def test_every_form_is_read(kinds, name):
    sound = decode_audio(kinds[name])
    assert sound.dtype == np.float32
    assert sound.shape[0] == 1
    assert abs(sound.shape[1] - 96_000) <= 3000  # AAC and MP3 pad
    frames = min(sound.shape[1], 90_000)
    expected = _tone(frames, 48_000)[4000:, 0]
    assert np.abs(sound[0, 4000:frames] - expected).max() < 0.05  # in place, too: a few samples aside would be more


@pytest.mark.parametrize("rate", [None, 16_000, 44_100])
@pytest.mark.parametrize("name", FORMS)
def test_a_stretch_of_every_form_is_that_of_the_whole_file(kinds, name, rate):
    whole = decode_audio(kinds[name], sample_rate=rate)
    for share in (0.01, 0.333, 0.61, 0.95):
        start = int(share * whole.shape[1])
        part = decode_audio(kinds[name], start, 777, rate)
        assert part.shape == (1, 777)
        assert np.abs(part - whole[:, start : start + 777]).max() < 0.01


@given(
    rate=st.sampled_from([8_000, 11_025, 16_000, 22_050, 44_100, 48_000, 44_101]),
    wanted=st.sampled_from([8_000, 16_000, 24_000, 44_100, 48_000]),
    start=st.integers(0, 2500),
    frames=st.integers(1, 2500),
)
def test_a_stretch_is_that_of_the_whole_file(tmp_path_factory, rate, wanted, start, frames):
    path = tmp_path_factory.mktemp("a") / "float.wav"
    soundfile.write(path, _noise(6000), rate, subtype="FLOAT")
    whole = decode_audio(path, sample_rate=wanted)
    with AudioFile(path, wanted) as sound:
        assert sound.length == whole.shape[1] == pytest.approx(6000 * wanted / rate, abs=1.1)
        if start >= sound.length:
            with pytest.raises(BadSample):
                sound.read(start, frames)
            return
        part = sound.read(start, frames)
    expected = whole[:, start : start + frames]
    assert part.shape == expected.shape
    assert np.abs(part - expected).max() < 1e-5


@pytest.mark.parametrize("rate", [None, 16_000])
@pytest.mark.parametrize("name", FORMS)
def test_chunks_are_the_whole_file(kinds, name, rate):
    whole = decode_audio(kinds[name], sample_rate=rate)
    with AudioFile(kinds[name], rate) as sound:
        chunks = list(sound.chunks(7_001))
    assert [chunk.shape[1] for chunk in chunks[:-1]] == [7_001] * (len(chunks) - 1)
    np.testing.assert_allclose(np.concatenate(chunks, 1), whole, atol=1e-6)


@given(
    rate=st.sampled_from([11_025, 22_050, 44_100, 96_000]),
    wanted=st.sampled_from([8_000, 16_000, 24_000, 48_000]),
    samples=st.integers(1, 3000),
)
def test_resampling_is_torchaudios(rate, wanted, samples):
    given = _noise(samples, 2).T
    changed = resampler(rate, wanted)
    reference = Resample(
        rate, wanted, "sinc_interp_kaiser", lowpass_filter_width=ZEROS, rolloff=ROLLOFF, beta=BETA, dtype=torch.float64
    )(torch.from_numpy(given).double())
    assert changed(given).shape == reference.shape == (2, resampled_length(samples, rate, wanted))
    np.testing.assert_allclose(changed(given), reference.numpy(), atol=1e-6)


@settings(max_examples=40, deadline=None)
@given(
    form=st.sampled_from(["wav", "flac", "aiff", "au", "caf", "w64"]),
    depth=st.sampled_from(["PCM_16", "PCM_24", "FLOAT"]),
    rate=st.sampled_from([8_000, 11_025, 16_000, 44_100, 48_000, 96_000]),
    channels=st.integers(1, 6),
    wanted=st.tuples(st.sampled_from([16_000, 24_000]), st.integers(1, 3)),
    samples=st.integers(1, 4000),
)
def test_rates_channels_and_containers(tmp_path_factory, form, depth, rate, channels, wanted, samples):
    given = _noise(samples, channels)
    path = tmp_path_factory.getbasetemp() / f"a.{form}"
    soundfile.write(path, given, rate, subtype="PCM_24" if form == "flac" and depth == "FLOAT" else depth)
    if 1 < channels < wanted[1]:
        _is_named(path, "channels are fewer", sample_rate=wanted[0], channels=wanted[1])
        return
    mixed = given[:, : wanted[1]] if channels > 1 else given.repeat(wanted[1], 1)
    if wanted[1] == 1:
        mixed = given.mean(1, keepdims=True)
    expected = mixed.T if rate == wanted[0] else resampler(rate, wanted[0])(mixed.T)
    found = decode_audio(path, sample_rate=wanted[0], channels=wanted[1])
    assert found.shape == expected.shape == (wanted[1], resampled_length(samples, rate, wanted[0]))
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize("rate", [8_000, 16_000, 22_050, 44_100, 48_000, 96_000, 192_000])
def test_resampling_keeps_level_and_place(tmp_path, rate):
    path = _write(tmp_path, "float.wav", _tone(rate, rate), rate)
    sound = decode_audio(path, sample_rate=24_000)
    assert sound.shape == (1, 24_000)
    middle = slice(2000, 22_000)  # the edges ring
    assert np.abs(sound[0, middle] - _tone(24_000, 24_000)[middle, 0]).max() < 1e-3


def test_what_a_lower_rate_cannot_hold_is_gone(tmp_path):
    path = _write(tmp_path, "float.wav", _tone(48_000, 48_000, 11_000), 48_000)
    assert np.abs(decode_audio(path, sample_rate=16_000)[:, 1000:-1000]).max() < 1e-3


def test_channels(tmp_path):
    mono = _write(tmp_path, "1.wav", _tone(400))
    stereo = _write(tmp_path, "2.wav", _tone(400, channels=2))
    many = _write(tmp_path, "8.wav", _tone(400, channels=8))
    first = decode_audio(mono)
    assert np.array_equal(decode_audio(mono, channels=2), first.repeat(2, 0))
    assert np.allclose(decode_audio(stereo), np.concatenate([first, first / 2]), atol=1e-4)
    assert np.allclose(decode_audio(stereo, channels=1), first * 0.75, atol=1e-4)
    assert decode_audio(many).shape == (8, 400)
    assert np.array_equal(decode_audio(many, channels=2), decode_audio(many)[:2])
    assert np.allclose(decode_audio(many, channels=1), decode_audio(many).mean(0, keepdims=True), atol=1e-6)
    _is_named(stereo, "2 channels are fewer than 3", channels=3)


def test_many_channels_that_only_ffmpeg_reads(tmp_path):
    values = np.random.default_rng(0).integers(-20_000, 20_000, (4800, 12), np.int16)
    with av.open(str(tmp_path / "a.mka"), "w", format="matroska") as container:
        stream = container.add_stream("pcm_s16le", rate=48_000, layout="12 channels")
        frame = av.AudioFrame(format="s16", layout="12 channels", samples=4800)
        frame.planes[0].update(values.tobytes().ljust(frame.planes[0].buffer_size, b"\0"))
        frame.rate, frame.pts = 48_000, 0
        container.mux(stream.encode(frame))
        container.mux(stream.encode())
    sound = decode_audio(tmp_path / "a.mka")
    assert np.array_equal(sound, values.T / np.float32(32768))


class _Counting(soundfile.SoundFile):
    """A file that counts the bytes read."""

    frames_read = 0

    def read(self, frames=-1, *args, **options):
        result = super().read(frames, *args, **options)
        _Counting.frames_read += len(result)
        return result


@pytest.mark.parametrize("rate", [8_000, 16_000])
def test_only_the_stretch_is_read(tmp_path, monkeypatch, rate):
    path = _write(tmp_path, "a.flac", np.tile(_tone(8_000, 8_000), (600, 1)), 8_000)
    monkeypatch.setattr(soundfile, "SoundFile", _Counting)
    monkeypatch.setattr(_Counting, "frames_read", 0)
    assert decode_audio(path, 300 * rate, rate, rate).shape == (1, rate)
    assert 8_000 <= _Counting.frames_read < 10_000  # of 4.8 million


@pytest.mark.parametrize("name", ["16.wav", "a.flac", "a.ogg"])
def test_little_silent_and_clipped_sounds_are_sounds(tmp_path, name):
    one = decode_audio(_write(tmp_path, name, _tone(1) + 0.5, 16_000))
    assert one.shape == (1, 1)
    assert not decode_audio(_write(tmp_path, name, np.zeros((500, 1)), 16_000)).any()
    loud = decode_audio(_write(tmp_path, name, np.sign(_tone(4000)), 16_000))
    assert 0.9 < np.abs(loud).max() <= 1


@pytest.mark.parametrize("rate", [None, 24_000])
@pytest.mark.parametrize("name", ["a.mp3", "a.webm"])
def test_a_stretch_after_what_is_left_has_no_samples(tmp_path, kinds, name, rate):
    data = kinds[name].read_bytes()
    (tmp_path / name).write_bytes(data[: len(data) * 3 // 10])
    with AudioFile(tmp_path / name, rate) as sound, pytest.raises(BadSample, match=r"no samples|End of file|seek"):
        sound.read(sound.length - 1000, 500)


def test_a_negative_start_is_told(tmp_path):
    path = _write(tmp_path, "a.wav", _tone(100), 48_000)
    for rate in (None, 16_000):
        with pytest.raises(ValueError, match="start=-1"):
            decode_audio(path, -1, 10, rate)


def test_a_rate_that_is_nearly_the_wanted_one_is_taken_for_it(tmp_path):
    soundfile.write(tmp_path / "a.wav", _noise(500), 16_000, "FLOAT")  # 16,001 : 16,000 is 1 : 1 to within 1 / 512
    np.testing.assert_array_equal(decode_audio(tmp_path / "a.wav", sample_rate=16_001), _noise(500).T)


def test_raw_aac_is_read_from_its_beginning(tmp_path):
    path = _encode(tmp_path / "a.aac", _tone(5 * 1024), RATE, "aac")
    with av.open(str(path)) as file:
        wanted = np.concatenate([frame.to_ndarray() for frame in file.decode(audio=0)], 1)
    found = decode_audio(path)
    np.testing.assert_allclose(found, wanted.clip(-1, 1)[:, : found.shape[1]], atol=1e-6)
    assert found.shape[1] > 4 * 1024


def test_one_sample_is_resampled(tmp_path):
    assert decode_audio(_write(tmp_path, "a.wav", _tone(1) + 0.5, 48_000), sample_rate=16_000).shape == (1, 1)


def test_what_overshoots_is_clipped(tmp_path):
    sound = decode_audio(_write(tmp_path, "float.wav", 4 * _tone(1000)))
    assert (sound.min(), sound.max()) == (-1, 1)


@pytest.mark.parametrize(
    ("value", "match"),
    [
        (math.nan, "not finite"),
        (math.inf, "not finite"),
        (-math.inf, "not finite"),
        (3e38, "values up to"),
        (-99, "99"),
    ],
)
@pytest.mark.parametrize("rate", [None, 24_000])
def test_values_that_are_no_sound_are_named(tmp_path, value, match, rate):
    sound = _tone(1000)
    sound[500] = value
    _is_named(_write(tmp_path, "float.wav", sound), match, sample_rate=rate)


def _text(path: Path) -> None:
    path.write_text("This is no sound.\n" * 100)


BROKEN = {
    "empty.wav": (lambda path: path.write_bytes(b""), "an empty file"),
    "nothing.wav": (lambda path: soundfile.write(path, np.zeros((0, 1)), RATE), "no samples"),
    "nothing.flac": (lambda path: soundfile.write(path, np.zeros((0, 1)), RATE), "."),
    "text.flac": (_text, "no samples|neither libsndfile nor FFmpeg knows"),
    "text.mp3": (_text, "neither libsndfile nor FFmpeg knows"),
    "list.m4a": (lambda path: path.write_text("#EXTM3U\n#EXTINF:10,\n/etc/passwd\n"), "neither"),
    "noise.ogg": (lambda path: path.write_bytes(np.random.default_rng(1).bytes(5000)), "neither"),
    "head.wav": (lambda path: path.write_bytes(b"RIFF"), "."),
    "folder.wav": (lambda path: path.mkdir(), "(?i)directory"),
    "missing.wav": (lambda path: None, "No such file"),
    "silent.mp4": (lambda path: _encode(path, _tone(0), RATE, "", picture=True), "has no audio stream"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_what_is_no_sound_is_named(tmp_path, name):
    make, match = BROKEN[name]
    make(tmp_path / name)
    _is_named(tmp_path / name, match)


def test_a_video_by_a_sounds_name_is_named(tmp_path, kinds):
    (tmp_path / "a.wav").write_bytes(kinds["a.mp4"].read_bytes())
    _is_named(tmp_path / "a.wav", "a video with the suffix of an audio file")


@pytest.mark.parametrize("rate", [None, 16_000])
@pytest.mark.parametrize("name", ["16.wav", "a.flac", "a.ogg", "a.mp3", "a.m4a"])
def test_a_cut_file_is_named_or_shorter(tmp_path, kinds, name, rate):
    data = kinds[name].read_bytes()
    (tmp_path / name).write_bytes(data[: len(data) // 2])
    try:
        assert decode_audio(tmp_path / name, sample_rate=rate).shape[1] < 60_000
    except BadSample as error:
        assert "\n" not in str(error)
    _is_named(tmp_path / name, start=90_000 if rate is None else 30_000, frames=1000, sample_rate=rate)


def test_a_cut_flac_is_named(tmp_path, kinds):
    data = kinds["a.flac"].read_bytes()
    (tmp_path / "a.flac").write_bytes(data[: len(data) // 2])
    _is_named(tmp_path / "a.flac")
    assert decode_audio(tmp_path / "a.flac", 0, 1000).shape == (1, 1000)  # the rest is intact


@pytest.mark.parametrize(("frames", "name"), [(1 << 31, "a.wav"), ((1 << 36) - 1, "a.flac")])
def test_a_header_that_promises_too_much_costs_no_memory(tmp_path, frames, name):
    path = _write(tmp_path, name, _tone(1000))
    data = bytearray(path.read_bytes())
    if name == "a.wav":
        data[4:8] = data[40:44] = struct.pack("<I", min(frames * 2, 2**32 - 2))
    else:  # STREAMINFO: the low 36 bits of bytes 10 to 17
        (word,) = struct.unpack(">Q", data[18:26])
        data[18:26] = struct.pack(">Q", word >> 36 << 36 | frames)
    path.write_bytes(data)
    try:
        assert decode_audio(path).shape == (1, 1000)
    except BadSample as error:
        assert re.search("too long|ends after", str(error))


def test_what_is_too_long_is_refused_before_it_is_decoded(tmp_path, monkeypatch):
    monkeypatch.setattr("varitok.data.decoding.audio.MOST_SAMPLES", 1000)
    path = _write(tmp_path, "a.wav", _tone(501, channels=2), RATE)
    _is_named(path, "too long to be read at once")
    assert decode_audio(path, 1, 500).shape == (2, 500)
    assert MOST_SAMPLES > 60 * 48_000 * 2


@pytest.mark.parametrize("rate", [1, 1999, 1_000_000])
def test_a_rate_that_no_sound_has_is_named(tmp_path, rate):
    _is_named(_write(tmp_path, "a.wav", _tone(100), rate), "a sample rate of")


@pytest.mark.parametrize("name", FORMS)
@settings(max_examples=25)
@given(data=st.data())
def test_flipped_bytes_are_never_a_crash(tmp_path_factory, kinds, name, data):
    content = bytearray(kinds[name].read_bytes())
    reach = data.draw(st.sampled_from([64, 512, len(content)]))  # headers are where it hurts
    for _ in range(data.draw(st.integers(1, 8))):
        content[data.draw(st.integers(0, min(reach, len(content)) - 1))] = data.draw(st.integers(0, 255))
    path = tmp_path_factory.mktemp("a") / name
    path.write_bytes(content)
    try:
        sound = decode_audio(path, 1000, 4000, 16_000, 1)
    except BadSample as error:
        assert "\n" not in str(error)
    else:
        assert sound.shape[0] == 1
        assert 1 <= sound.shape[1] <= 4000
        assert np.isfinite(sound).all()
        assert np.abs(sound).max() <= 1
