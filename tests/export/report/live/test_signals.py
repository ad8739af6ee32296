"""The live page's readers and writers, in headless Chromium: their values are those of Python."""

import base64
import io
import json
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import ExifTags, Image, ImageCms, ImageOps

from varitok.export.report.live import page as live
from varitok.export.runtime.bundle import to_pixels

from ....browser import CHROMIUM, chromium

pytestmark = [pytest.mark.slow, pytest.mark.skipif(CHROMIUM is None, reason="no Chromium")]

SCRIPTS = """
const pack = (array) => {
  const bytes = new Uint8Array(array.buffer, array.byteOffset, array.byteLength), parts = [];
  for (let at = 0; at < bytes.length; at += 8192) parts.push(String.fromCharCode(...bytes.subarray(at, at + 8192)));
  return btoa(parts.join(""));
};
const unpack = (text) => Uint8Array.from(atob(text), (letter) => letter.charCodeAt(0));
async function read(reader, text, about) {
  try {
    const { values, shape, cut } = await reader(new File([unpack(text)], "file"), about);
    return { values: pack(values), shape, cut };
  } catch (error) {
    return { error: error.message, name: error.name };
  }
}
"""


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    """Open a page of the scripts alone: no bundle and no ONNX Runtime."""
    path = tmp_path_factory.mktemp("signals") / "page.html"
    script = Path(live.__file__).with_name("signals.js").read_text(encoding="utf-8")
    path.write_text(f"<!doctype html><meta charset=utf-8><script>{script}{SCRIPTS}</script>")
    with chromium() as found:
        found.open(path)
        yield found
        assert not found.complaints


def in_browser(browser, reader, data, about):
    """Return the encoder's input, or the error's message."""
    text = base64.b64encode(data).decode()
    found = browser.run(f'read({reader}, "{text}", {json.dumps(about)})')
    if "error" in found:
        return f"{found['name']}: {found['error']}"
    return np.frombuffer(base64.b64decode(found["values"]), np.float32).reshape(found["shape"])


def saved(image, to, **options):
    file = io.BytesIO()
    image.save(file, to, **options)
    return file.getvalue()


def by_pillow(data, side):
    """Return the encoder's input by Pillow."""
    image = ImageOps.exif_transpose(Image.open(io.BytesIO(data)))
    if image.mode.startswith("I;16"):
        image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    image = image.convert("RGBA")
    image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    short = min(image.size)
    left, top = (image.width - short) // 2, (image.height - short) // 2
    image = image.crop((left, top, left + short, top + short)).resize((side, side), Image.Resampling.BICUBIC)
    return np.moveaxis(np.asarray(image).astype(np.float32) / np.float32(127.5) - 1, -1, 0)[None]


def photo(width, height, channels=3):
    y, x = np.mgrid[:height, :width]
    smooth = np.stack([x * 200 // width, y * 200 // height, (x + y) % 200, x * 255 // width], axis=-1)
    noise = np.random.default_rng(0).integers(0, 40, (height, width, 4))
    return Image.fromarray((smooth + noise).clip(0, 255).astype(np.uint8)[..., :channels])


def oriented(orientation):
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = orientation
    return exif


def image_files():
    """Return files of all formats that browsers read, by name."""
    rgb, rgba, odd = photo(90, 61), photo(90, 61, 4), photo(57, 83)
    palette = rgb.convert("P", palette=Image.Palette.ADAPTIVE, colors=100)
    every = np.zeros((256, 256, 4), np.uint8)  # each value with each alpha
    every[..., 0], every[..., 3] = np.arange(256)[:, None], np.arange(256)
    # A profile whose red is blue: who applies it swaps them.
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    profile = profile.replace(b"rXYZ", b"####").replace(b"bXYZ", b"rXYZ").replace(b"####", b"bXYZ")
    files = {
        "444.jpg": saved(rgb, "JPEG", subsampling=0),
        "422.jpg": saved(odd, "JPEG", subsampling=1),
        "420.jpg": saved(odd, "JPEG", subsampling=2),
        "progressive.jpg": saved(rgb, "JPEG", progressive=True, quality=40),
        "gray.jpg": saved(rgb.convert("L"), "JPEG"),
        "cmyk.jpg": saved(rgb.convert("CMYK"), "JPEG"),
        "palette.png": saved(palette, "PNG", transparency=bytes(range(0, 200, 2))),
        "alpha.png": saved(Image.fromarray(every), "PNG"),
        "turned-alpha.webp": saved(rgba, "WEBP", lossless=True, exif=oriented(6)),
        "animated.png": saved(rgba, "PNG", save_all=True, append_images=[rgb.convert("RGBA")]),
        "lossy.webp": saved(odd, "WEBP", quality=50),
        "lossy-alpha.webp": saved(rgba, "WEBP", quality=50),
        "lossless-alpha.webp": saved(rgba, "WEBP", lossless=True, exact=True),
        "animated.webp": saved(rgba, "WEBP", lossless=True, save_all=True, append_images=[rgb]),
        "palette.gif": saved(palette, "GIF", transparency=7),
        "animated.gif": saved(palette, "GIF", save_all=True, append_images=[odd.resize(rgb.size).convert("P")]),
        "rgb.bmp": saved(odd, "BMP"),
        "alpha.bmp": saved(rgba, "BMP"),
        "420.avif": saved(odd, "AVIF"),
        "444.avif": saved(rgb, "AVIF", subsampling="4:4:4", quality=90),
        "alpha.avif": saved(rgba, "AVIF"),
        "small.png": saved(photo(5, 3), "PNG"),
        "square.png": saved(photo(24, 24), "PNG"),
        "photo.jpg": saved(photo(1201, 900), "JPEG", quality=90),
    }
    for suffix, to in (("jpg", "JPEG"), ("png", "PNG"), ("webp", "WEBP"), ("avif", "AVIF")):
        files[f"profile.{suffix}"] = saved(rgb, to, icc_profile=profile)
        for orientation in range(1, 9):
            files[f"orientation-{orientation}.{suffix}"] = saved(odd, to, exif=oriented(orientation))
    return files


def test_image_files_have_the_values_that_pillow_gives(browser):
    for name, data in image_files().items():
        side = 256 if name == "alpha.png" else 24
        found, wanted = in_browser(browser, "readPicture", data, {"image_size": side}), by_pillow(data, side)
        if name == "alpha.avif":  # Chromium 156 decodes full-range alpha as limited-range
            assert np.abs(found - wanted).max() * 127.5 < 21, name
        else:
            np.testing.assert_array_equal(found, wanted, err_msg=name)


def chunk(name, data):
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))


