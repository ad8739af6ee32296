"""The classical audio codecs: alignment, lengths, and counted bytes."""

import os
from io import BytesIO
from pathlib import Path

import av
import pytest
import torch
from torchaudio.functional import resample

from varitok import UserError
from varitok.codecs.metrics.audio import round_to_16_bits
from varitok.codecs.modalities.audio import Audio
from varitok.data.synthetic.audio import Voices
from varitok.export.compare.audio import CODECS

OPUS, LOW, MP3, CODEC2 = CODECS
RATES = {"Opus": (8_000, 12_000, 16_000, 24_000, 48_000), "MP3": (8_000, 16_000, 22_050, 24_000, 44_100, 48_000)}
KINDS = {codec.name: codec for codec in (OPUS, MP3)}
BOTH = [(kind, rate) for kind in RATES for rate in RATES[kind]]


def _voice(rate: int, samples: int, index: int = 0) -> torch.Tensor:
    return round_to_16_bits(Voices(rate, samples, length=8, train=False)[0, index])


def _clicks(rate: int, samples: int, places: list[int]) -> torch.Tensor:
    ground = 1e-4 * torch.randn(1, samples, generator=torch.Generator().manual_seed(0))
    ground[0, places] = torch.tensor([0.6, -0.6, 0.6])[: len(places)]
    return round_to_16_bits(ground)


