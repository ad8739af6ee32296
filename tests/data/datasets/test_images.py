"""Images of any kind, and files that are none."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from varitok import UserError
from varitok.data.batch import BadSample, normalize, to_uint8
from varitok.data.datasets.images import ImageDataset, cifar10, image_folder, imagenette
from varitok.data.decoding.images import decode_image, decoded_size


def photo(width=40, height=30, mode="RGB"):
    ramp = np.linspace(0, 255, width * height).reshape(height, width).astype(np.uint8)
    return Image.fromarray(np.stack([ramp, ramp[::-1], 255 - ramp], axis=2)).convert(mode)


@pytest.fixture
def folder(tmp_path):
    for index in range(6):
        photo(40 + index, 30).save(tmp_path / f"{index}.jpg")
    return tmp_path


@pytest.mark.parametrize("suffix", ["jpg", "png", "webp", "bmp", "gif", "tiff", "avif"])
def test_formats(tmp_path, suffix):
    path = tmp_path / f"a.{suffix}"
    photo().save(path, **({"quality": 95} if suffix in ("jpg", "webp", "avif") else {}))
    image = decode_image(path)
    assert image.shape == (3, 30, 40) and image.dtype == torch.uint8
    error = (image.float() - torch.tensor(np.asarray(photo())).permute(2, 0, 1).float()).abs().mean()
    assert error < 12


@pytest.mark.parametrize(("mode", "suffix"), [("L", "png"), ("P", "png"), ("1", "png"), ("CMYK", "jpg"), ("LA", "png")])
def test_modes_become_rgb(tmp_path, mode, suffix):
    path = tmp_path / f"a.{suffix}"
    photo(mode=mode if mode != "LA" else "L").convert(mode).save(path)
    image = decode_image(path)
    assert image.shape == (3, 30, 40)
    if mode in ("L", "LA", "1"):
        assert torch.equal(image[0], image[1])


def test_alpha_is_laid_over_white(tmp_path):
    image = Image.new("RGBA", (8, 8), (255, 0, 0, 0))
    image.putpixel((3, 2), (0, 0, 255, 255))
    image.save(tmp_path / "a.png")
    pixels = decode_image(tmp_path / "a.png")
    assert pixels[:, 0, 0].tolist() == [255, 255, 255] and pixels[:, 2, 3].tolist() == [0, 0, 255]


def test_sixteen_bits_are_scaled(tmp_path):
    values = np.linspace(0, 65535, 64).reshape(8, 8).astype(np.uint16)
    Image.fromarray(values).save(tmp_path / "a.png")
    assert torch.equal(decode_image(tmp_path / "a.png")[0], torch.from_numpy((values >> 8).astype(np.uint8)))


def test_exif_rotation_is_applied(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees
    photo(40, 30).save(tmp_path / "a.jpg", exif=exif, quality=95)
    assert decode_image(tmp_path / "a.jpg").shape == (3, 40, 30)


@pytest.mark.parametrize("orientation", [0, 1, 3, 5, 6, 8, 9])
@pytest.mark.parametrize("shorter_side", [None, 20])
def test_the_size_of_an_image_is_told_before_it_is_decoded(tmp_path, orientation, shorter_side):
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.new("RGB", (301, 177)).save(tmp_path / "a.jpg", exif=exif)
    told = decoded_size(tmp_path / "a.jpg", shorter_side)
    assert told == decode_image(tmp_path / "a.jpg", shorter_side).shape[1:]


def test_a_jpeg_is_decoded_small_but_not_too_small(tmp_path):
    photo(1600, 1200).save(tmp_path / "a.jpg")
    small = decode_image(tmp_path / "a.jpg", shorter_side=64)
    assert 128 <= min(small.shape[1:]) < 1200
    assert decode_image(tmp_path / "a.jpg").shape == (3, 1200, 1600)


def _bad(path, kind):
    if kind == "truncated":
        photo(200, 200).save(path.with_suffix(".jpg"))
        content = path.with_suffix(".jpg").read_bytes()
        path.with_suffix(".jpg").write_bytes(content[: len(content) // 2])
        return path.with_suffix(".jpg")
    if kind == "text":
        path.write_text("this is not a picture")
    elif kind == "empty":
        path.touch()
    elif kind == "flipped":
        photo(60, 60).save(path)
        content = bytearray(path.read_bytes())
        content[len(content) // 2] ^= 0xFF
        path.write_bytes(content)
    elif kind == "1x1":
        photo(1, 1).save(path)
    elif kind == "huge":
        Image.new("1", (30000, 30000)).save(path)
    return path


@pytest.mark.parametrize("kind", ["truncated", "text", "empty", "flipped", "1x1", "huge", "gone"])
def test_what_can_not_be_read_is_a_bad_sample(tmp_path, kind):
    path = _bad(tmp_path / "bad.png", kind)
    with pytest.raises(BadSample) as told:
        decode_image(path, least_side=8)
    assert str(told.value).startswith(f"{path}: ") and "\n" not in str(told.value)


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
