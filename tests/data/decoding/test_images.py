"""Image files of every format, depth, orientation and alpha decode to the pixels that they show."""

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from varitok.data.decoding.errors import BadSample
from varitok.data.decoding.images import center_square, decode_image, decoded_size, upright_rgb
from varitok.data.storage.members import InMemory

from ..pictures import encoded

ORIENT = {
    1: lambda pixels: pixels,
    2: lambda pixels: pixels[:, ::-1],
    3: lambda pixels: pixels[::-1, ::-1],
    4: lambda pixels: pixels[::-1],
    5: lambda pixels: pixels.swapaxes(0, 1),
    6: lambda pixels: np.rot90(pixels, -1),
    7: lambda pixels: pixels.swapaxes(0, 1)[::-1, ::-1],
    8: np.rot90,
}


def _gray(rgb, depth):
    """Return a gray image of a depth, and the RGB pixels that it shows."""
    shown = rgb[..., :1].repeat(3, 2)
    if depth == "16 bits":
        return Image.fromarray(rgb[..., 0].astype(np.uint16) * 256 + 200), shown
    if depth == "unit floats":
        return Image.fromarray(rgb[..., 0].astype(np.float32) / 255), shown
    if depth == "floats":
        return Image.fromarray(rgb[..., 0].astype(np.float32)), shown
    return Image.fromarray(rgb[..., 0]), shown


def _transparent(rgb, kind):
    """Return a partly transparent image, and the RGB pixels that it shows over white."""
    alpha = rgb[..., 1].astype(np.uint8)
    if kind == "palette":
        image = Image.fromarray(rgb).quantize(7)
        opaque = np.array(image.convert("RGB"))
        shown = np.where((np.asarray(image) == 2)[..., None], 255, opaque)
        image.info["transparency"] = 2
        return image, shown
    gray = kind == "gray"
    color = rgb[..., :1].repeat(3, 2) if gray else rgb
    shown = 255 - (255 - color.astype(float)) * alpha[..., None] / 255
    image = Image.fromarray(np.concatenate([color, alpha[..., None]], 2))
    return image.convert("LA") if gray else image, shown


@settings(max_examples=150, deadline=None)
@given(
    form=st.sampled_from(["PNG", "TIFF", "WEBP", "BMP", "JPEG", "GIF"]),
    kind=st.sampled_from(["RGB", "8 bits", "16 bits", "unit floats", "floats", "alpha", "gray", "palette"]),
    orientation=st.sampled_from(list(ORIENT)),
    size=st.tuples(st.integers(1, 40), st.integers(1, 40)),
    seed=st.integers(0, 99),
)
def test_every_format_depth_orientation_and_alpha_is_what_it_shows(form, kind, orientation, size, seed):
    rgb = np.random.default_rng(seed).integers(0, 256, (*size, 3)).astype(np.uint8)
    if kind in ("alpha", "gray", "palette"):
        known = kind != "gray" if form == "WEBP" else form in ("PNG", "TIFF")
        image, shown = _transparent(rgb, kind)
        known = known and not (kind == "palette" and form != "PNG")
    else:
        image, shown = (Image.fromarray(rgb), rgb) if kind == "RGB" else _gray(rgb, kind)
        known = kind in ("RGB", "8 bits") or form == "TIFF" or (form == "PNG" and kind == "16 bits")
    if not known or form in ("JPEG", "GIF"):  # what this format doesn't store; lossy ones are tested below
        return
    exif = Image.Exif()
    exif[0x0112] = orientation
    options = {"lossless": True, "exact": True} if form == "WEBP" else {}
    options |= {} if form == "BMP" else {"exif": exif}
    options |= {"transparency": 2} if kind == "palette" else {}
    found = decode_image(InMemory("a", encoded(image, form, **options)))
    expected = shown if form == "BMP" else ORIENT[orientation](shown)
    assert found.shape == expected.shape and found.dtype == np.uint8
    assert np.abs(found - expected.astype(float)).max() <= (1 if kind in ("alpha", "gray") else 0)


