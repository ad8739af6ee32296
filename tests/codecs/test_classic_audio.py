"""The comparison with classic codecs of sound: places and lengths, what is counted, the whole script."""

import csv
import importlib.util
import shutil
import sys
from io import BytesIO
from pathlib import Path
from types import ModuleType

import av
import pytest
import soundfile
import torch

from varitok.codecs.metrics.audio import available, comparison, written
from varitok.data.voices import Voices

SCRIPT = Path(__file__).resolve().parents[2] / "benchmarks" / "classic_audio.py"
RATES = {"Opus": (8_000, 12_000, 16_000, 24_000, 48_000), "MP3": (8_000, 16_000, 22_050, 24_000, 44_100, 48_000)}
BOTH = [(kind, rate) for kind in RATES for rate in RATES[kind]]


@pytest.fixture(scope="module")
def classic() -> ModuleType:
    spec = importlib.util.spec_from_file_location("classic_audio", SCRIPT)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    sys.modules["classic_audio"] = module
    spec.loader.exec_module(module)
    return module


def _voice(rate: int, samples: int, index: int = 0) -> torch.Tensor:
    return written(Voices(rate, samples, 8, train=False)[0, index])


def _clicks(rate: int, samples: int, places: list[int]) -> torch.Tensor:
    ground = 1e-4 * torch.randn(1, samples, generator=torch.Generator().manual_seed(0))
    ground[0, places] = torch.tensor([0.6, -0.6, 0.6])[: len(places)]
    return written(ground)


