"""FeatureMap that a teacher saw before: written once, cut as the signals are, and equal to what it would see."""

import io
import os
import shutil

import numpy as np
import pytest
import soundfile
import torch
from PIL import Image
from torch.nn import functional

from varitok import UserError
from varitok.data.batch import Sample, collate
from varitok.data.cli.features import main
from varitok.data.datamodule import DataModule
from varitok.data.datasets.audio import AudioDataset, audio_folder
from varitok.data.datasets.cached_features import CachedTeacher, audio_teacher, image_teacher, open_features
from varitok.data.datasets.images import image_folder
from varitok.data.decoding.errors import BadSample
from varitok.data.feature_map import FeatureMap, resample
from varitok.data.storage.shard_writer import ShardWriter
from varitok.data.synthetic.images import dead_leaves
from varitok.data.teachers.audio import AudioTransformer
from varitok.data.teachers.vision import VisionTransformer
from varitok.export.cli.main import main as varitok

from ..saved import saved

RATE, CROP = 8000, 400
FORM = {"sample_rate": RATE, "crop_tokens": 10, "downsample": 40, "gain": (0.0, 0.0), "flip": False}
LENGTHS = {"a/one.wav": 2000, "a/two.wav": 1237, "three.v2.wav": 900, "short.wav": 150}


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    """A folder of sounds, the teacher and the shards of what it saw."""
    root = tmp_path_factory.mktemp("corpus")
    random = np.random.default_rng(0)
    for name, samples in LENGTHS.items():
        (root / "sounds" / name).parent.mkdir(parents=True, exist_ok=True)
        soundfile.write(root / "sounds" / name, 0.2 * random.standard_normal(samples), RATE, subtype="FLOAT")
    _, folder = saved(root, "wavlm")
    words = [str(root / "sounds"), "--teacher", str(folder), "--rate", str(RATE), "--out", str(root / "seen")]
    main([*words, "--layer", "1"])
    return root / "sounds", AudioTransformer(str(folder), RATE, 1), root / "seen"


def dataset(sounds, **form):
    return AudioDataset(sorted(sounds.rglob("*.wav")), form.pop("samples", CROP), RATE, **form)


def test_whole_files_are_what_the_teacher_sees(corpus):
    sounds, teacher, seen = corpus
    whole = dataset(sounds, samples=None, train=False)
    shards = open_features(str(seen), whole)
    for index in range(len(whole)):
        wanted = teacher(whole[0, index][None])
        found = shards[0, index]
        assert found.steps == wanted.steps and found.offset == 0
        torch.testing.assert_close(found.values, wanted.values, atol=2e-3, rtol=2e-3)  # float16


def test_stretches_are_cut_where_the_sounds_are(corpus):
    """Brought onto a stretch's own grid, the cut is that part of the whole, wherever it begins."""
    sounds, teacher, seen = corpus
    data = dataset(sounds, seed=3)
    shards, starts = open_features(str(seen), data), set()
    plain = AudioDataset(data.files, None, RATE, train=False)
    for epoch in range(6):
        for index in range(len(data)):
            signal, found = data[epoch, index], shards[epoch, index]
            begin, count = data.crop_range((epoch, index))
            starts.add(begin)
            assert signal.shape[1] == count
            whole = teacher(plain[0, index][None])
            wanted = resample(whole, FeatureMap(torch.zeros(1, 1, count), (1.0,), offset=-begin))
            cut = resample(found, FeatureMap(torch.zeros(1, 1, count), (1.0,)))
            torch.testing.assert_close(cut, wanted, atol=2e-3, rtol=2e-3)
    assert len(starts) > 6


