"""Crops of audio files: their position, their augmentation, and bad files."""

import math
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from torchaudio.functional import loudness as measured_loudness

from varitok import UserError
from varitok.codecs.build import build
from varitok.data.batch import Sample, collate
from varitok.data.datamodule import DataModule, validation_loader
from varitok.data.datasets.audio import audio_folder, audio_mix, librispeech, libritts, speech_commands
from varitok.data.decoding import suffixes

RATE = 8000
FORM = {"sample_rate": RATE, "crop_tokens": 20, "downsample": 40}


def _tone(seconds: float, frequency: float = 200.0, level: float = 0.25) -> np.ndarray:
    time = np.arange(round(seconds * RATE)) / RATE
    return (level * np.sin(2 * np.pi * frequency * time)).astype(np.float32)


def _write(path: Path, sound: np.ndarray, rate: int = RATE) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    soundfile.write(path, sound, rate)
    return path


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Twenty files of 0.1 to 2 s, in splits."""
    for index in range(20):
        split = "val" if index < 4 else "train"
        _write(tmp_path / split / "a" / f"{index}.flac", _tone(0.1 * (index + 1), 100.0 * (1 + index)))
    return tmp_path


def _folder(folder: Path, **form):
    return audio_folder(str(folder), **FORM | form)


def test_a_training_stretch_is_counted_in_tokens_and_lies_in_its_file(folder):
    splits = _folder(folder, gain=[0.0, 0.0], flip=False)
    assert (len(splits.train), len(splits.val)) == (16, 4)
    for index, path in enumerate(splits.train.files):
        whole = torch.from_numpy(soundfile.read(path, dtype="float32")[0])
        stretch = splits.train[3, index]
        assert stretch.shape == (1, min(800, len(whole)))
        assert (whole.unfold(0, stretch.shape[1], 1) - stretch).abs().sum(1).min() == 0


def test_all_chance_hangs_on_the_key(folder):
    one, other = _folder(folder).train, _folder(folder).train
    assert torch.equal(one[2, 5], other[2, 5])
    assert not torch.equal(one[2, 9], one[3, 9]) and not torch.equal(one[2, 9], _folder(folder, seed=1).train[2, 9])


def test_gain_and_sign_are_drawn_and_nothing_is_clipped(folder):
    _write(folder / "train" / "loud.wav", _tone(1.0, level=0.99))
    data = _folder(folder, gain=[-20.0, 20.0], crop_tokens=None).train
    index = next(i for i, path in enumerate(data.files) if path.name == "loud.wav")
    drawn = [data[epoch, index] for epoch in range(40)]
    peaks = torch.stack([sound.abs().max() for sound in drawn])
    assert peaks.max() == pytest.approx(1, abs=1e-3) and peaks.min() < 0.3 and peaks.max() <= 1
    assert 5 < sum(bool(sound[0, 10] > 0) for sound in drawn) < 35


@pytest.mark.parametrize("level", [0.9, 0.01])
def test_loudness_is_brought_to_the_wanted_one(tmp_path, level):
    _write(tmp_path / "a.wav", level * _tone(1.5, 1000.0, 1.0))
    data = _folder(tmp_path, loudness=-23.0, gain=[0.0, 0.0], crop_tokens=None).train
    assert float(measured_loudness(data[0, 0], RATE)) == pytest.approx(-23.0, abs=0.1)


def test_silence_and_short_sounds_pass_loudness(tmp_path):
    _write(tmp_path / "train" / "silent.wav", np.zeros(RATE, np.float32))
    _write(tmp_path / "train" / "sample.wav", np.full(1, 0.5, np.float32))
    _write(tmp_path / "val" / "a.wav", _tone(0.1))
    data = _folder(tmp_path, loudness=-23.0, gain=[0.0, 0.0], flip=False).train
    assert torch.equal(data[0, 1], torch.zeros(1, 800)) and data[0, 0].tolist() == [[0.5]]


def test_evaluation_takes_the_beginning_as_it_is(folder):
    val = _folder(folder, val_seconds=0.25, loudness=-30.0).val
    for index, path in enumerate(val.files):
        whole = soundfile.read(path, dtype="float32")[0]
        assert np.array_equal(val[0, index][0].numpy(), whole[:2000])
    assert [_folder(folder, val_seconds=None).val[0, i].shape[1] for i in range(4)] == [*val.sizes()[:2], 2400, 3200]


@pytest.mark.parametrize("rate", [8000, 16000, 44100, 192000])
def test_any_sample_rate_is_brought_to_one(tmp_path, rate):
    time = np.arange(rate // 2) / rate
    _write(tmp_path / "a.wav", (0.5 * np.sin(2 * np.pi * 440 * time)).astype(np.float32), rate)
    sound = _folder(tmp_path, val_seconds=None).val[0, 0]
    assert sound.shape == (1, 4000)
    expected = 0.5 * torch.sin(2 * math.pi * 440 * torch.arange(4000) / 8000)
    torch.testing.assert_close(sound[0, 200:-200], expected[200:-200], atol=2e-3, rtol=0)


def test_batches_fill_short_sounds_up_and_know_their_lengths(folder):
    (batch,) = validation_loader(_folder(folder).val, 8)
    assert batch.signal.shape == (4, 1, 3200) and batch.lengths.tolist() == [800, 1600, 2400, 3200]
    assert not batch.whole
    for signal, length in zip(batch.signal, batch.lengths, strict=True):
        assert not signal[:, length:].any() and signal[:, :length].any()


def test_images_of_one_size_are_stacked_as_before():
    batch = collate([Sample(torch.ones(3, 4, 5, dtype=torch.uint8))] * 2)
    assert batch.signal.shape == (2, 3, 4, 5) and batch.signal.dtype == torch.uint8 and batch.lengths.tolist() == [4, 4]
    assert batch.whole


def test_unreadable_files_in_an_epoch_are_skipped_and_counted(folder):
    for index in range(4):
        (folder / "train" / f"broken{index}.flac").write_bytes(b"fLaC" + bytes(range(100)))
    (folder / "train" / "empty.wav").write_bytes(b"")
    data = DataModule(_folder(folder), batch_size=4, workers=0, updates=8, max_bad_share=1.0)
    batches = list(data.train_dataloader())
    assert all(len(batch.signal) == 4 and batch.signal.isfinite().all() for batch in batches)
    for batch in batches:
        data.on_before_batch_transfer(batch, 0)
    assert len(data.bad.names) == 5 and all("broken" in name or "empty" in name for name in data.bad.names)


def test_buckets_have_sounds_of_about_one_length(folder):
    whole = {"crop_tokens": None}

    def filled(bucket: float) -> float:
        data = DataModule(_folder(folder, **whole), batch_size=4, workers=0, updates=12, bucket=bucket)
        batches = list(data.train_dataloader())
        return sum(int((batch.signal.shape[2] - batch.lengths).sum()) for batch in batches)

    assert filled(0.05) < 0.4 * filled(0)


def test_a_budget_of_samples_fits_short_sounds_into_large_batches(folder):
    splits = _folder(folder, crop_tokens=None)
    lengths = splits.train.sizes()
    budget = 2 * max(lengths)
    data = DataModule(splits, batch_size=64, workers=0, updates=30, bucket=0.05, budget=budget)
    batches = list(data.train_dataloader())
    assert all(batch.signal.shape[2] * len(batch.signal) <= 1.05 * budget for batch in batches)
    assert {len(batch.signal) for batch in batches} >= {2, 3}
    assert max(batch.signal.shape[2] for batch in batches) == max(lengths)


def test_an_unreadable_sound_is_stood_in_for_by_one_of_the_usual_length(folder):
    (folder / "train" / "broken.flac").write_bytes(b"fLaC" + bytes(range(100)))
    splits = _folder(folder, crop_tokens=None)
    lengths = splits.train.sizes()
    budget = max(lengths)
    options = {"batch_size": 64, "bucket": 0.05, "budget": budget, "max_bad_share": 1.0}
    data = DataModule(splits, workers=0, updates=40, **options)
    batches = list(data.train_dataloader())
    assert any(batch.bad for batch in batches)
    assert all(batch.signal.shape[2] * len(batch.signal) <= 1.12 * budget for batch in batches)


def test_buckets_need_lengths():
    from varitok.data.synthetic.audio import voices

    with pytest.raises(UserError, match=r"loader\.bucket: the lengths of this dataset are unknown"):
        DataModule(voices(), batch_size=4, updates=1, bucket=0.1)


def test_a_mix_gives_each_folder_its_share(tmp_path):
    for name, count, frequency in (("speech", 30, 100.0), ("music", 3, 1000.0)):
        for index in range(count):
            _write(tmp_path / name / "train" / f"{index}.wav", _tone(0.5, frequency))
        _write(tmp_path / name / "val" / "a.wav", _tone(0.3, frequency))
    roots = {"speech": str(tmp_path / "speech"), "music": str(tmp_path / "music"), "none": None}
    splits = audio_mix(roots, weights={"music": 3.0}, **FORM)
    assert len(splits.train) == 33 and len(splits.val) == 2
    crossings = [(splits.train[0, i].sign().diff() != 0).sum() for i in range(33)]
    crossings += [(splits.train[1, i].sign().diff() != 0).sum() for i in range(33)]
    music = sum(bool(count > 100) for count in crossings)
    assert 38 <= music <= 60  # 3 of 4 of 66
    assert torch.equal(splits.train[1, 7], audio_mix(roots, weights={"music": 3.0}, **FORM).train[1, 7])
    with pytest.raises(UserError, match=r"data\.weights\.musik: there is no such dataset \(have: speech, music\)"):
        audio_mix(roots, weights={"musik": 1}, **FORM)
    with pytest.raises(UserError, match="at least one"):
        audio_mix({"a": None}, **FORM)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("sample_rate", 100),
        ("channels", 0),
        ("downsample", 0),
        ("crop_tokens", 0),
        ("val_seconds", 0.0),
        ("val_seconds", 1e-6),
        ("val_share", 1.1),
        ("gain", [1.0, 0.0]),
        ("gain", [1.0]),
    ],
)
def test_wrong_numbers_are_told(folder, name, value):
    with pytest.raises(UserError, match=rf"\.{name}[=:]"):
        build({"_target_": "varitok.data.datasets.audio.audio_folder", "root": str(folder)} | FORM | {name: value})


@pytest.mark.parametrize("weight", [0, -1, math.inf])
def test_a_weight_in_a_mixture_is_above_0_and_finite(folder, weight):
    target = {"_target_": "varitok.data.datasets.audio.audio_mix", "roots": {"a": str(folder), "b": None}}
    with pytest.raises(UserError, match=r"\.weights\.a=.*: must be"):
        build(target | FORM | {"weights": {"a": weight}})


@pytest.mark.parametrize(("make", "name"), [(librispeech, "LibriSpeech"), (libritts, "LibriTTS")])
def test_a_corpus_of_archives_is_read_where_it_lies(tmp_path, make, name):
    for part in ("train-clean-100", "dev-clean"):
        _write(tmp_path / name / part / "19" / "198" / "19-198-0001.flac", _tone(0.4))
    splits = make(str(tmp_path), download=False, sample_rate=RATE, crop_tokens=5, downsample=40)
    assert splits.train[0, 0].shape == (1, 200) and splits.val[0, 0].shape == (1, 3200)
    assert name in splits.about["dataset"]
    with pytest.raises(UserError, match=r"train-other-500\.tar\.gz is not there"):
        make(str(tmp_path), parts=["train-other-500"], download=False, sample_rate=RATE, crop_tokens=5, downsample=40)


def test_speech_commands_keep_their_own_splits(tmp_path):
    root = tmp_path / "SpeechCommands" / "speech_commands_v0.02"
    for word in ("bed", "cat"):
        for speaker in ("a", "b"):
            _write(root / word / f"{speaker}_nohash_0.wav", _tone(0.2))
    (root / "validation_list.txt").write_text("bed/a_nohash_0.wav\n")
    (root / "testing_list.txt").write_text("cat/b_nohash_0.wav\n")
    splits = speech_commands(str(tmp_path), download=False, sample_rate=RATE, crop_tokens=5, downsample=40)
    assert (len(splits.train), len(splits.val)) == (2, 1)
    with pytest.raises(UserError, match=r"speech_commands_v0\.02\.tar\.gz is not there"):
        speech_commands(str(tmp_path / "no"), download=False, sample_rate=RATE, crop_tokens=5, downsample=40)


def test_every_suffix_is_lower_case_with_its_dot():
    assert all(suffix.startswith(".") and suffix == suffix.lower() for suffix in suffixes.ALL)