# Color type, depths in bits, and channels.
PNG_COLORS = [(0, (1, 2, 4, 8, 16), 1), (2, (8, 16), 3), (3, (1, 2, 4, 8), 1), (4, (8, 16), 2), (6, (8, 16), 4)]


@st.composite
def png_files(draw):
    """Draw PNG files of all color types and depths."""
    color, depths, channels = draw(st.sampled_from(PNG_COLORS))
    depth, width, height = draw(st.sampled_from(depths)), draw(st.integers(1, 40)), draw(st.integers(1, 40))
    random = np.random.default_rng(draw(st.integers(0, 99)))
    rows = random.integers(0, 256, (height, -(-width * channels * depth // 8)), np.uint8)
    head = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, depth, color, 0, 0, 0))
    if draw(st.booleans()):
        head += chunk(b"gAMA", struct.pack(">I", 100_000))  # ignored like profiles
    if draw(st.booleans()):
        head += chunk(b"eXIf", oriented(draw(st.integers(1, 8))).tobytes().removeprefix(b"Exif\0\0"))
    if color == 3:
        head += chunk(b"PLTE", random.bytes(3 << depth))
        head += chunk(b"tRNS", random.bytes(draw(st.integers(0, 1 << depth))))
    elif color in (0, 2) and depth in (1, 8) and draw(st.booleans()):  # Pillow misreads tRNS of other depths
        clear = rows[0, :channels] if depth == 8 else rows[0, :1] >> 7
        head += chunk(b"tRNS", struct.pack(f">{channels}H", *clear))
    data = zlib.compress(b"".join(b"\0" + row.tobytes() for row in rows))
    return b"\x89PNG\r\n\x1a\n" + head + chunk(b"IDAT", data) + chunk(b"IEND", b"")


@given(png_files(), st.integers(1, 30))
def test_any_png_file_has_the_values_that_pillow_gives(browser, data, side):
    found = in_browser(browser, "readPicture", data, {"image_size": side})
    np.testing.assert_array_equal(found, by_pillow(data, side))


def test_images_are_painted_with_the_pixels_that_python_gives(browser):
    edges = (np.arange(1024, dtype=np.float32) / 2 - 100) / np.float32(127.5) - 1  # half of them nearly ties
    values = np.stack([edges, np.nextafter(edges, np.float32(-9)), np.nextafter(edges, np.float32(9))])
    text = base64.b64encode(values.tobytes()).decode()
    found = browser.run(f"""(() => {{
      const canvas = new OffscreenCanvas(1, 1);
      paint(canvas, new Float32Array(unpack("{text}").buffer), 32);
      return pack(canvas.getContext("2d").getImageData(0, 0, 32, 32).data);
    }})()""")
    pixels = np.frombuffer(base64.b64decode(found), np.uint8).reshape(32, 32, 4)
    np.testing.assert_array_equal(pixels[..., :3], to_pixels(values.reshape(1, 3, 32, 32))[0])