def test_a_batch_of_cuts_is_each_alone(corpus):
    sounds, _, seen = corpus
    data = dataset(sounds, seed=3)
    shards = open_features(str(seen), data)
    samples = [Sample(data[1, index], (), index, {"t": shards[1, index]}) for index in range(4)]
    batch = collate([*samples, Sample(None, ("bad",))])
    like = FeatureMap(torch.zeros(4, 1, CROP // 40), (40.0,))
    together = resample(batch.features["t"], like)
    for index in range(4):
        alone = resample(shards[1, index], like._replace(values=like.values[:1]))
        torch.testing.assert_close(together[index], alone[0])


def test_batches_bring_the_features_of_their_sounds(corpus):
    sounds, _, seen = corpus
    splits = audio_folder(str(sounds), val_share=0.25, **FORM)
    module = DataModule(splits, batch_size=2, workers=0, updates=3, features={"t": str(seen)})
    for batch in module.train_dataloader():
        assert batch.features["t"].values.shape[:2] == (2, 24)
        assert batch.features["t"].offset.shape == (2,)


def test_what_cannot_be_cut_is_refused_in_one_line(corpus, tmp_path):
    seen = corpus[2]
    leaves = dead_leaves(image_size=16, length=4, val_length=2).train
    with pytest.raises(UserError, match=r"need a folder of audio files or images; .*cached=null"):
        open_features(str(seen), leaves)
    more = tmp_path / "more"
    more.mkdir()
    soundfile.write(more / "other.wav", np.zeros(500), RATE)
    with pytest.raises(UserError, match=r"has no features of .*other\.wav; run `varitok features` again"):
        open_features(str(seen), dataset(more))
    with pytest.raises(UserError, match="no feature shards in this folder"):
        CachedTeacher(str(more))
    with pytest.raises(UserError, match=r"a reconstruction needs the teacher"):
        CachedTeacher(str(seen))(torch.zeros(1, 1, 400))


def test_features_that_are_torn_are_a_bad_sample(corpus, tmp_path):
    sounds, _, seen = corpus
    shutil.copytree(seen, tmp_path / "seen")
    shards = open_features(str(tmp_path / "seen"), dataset(sounds))
    os.truncate(tmp_path / "seen" / "000000.tar", 600)  # within the first
    with pytest.raises(BadSample):
        shards[0, 0]


def test_a_teacher_whose_features_are_read_need_not_be_there(corpus):
    seen = audio_teacher("nowhere", RATE, cached=str(corpus[2]))
    assert seen.channels == 24 and seen.name == "wavlm"
    with pytest.raises(UserError, match="nothing is downloaded"):
        audio_teacher("nowhere", RATE)


def slope(height: int, width: int, turned: bool = False) -> Image.Image:
    """Make an image whose red is the column, and green the row, as shown; `turned` stores it on its side."""
    pixels = np.zeros((height, width, 3), np.uint8)
    pixels[..., 0] = 255 * (np.arange(width) + 0.5) / width
    pixels[..., 1] = (255 * (np.arange(height) + 0.5) / height)[:, None]
    return Image.fromarray(np.rot90(pixels) if turned else pixels)


@pytest.mark.parametrize("buckets", [None, [(64, 96), (96, 64), (64, 128)]], ids=["squares", "shapes"])
def test_crops_of_features_are_cut_where_those_of_images_are(tmp_path, buckets):
    """Crops of features that encode their position agree with the pixels."""
    photos = tmp_path / "photos"
    photos.mkdir()
    slope(40, 90).save(photos / "a.png")
    slope(400, 300).save(photos / "b.jpg", quality=95)
    exif = Image.Exif()
    exif[0x0112] = 6  # shown turned to the right
    slope(300, 420, turned=True).save(photos / "c.jpg", quality=95, exif=exif)
    names = [path.name for path in sorted(photos.iterdir())]
    with ShardWriter(tmp_path / "seen") as shards:
        for name, (rows, columns) in zip(names, ((8, 18), (11, 8), (8, 11)), strict=True):
            across, down = np.meshgrid((np.arange(columns) + 0.5) / columns, (np.arange(rows) + 0.5) / rows)
            content = io.BytesIO()
            np.savez(content, values=np.stack([across, down], -1).astype(np.float16))
            shards.write(f"{name}.npz", content.getvalue(), {"side": 8, "teacher": "t", "channels": 2})
    data = image_folder(photos, image_size=64, val_share=0.0, least_scale=0.4, buckets=buckets).train
    found, mirrored = open_features(str(tmp_path / "seen"), data), set()
    for epoch in range(6):
        for index in range(len(data)):
            features = found[epoch, index]
            mirrored.add(data.crop((epoch, index)).mirrored)
            steps = [side // 8 for side in (data.shapes[data.bucket_ids()[index]] if buckets else (64, 64))]
            assert features.values.shape == (1, 2, 8, 8) and list(features.steps) == steps
            shown = functional.avg_pool2d(data[epoch, index][:2].float() / 255, steps)
            # Beyond the center of the outermost position its value is repeated.
            torch.testing.assert_close(features.values[0], shown, atol=0.5 / 8, rtol=0)
            torch.testing.assert_close(features.values[0, :, 2:-2, 2:-2], shown[:, 2:-2, 2:-2], atol=0.012, rtol=0)
    assert mirrored == {False, True}


def test_images_are_what_the_teacher_sees(tmp_path, capsys):
    _, folder = saved(tmp_path, "clip")
    photos = tmp_path / "photos"
    photos.mkdir()
    for number in range(3):
        pixels = np.random.default_rng(number).integers(0, 256, (32, 32, 3), np.uint8)
        Image.fromarray(pixels).save(photos / f"{number}.png")
    (photos / "bad.png").write_bytes(b"no image")
    varitok(["features", str(photos), "--teacher", str(folder), "--side", "32", "--out", str(tmp_path / "seen")])
    assert '"files": 3' in (told := capsys.readouterr().out) and "bad.png" in told
    form = {"image_size": 32, "least_scale": 1.0, "flip": False, "val_share": 0.0}
    (photos / "bad.png").unlink()
    data = image_folder(photos, **form).train
    teacher, shards = VisionTransformer(str(folder), size=32), open_features(str(tmp_path / "seen"), data)
    for index in range(len(data)):
        with torch.no_grad():
            wanted = teacher(data[0, index][None])
        found = shards[0, index]
        torch.testing.assert_close(found.values, wanted.values, atol=2e-3, rtol=2e-3)  # float16
        torch.testing.assert_close(found.pooled, wanted.pooled, atol=2e-3, rtol=2e-3)
    module = DataModule(image_folder(str(photos), **form), batch_size=2, updates=1, features={"t": tmp_path / "seen"})
    batch = next(iter(module.train_dataloader()))
    assert batch.features["t"].values.shape == (2, 24, 4, 4) and batch.features["t"].pooled.shape == (2, 10)
    seen = image_teacher("nowhere", cached=str(tmp_path / "seen"))
    assert (seen.channels, seen.pooled_channels) == (24, 10)
    with pytest.raises(SystemExit):
        varitok(["features", str(photos), "--teacher", str(folder), "--side", "30", "--out", str(tmp_path / "more")])
    assert "--side 30: must be a multiple of the teacher's patch, 8" in capsys.readouterr().err


def test_features_of_another_kind_are_refused(corpus, tmp_path):
    Image.new("RGB", (9, 9)).save(tmp_path / "a.png")
    with pytest.raises(UserError, match="contains features of audio"):
        open_features(str(corpus[2]), image_folder(tmp_path).train)


def test_the_command_tells_a_mistake_in_one_line(tmp_path, capsys):
    with pytest.raises(SystemExit) as ended:
        varitok(["features", str(tmp_path), "--teacher", "nowhere", "--rate", "8000", "--out", str(tmp_path / "out")])
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert ended.value.code == 2 and line.startswith("varitok features: nowhere: place config.json")
