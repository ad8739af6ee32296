"""Images of any kind, and files that are none."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import ExifTags, Image

from varitok import UserError
from varitok.data.batch import normalize, to_uint8
from varitok.data.datamodule import DataModule
from varitok.data.datasets.images import ImageDataset, cifar10, image_folder, imagenette
from varitok.data.datasets.mixture import mix


def oriented(orientation):
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = orientation
    return exif


def photo(width=40, height=30, mode="RGB"):
    ramp = np.linspace(0, 255, width * height).reshape(height, width).astype(np.uint8)
    return Image.fromarray(np.stack([ramp, ramp[::-1], 255 - ramp], axis=2)).convert(mode)


@pytest.fixture
def folder(tmp_path):
    for index in range(6):
        photo(40 + index, 30).save(tmp_path / f"{index}.jpg")
    return tmp_path


def test_a_very_wide_image_costs_no_more_than_its_crop(tmp_path):
    photo(30000, 20).save(tmp_path / "wide.png")
    splits = image_folder(str(tmp_path), image_size=64)
    assert splits.train[0, 0].shape == splits.val[0, 0].shape == (3, 64, 64)


@settings(max_examples=40, deadline=None)
@given(width=st.integers(1, 97), height=st.integers(1, 97), size=st.integers(2, 40), train=st.booleans())
def test_any_size_becomes_the_square(width, height, size, train):
    image = torch.randint(0, 256, (3, height, width), dtype=torch.uint8)
    square = ImageDataset(lambda *_: image, 1, image_size=size, train=train, least_scale=0.5)[3, 0]
    assert square.shape == (3, size, size) and square.dtype == torch.uint8


def test_batches_have_the_shape_most_like_their_images(tmp_path, caplog):
    for split in ("train", "val"):
        (tmp_path / split).mkdir()
        for name, size in zip("abcde", [(64, 30), (40, 41), (30, 60), (20000, 300), (48, 24)], strict=True):
            Image.new("RGB", size, "red").save(tmp_path / split / f"{name}.png")
    Image.new("RGB", (60, 30)).save(tmp_path / "train/f_turned.jpg", exif=oriented(6))
    Image.new("RGB", (1, 1)).save(tmp_path / "train/g_dot.png")
    (tmp_path / "train/h_broken.png").write_bytes(b"nothing")
    buckets = [(16, 16), (16, 32), (32, 16), (8, 40), (40, 8)]
    splits = image_folder(tmp_path, image_size=16, buckets=buckets)
    train = splits.train
    kinds = train.bucket_ids().tolist()
    assert kinds == [1, 0, 2, 3, 1, 2, 0, 0]
    assert [tuple(train[0, index].shape) for index in range(6)] == [(3, *buckets[kind]) for kind in kinds[:6]]
    options = {"workers": 0, "updates": 12, "max_bad_share": 1.0}
    data = DataModule(splits, batch_size=2, budget=2 * 16 * 32, **options)
    batches = list(data.train_dataloader())
    seen = {tuple(batch.signal.shape[2:]): len(batch.signal) for batch in batches}
    assert seen == {(16, 16): 4, (16, 32): 2, (32, 16): 2, (8, 40): 3}
    for batch in batches:
        data.bad.add(batch)
    assert len(data.bad.names) == 2 and "g_dot.png" in " ".join(data.bad.names)  # counted skips
    assert {tuple(batch.signal.shape[2:]) for batch in data.val_dataloader()} == {(16, 16)}
    assert "no file is closest to the shape [40, 8]; no batch has it" in caplog.text
    (first, *_) = DataModule(splits, batch_size=4, overfit=True, **options).train_dataloader()
    assert tuple(first.signal.shape) == (2, 3, 16, 32)
    with pytest.raises(UserError, match=r"^data\.buckets: a mixture has one shape"):
        mix({"all": splits}, {})


def test_validation_is_the_centred_square(tmp_path):
    image = torch.arange(3 * 4 * 8, dtype=torch.uint8).view(3, 4, 8)
    square = ImageDataset(lambda *_: image, 1, image_size=4, train=False)[0, 0]
    assert torch.equal(square, image[:, :, 2:6])


def test_chance_comes_from_seed_epoch_and_index(folder):
    one, same, other = (image_folder(folder, image_size=16, seed=seed).train for seed in (1, 1, 2))
    assert torch.equal(one[4, 2], same[4, 2])
    assert not torch.equal(one[4, 2], one[5, 2]) and not torch.equal(one[4, 2], other[4, 2])


def test_held_out_share_is_stable_and_apart(folder):
    train, val = ({path.name for path in split.files} for split in image_folder(folder, val_share=0.3)[:2])
    assert len(val) == 2 and not train & val and len(train | val) == 6
    photo().save(folder / "another.jpg")
    assert "another.jpg" in {path.name for split in image_folder(folder)[:2] for path in split.files}


def test_subfolders_are_the_splits(folder):
    for name in ("train", "val"):
        (folder / name / "deeper").mkdir(parents=True)
        photo().save(folder / name / "deeper" / f"{name}.PNG")
    assert [[path.name for path in split.files] for split in image_folder(folder)[:2]] == [["train.PNG"], ["val.PNG"]]


def test_folders_that_hold_nothing(tmp_path):
    with pytest.raises(UserError, match=r"data\.root=.*missing: no such folder"):
        image_folder(str(tmp_path / "missing"))
    with pytest.raises(UserError, match=r"no image in this folder \(looked for \.jpg"):
        image_folder(str(tmp_path))


@pytest.mark.parametrize(
    ("make", "archive"), [(cifar10, "cifar-10-python.tar.gz"), (imagenette, "imagenette2-160.tgz")]
)
def test_without_a_network_a_message_says_what_to_place_where(tmp_path, monkeypatch, make, archive):
    def unreachable(*_, **__):
        raise OSError("no route")

    monkeypatch.setattr("urllib.request.urlopen", unreachable)
    with pytest.raises(UserError, match=rf"data\.root=.*{archive} is not there"):
        make(str(tmp_path / "downloads"))


def test_eight_bits_go_round():
    pixels = torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16)
    assert torch.equal(to_uint8(normalize(pixels)), pixels)
    assert to_uint8(torch.tensor([-3.0, 3.0, 0.0039])).tolist() == [0, 255, 128]