@pytest.mark.parametrize(("kind", "rate"), BOTH)
def test_clicks_come_back_at_their_places(classic: ModuleType, kind: str, rate: int) -> None:
    samples = rate + 123
    places = [rate // 7, rate // 2, samples - rate // 30]
    sound = _clicks(rate, samples, places)
    decoded = classic.decode(kind, classic.encode(kind, 64, sound, rate).file, samples)
    assert decoded.shape == sound.shape
    for place in places:
        reach = rate // 100
        around = decoded[0, place - reach : place + reach] * sound[0, place].sign()
        assert around.argmax() == reach


@pytest.mark.parametrize(("kind", "rate"), BOTH)
def test_a_chord_comes_back_in_time_and_at_its_level(classic: ModuleType, kind: str, rate: int) -> None:
    time = torch.arange(2 * rate) / rate
    tones = sum(torch.sin(2 * torch.pi * pitch * (time + 0.1 * time**2)) for pitch in (220.0, 331.0, 557.0, 907.0))
    sound = written(0.15 * tones * (1.5 - time.remainder(0.5))[None])
    coded = classic.encode(kind, 64, sound, rate)
    decoded = classic.decode(kind, coded.file, 2 * rate)
    shifts = range(-3, 4)
    errors = [(decoded.roll(-shift, 1) - sound).square().mean().item() for shift in shifts]
    assert errors.index(min(errors)) == 3
    assert (decoded * sound).sum() / sound.square().sum() == pytest.approx(1, abs=0.01)
    assert comparison("si_sdr", rate)(decoded[None], sound[None], torch.tensor([2 * rate])) > 12


@pytest.mark.parametrize("kind", RATES)
@pytest.mark.parametrize("samples", [1, 2, 47, 100, 319, 320, 576, 1105, 1152, 4801, 33_333])
def test_any_length_comes_back(classic: ModuleType, kind: str, samples: int) -> None:
    for kbps in (classic.FORMATS[kind].settings[0], 64):
        coded = classic.encode(kind, kbps, _voice(16_000, samples, 1), 16_000)
        assert classic.decode(kind, coded.file, samples).shape == (1, samples)
        assert 0 < coded.payload < len(coded.file)


def test_a_sound_that_lost_samples_is_not_compared(classic: ModuleType) -> None:
    coded = classic.encode("Opus", 24, _voice(16_000, 16_000), 16_000)
    with pytest.raises(ValueError, match="16000 of 16001 samples"):
        classic.decode("Opus", coded.file, 16_001)


@pytest.mark.parametrize("kind", RATES)
def test_payload_is_what_the_file_holds_between_headers(classic: ModuleType, kind: str) -> None:
    coded = classic.encode(kind, 32, _voice(24_000, 48_000), 24_000)
    with av.open(BytesIO(coded.file)) as container:
        assert sum(packet.size for packet in container.demux()) == coded.payload
    if kind == "MP3":  # frames of 576 samples, 96 bytes at 32 kbit/s
        assert coded.payload % 96 == 0 and 48_000 / 576 < coded.payload / 96 <= 48_000 / 576 + 4
        assert b"Info" in coded.file and len(coded.file) > coded.payload + 100
    else:  # pages of Ogg: 27 bytes, and one for each 255 begun of each packet
        headers = packets = at = 0
        while at < len(coded.file):
            assert coded.file[at : at + 4] == b"OggS"
            segments = coded.file[at + 27 : at + 27 + coded.file[at + 26]]
            headers += 27 + len(segments)
            content = coded.file[at + 27 + len(segments) :][: sum(segments)]
            packets += 0 if content[:4] == b"Opus" else len(content)  # OpusHead, OpusTags
            at += 27 + len(segments) + len(content)
        assert packets == coded.payload < len(coded.file) - headers


@pytest.mark.parametrize("kind", RATES)
def test_rates_are_about_what_was_asked_for_and_quality_rises(classic: ModuleType, kind: str) -> None:
    rate, samples = 24_000, 72_000
    sound = _voice(rate, samples, 3)
    mel = comparison("mel", rate)
    settings = classic.FORMATS[kind].settings
    found = []
    for kbps in settings:
        coded = classic.encode(kind, kbps, sound, rate)
        assert 0.6 * kbps < coded.payload * 8e-3 / 3 < 1.25 * kbps
        decoded = classic.decode(kind, coded.file, samples)
        found.append((coded.payload, -mel(decoded[None], sound[None], torch.tensor([samples])).item()))
    assert found[0] < found[len(found) // 2] < found[-1] and found[0][1] < found[-1][1]
    assert classic.encode(kind, settings[0], sound, rate) == classic.encode(kind, settings[0], sound, rate)


def test_opus_is_told_what_it_is_for(classic: ModuleType) -> None:
    sound = _voice(16_000, 32_000)
    files = {name: classic.encode("Opus", 12, sound, 16_000, name).file for name in ("audio", "voip")}
    assert files["audio"] != files["voip"]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for split, rate in (("train", 16_000), ("val", 24_000)):
        (tmp_path / "sounds" / split).mkdir(parents=True)
        for index in range(2):
            sound = Voices(rate, rate, 8, channels=2, train=False)[0, index]
            soundfile.write(tmp_path / "sounds" / split / f"{index}.flac", sound.T.numpy(), rate)
    return tmp_path / "sounds"


def _rows(path: Path) -> tuple[dict[str, str], list[dict[str, str]]]:
    lines = path.read_text().splitlines()
    header = dict(line[2:].split(": ", 1) for line in lines if line.startswith("#"))
    return header, list(csv.DictReader(line for line in lines if not line.startswith("#")))


def test_the_script_writes_its_table(classic: ModuleType, folder: Path, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(classic, "FORMATS", {k: f._replace(settings=(32, 64)) for k, f in classic.FORMATS.items()})
    out = tmp_path / "results" / "name.csv"
    classic.main([str(folder), "--sample-rate", "16000", "--seconds", "0.75", "--out", str(out)])
    header, rows = _rows(out)
    assert [(row["codec"], row["setting"]) for row in rows] == [(k, s) for k in ("Opus", "MP3") for s in ("32", "64")]
    assert list(rows[0]) == ["codec", "setting", "kbps", "file_kbps", *available(16_000)]
    for row in rows:
        assert 0.5 * int(row["setting"]) < float(row["kbps"]) < float(row["file_kbps"])
    assert "2 sounds, 1.5 s" in header["dataset"] and "16000 Hz" in header["protocol"]
    assert header["command"].endswith(f"--out {out}") and "PyAV" in header["versions"]
    assert all(f"column {name}" in header for name in available(16_000))

    options = ["--sample-rate", "16000", "--seconds", "0.75", "--codecs", "MP3", "--metrics", "si_sdr"]
    sound, rate = soundfile.read(folder / "val" / "0.flac", dtype="float32")
    soundfile.write(folder / "val" / "0.flac", 0 * sound, rate)
    classic.main([str(folder), *options, "--out", str(out)])
    with_silence = _rows(out)[1]
    (folder / "val" / "0.flac").unlink()
    classic.main([str(folder), *options, "--out", str(out)])
    alone = _rows(out)[1]
    assert list(alone[0]) == ["codec", "setting", "kbps", "file_kbps", "si_sdr"]
    assert [row["si_sdr"] for row in alone] == [row["si_sdr"] for row in with_silence]  # silence has no value
    assert [row["kbps"] for row in alone] == [row["kbps"] for row in with_silence]  # constant rate, equal lengths


def test_the_script_takes_all_sounds_and_leaves_out_what_cannot_be_read(
    classic: ModuleType, folder: Path, tmp_path: Path, monkeypatch, capsys
) -> None:
    monkeypatch.setattr(classic, "FORMATS", {k: f._replace(settings=(32,)) for k, f in classic.FORMATS.items()})
    shutil.move(folder / "train" / "0.flac", folder / "more.flac")
    shutil.rmtree(folder / "train")
    (folder / "broken.wav").write_text("not a sound")
    words = [str(folder), "--codecs", "MP3", "--metrics", "stft", "--out", str(tmp_path / "t.csv")]
    classic.main([*words, "--all"])
    assert "3 sounds, 3.0 s" in _rows(tmp_path / "t.csv")[0]["dataset"]
    assert "left out" in (error := capsys.readouterr().err) and "broken.wav" in error and error.count("\n") == 1


def test_mistakes_end_in_one_line(classic: ModuleType, folder: Path, tmp_path: Path, capsys) -> None:
    out = ["--out", str(tmp_path / "t.csv")]
    for words, error in (
        ([str(tmp_path / "nowhere")], "no such folder"),
        ([str(folder), "--sample-rate", "22050"], "Opus codes sounds at 8000, 12000, 16000, 24000, 48000 Hz, not"),
        ([str(folder), "--sample-rate", "22050", "--codecs", "MP3", "--seconds", "0"], "--seconds 0: must be above 0"),
        ([str(folder), "--seconds", "nan"], "must be above 0"),
        ([str(folder), "--metrics", "psnr"], "metric 'psnr' is unknown"),
    ):
        with pytest.raises(SystemExit) as caught:
            classic.main([*words, *out])
        said = capsys.readouterr().err
        assert caught.value.code == 2 and error in said and said.count("\n") == 1
    for file in (folder / "val").iterdir():
        file.write_bytes(b"nothing")
    with pytest.raises(SystemExit):
        classic.main([str(folder), *out])
    assert "no sound could be read" in capsys.readouterr().err and not (tmp_path / "t.csv").exists()