@pytest.mark.parametrize(("kind", "rate"), BOTH)
def test_clicks_come_back_at_their_places(kind: str, rate: int) -> None:
    samples = rate + 123
    places = [rate // 7, rate // 2, samples - rate // 30]
    sound = _clicks(rate, samples, places)
    decoded = KINDS[kind].decode(KINDS[kind].encode(sound, 64, rate)[0], samples)
    assert decoded.shape == sound.shape
    for place in places:
        reach = rate // 100
        around = decoded[0, place - reach : place + reach] * sound[0, place].sign()
        assert around.argmax() == reach


@pytest.mark.parametrize(("kind", "rate"), BOTH)
def test_a_chord_comes_back_in_time_and_at_its_level(kind: str, rate: int) -> None:
    time = torch.arange(2 * rate) / rate
    tones = sum(torch.sin(2 * torch.pi * pitch * (time + 0.1 * time**2)) for pitch in (220.0, 331.0, 557.0, 907.0))
    sound = round_to_16_bits(0.15 * tones * (1.5 - time.remainder(0.5))[None])
    decoded = KINDS[kind].decode(KINDS[kind].encode(sound, 64, rate)[0], 2 * rate)
    shifts = range(-3, 4)
    errors = [(decoded.roll(-shift, 1) - sound).square().mean().item() for shift in shifts]
    assert errors.index(min(errors)) == 3
    assert (decoded * sound).sum() / sound.square().sum() == pytest.approx(1, abs=0.01)
    assert Audio(rate).comparison("si_sdr", "cpu")(decoded[None], sound[None], torch.tensor([2 * rate])) > 12


@pytest.mark.parametrize("kind", RATES)
@pytest.mark.parametrize("samples", [1, 2, 47, 100, 319, 320, 576, 1105, 1152, 4801, 33_333])
def test_any_length_comes_back(kind: str, samples: int) -> None:
    codec = KINDS[kind]
    for kbps in (codec.settings[0], 64):
        file, payload = codec.encode(_voice(16_000, samples, 1), kbps, 16_000)
        assert codec.decode(file, samples).shape == (1, samples)
        assert 0 < payload < len(file)


def test_a_sound_that_lost_samples_is_not_compared() -> None:
    file, _ = OPUS.encode(_voice(16_000, 16_000), 24, 16_000)
    with pytest.raises(ValueError, match="16000 of 16001 samples"):
        OPUS.decode(file, 16_001)


@pytest.mark.parametrize("kind", RATES)
def test_payload_is_what_the_file_holds_between_headers(kind: str) -> None:
    file, payload = KINDS[kind].encode(_voice(24_000, 48_000), 32, 24_000)
    with av.open(BytesIO(file)) as container:
        assert sum(packet.size for packet in container.demux()) == payload
    if kind == "MP3":  # frames of 576 samples, 96 bytes at 32 kbit/s
        assert payload % 96 == 0 and 48_000 / 576 < payload / 96 <= 48_000 / 576 + 4
        assert b"Info" in file and len(file) > payload + 100
    else:  # pages of Ogg: 27 bytes, and one for each 255 begun of each packet
        headers = packets = at = 0
        while at < len(file):
            assert file[at : at + 4] == b"OggS"
            segments = file[at + 27 : at + 27 + file[at + 26]]
            headers += 27 + len(segments)
            content = file[at + 27 + len(segments) :][: sum(segments)]
            packets += 0 if content[:4] == b"Opus" else len(content)  # OpusHead, OpusTags
            at += 27 + len(segments) + len(content)
        assert packets == payload < len(file) - headers


@pytest.mark.parametrize("kind", RATES)
def test_rates_are_about_what_was_asked_for_and_quality_rises(kind: str) -> None:
    rate, samples = 24_000, 72_000
    sound = _voice(rate, samples, 3)
    mel = Audio(rate).comparison("mel", "cpu")
    codec = KINDS[kind]
    settings = codec.settings
    found = []
    for kbps in settings:
        coded = codec.code(sound, kbps, rate)
        assert 0.6 * kbps < coded.payload * 8e-3 / 3 < 1.25 * kbps and coded.payload < coded.file
        found.append((coded.payload, -mel(coded.back[None], sound[None], torch.tensor([samples])).item()))
    assert found[0] < found[len(found) // 2] < found[-1] and found[0][1] < found[-1][1]
    assert codec.encode(sound, settings[0], rate) == codec.encode(sound, settings[0], rate)


def test_opus_is_told_what_it_is_for() -> None:
    sound = _voice(16_000, 32_000)
    files = {name: OPUS.encode(sound, 12, 16_000, application=name)[0] for name in ("audio", "voip")}
    assert files["audio"] != files["voip"]


def test_long_frames_of_opus_take_the_least() -> None:
    sound = _voice(16_000, 48_000)
    coded = [codec.code(sound, codec.settings[0], 16_000) for codec in (LOW, OPUS)]
    assert coded[0].payload < 0.9 * coded[1].payload and coded[0].back.shape == sound.shape
    assert LOW.settings[0] < OPUS.settings[0]


def test_only_sounds_that_they_take_are_coded() -> None:
    assert not OPUS.obstacle(16_000, 1) and not MP3.obstacle(16_000, 1)
    assert OPUS.obstacle(22_050, 1) and not MP3.obstacle(22_050, 1)
    assert all(codec.obstacle(*form) for codec in CODECS for form in ((16_000, 2), (4_000, 1)))


def _commands(folder: Path, monkeypatch: pytest.MonkeyPatch, encoder: str) -> None:
    """Put commands on the path that take the place of codec2's: the decoder returns 160 zeros before its input."""
    for name, body in (("c2enc", encoder), ("c2dec", "head -c 320 /dev/zero; cat")):
        (folder / name).write_text(f"#!/bin/sh\n{body}\n")
        (folder / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")


@pytest.mark.parametrize(("rate", "samples"), [(16_000, 16_001), (24_000, 7_777), (8_000, 10)])
def test_codec2_is_aligned_and_counted(
    rate: int, samples: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _commands(tmp_path, monkeypatch, "cat")
    sound = resample(resample(_voice(rate, samples), rate, 8_000), 8_000, rate)[:, :samples]
    coded = CODEC2.code(sound, 3200, rate)
    assert coded.back.shape == sound.shape and coded.payload == coded.file - 7
    assert coded.payload % 640 == 0 and 2 * (samples * 8_000 / rate + 160) <= coded.payload < 1.1 * samples * 2 + 1280
    assert (coded.back - sound).abs().max() < 0.05 * sound.abs().max() + 0.01


def test_codec2_is_told_when_missing_or_failing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _commands(tmp_path, monkeypatch, "echo no such mode >&2; exit 1")
    assert CODEC2.obstacle(16_000, 1) == ""
    with pytest.raises(UserError, match=r"c2enc 700C: failed \(no such mode\)"):
        CODEC2.code(_voice(16_000, 1600), 700, 16_000)
    monkeypatch.setenv("PATH", str(tmp_path / "empty"))
    assert "Debian's package codec2" in CODEC2.obstacle(16_000, 1)


@pytest.mark.skipif(bool(CODEC2.obstacle(16_000, 1)), reason="needs codec2's commands")
def test_codec2_understands_speech() -> None:
    sound = _voice(16_000, 48_000)
    coded = [CODEC2.code(sound, setting, 16_000) for setting in CODEC2.settings]
    assert [one.payload for one in coded] == sorted(one.payload for one in coded)
    assert 0.8 < coded[0].payload * 8e-3 / 3 < 0.9 and 3.2 < coded[-1].payload * 8e-3 / 3 < 3.4