@pytest.mark.parametrize("suffix", ["jpg", "webp", "avif", "gif"])
def test_lossy_formats_are_close(tmp_path, suffix):
    ramp = np.linspace(0, 255, 1200).reshape(30, 40).astype(np.uint8)
    image = Image.fromarray(np.stack([ramp, ramp[::-1], 255 - ramp], axis=2))
    image.save(tmp_path / f"a.{suffix}", **({} if suffix == "gif" else {"quality": 95}))
    assert np.abs(decode_image(tmp_path / f"a.{suffix}").astype(float) - np.asarray(image)).mean() < 12


@pytest.mark.parametrize(
    ("values", "reason"),
    [
        (np.full((3, 4), 300, np.float32), r"values 300 to 300 are not in \[0, 1\] or \[0, 255\]"),
        (np.full((3, 4), -0.5, np.float32), "values -0.5 to -0.5"),
        (np.full((3, 4), np.nan, np.float32), "values nan"),
        (np.full((3, 4), 70_000, np.int32), "not in 16 bits"),
    ],
    ids=str,
)
def test_values_out_of_range_are_refused(tmp_path, values, reason):
    Image.fromarray(values).save(tmp_path / "a.tif")
    with pytest.raises(BadSample, match=reason):
        decode_image(tmp_path / "a.tif")


def test_a_pillow_image_is_left_as_it_was():
    exif = Image.Exif()
    exif[0x0112] = 6
    image = Image.open(InMemory("a.jpg", encoded(Image.new("RGB", (40, 30)), "JPEG", exif=exif)).open())
    assert upright_rgb(image).size == (30, 40)
    assert image.size == (40, 30) and image.getexif()[0x0112] == 6


@pytest.mark.parametrize("orientation", [0, 1, 3, 5, 6, 8, 9])
@pytest.mark.parametrize("shorter_side", [None, 20])
def test_the_decoded_size_follows_from_the_header(tmp_path, orientation, shorter_side):
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.new("RGB", (301, 177)).save(tmp_path / "a.jpg", exif=exif)
    assert decoded_size(tmp_path / "a.jpg", shorter_side) == decode_image(tmp_path / "a.jpg", shorter_side).shape[:2]


def test_a_jpeg_is_decoded_small_but_not_too_small(tmp_path):
    Image.new("RGB", (1600, 1200)).save(tmp_path / "a.jpg")
    assert 128 <= min(decode_image(tmp_path / "a.jpg", shorter_side=64).shape[:2]) < 1200
    assert decode_image(tmp_path / "a.jpg").shape == (1200, 1600, 3)


def _bad(path: Path, kind: str) -> Path:
    if kind == "truncated":
        path = path.with_suffix(".jpg")
        path.write_bytes(encoded(Image.effect_noise((200, 200), 50), "JPEG")[:-5000])
    elif kind == "text":
        path.write_text("this is not an image")
    elif kind == "empty":
        path.touch()
    elif kind == "flipped":
        content = bytearray(encoded(Image.effect_noise((60, 60), 50), "PNG"))
        content[len(content) // 2] ^= 0xFF
        path.write_bytes(content)
    elif kind == "1x1":
        Image.new("RGB", (1, 1)).save(path)
    elif kind == "huge":
        Image.new("1", (30000, 30000)).save(path)
    return path


@pytest.mark.parametrize("kind", ["truncated", "text", "empty", "flipped", "1x1", "huge", "gone"])
def test_an_unreadable_file_is_a_bad_sample(tmp_path, kind):
    path = _bad(tmp_path / "bad.png", kind)
    with pytest.raises(BadSample) as caught:
        decode_image(path, least_side=8)
    assert str(caught.value).startswith(f"{path}: ") and "\n" not in str(caught.value)


def test_large_photos_are_images(tmp_path):
    Image.new("L", (12_000, 9_000)).save(tmp_path / "a.png")  # 108 megapixels, as phones have
    assert decoded_size(tmp_path / "a.png") == (9_000, 12_000)


@settings(max_examples=30, deadline=None)
@given(height=st.integers(1, 50), width=st.integers(1, 50), side=st.integers(1, 40), c=st.sampled_from([1, 3]))
def test_the_centered_square_has_the_asked_size(height, width, side, c):
    pixels = np.random.default_rng(0).integers(0, 256, (height, width, c)).astype(np.uint8)
    square = center_square(pixels, side)
    assert square.shape == (side, side, c)
    if side == min(height, width):
        top, left = (height - side) // 2, (width - side) // 2
        np.testing.assert_array_equal(square, pixels[top : top + side, left : left + side])
