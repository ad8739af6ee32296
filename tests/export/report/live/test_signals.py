"""The live page's readers and writers, in headless Chromium: their values are those of Python."""

import base64
import io
import json
import struct
import zlib
from pathlib import Path

import av
import numpy as np
import pytest
import soundfile
from hypothesis import given
from hypothesis import strategies as st
from PIL import ExifTags, Image, ImageCms

from varitok.data.decoding.audio import decode_audio
from varitok.data.decoding.images import center_square, upright_rgb
from varitok.export.report.live import page as live
from varitok.export.runtime.bundle import to_pixels

from ....browser import CHROMIUM, chromium
from ....data.media import RATE, write_images, write_sounds

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
    """Return the encoder's input by the decoding room."""
    with Image.open(io.BytesIO(data)) as image:
        pixels = center_square(np.array(upright_rgb(image)), side)
    return np.moveaxis(pixels.astype(np.float32) / np.float32(127.5) - 1, -1, 0)[None]


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


def test_images_of_the_parity_test_have_the_values_that_python_gives(browser, tmp_path):
    for name, path in write_images(tmp_path).items():
        found = in_browser(browser, "readPicture", path.read_bytes(), {"image_size": 24})
        if path.suffix == ".tif":
            assert found.startswith("InvalidStateError: "), name
        else:
            np.testing.assert_array_equal(found, by_pillow(path.read_bytes(), 24), err_msg=name)


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


def by_python(path, rate, channels):
    """Return the encoder's input by the decoding room, or the error's message."""
    try:
        return decode_audio(path, sample_rate=rate, channels=channels)[None]
    except Exception as error:
        return str(error)


def sound(length, channels=1, peak=0.9, seed=0):
    steps = np.random.default_rng(seed).normal(size=(length, channels)).cumsum(0) * 0.1
    return peak * np.sin(steps + np.arange(channels))


def about_sound(rate, channels=1):
    return {"sampling_rate": rate, "channels": channels, "most_seconds": 60}


RATES = st.sampled_from([8000, 11025, 16000, 22050, 24000, 32000, 44100, 44101, 48000, 96000]) | st.integers(
    2000, 99999
)


@given(
    st.sampled_from(["PCM_U8", "PCM_16", "PCM_24", "PCM_32", "FLOAT", "DOUBLE"]),
    st.sampled_from(["WAV", "WAVEX"]),
    st.integers(1, 3),
    st.integers(1, 3),
    st.integers(0, 3000),
    RATES,
    st.none() | RATES,
    st.sampled_from([0.9, 1.3, 9.5, np.nan]),
)
def test_any_wav_file_has_the_values_that_python_gives(
    browser, tmp_path_factory, subtype, to, given_channels, channels, length, rate, other, peak
):
    path, wanted_rate = tmp_path_factory.mktemp("sound") / "a.wav", other or rate
    wave = sound(length, given_channels, peak if subtype in ("FLOAT", "DOUBLE") else 0.9)
    soundfile.write(path, wave, rate, subtype, format=to)
    found = in_browser(browser, "readSound", path.read_bytes(), about_sound(wanted_rate, channels))
    wanted = by_python(path, wanted_rate, channels)
    if isinstance(wanted, str):
        assert isinstance(found, str) and wanted == f"{path}: {found.removeprefix('Error: ')}"
    else:
        assert found.shape == wanted.shape and np.abs(found - wanted).max() <= (0.5 / 32768 if other else 0)


def encoded(wave, rate, to, codec, bits=96_000, **options):
    """Return a file that FFmpeg encodes."""
    file, layout = io.BytesIO(), ("mono", "stereo")[wave.shape[1] - 1]
    with av.open(file, "w", format=to) as container:
        stream = container.add_stream(codec, rate=rate, layout=layout, options=options)
        stream.bit_rate = bits
        frame = av.AudioFrame.from_ndarray(np.ascontiguousarray(wave.T, np.float32), "fltp", layout)
        frame.sample_rate = rate
        size = stream.codec_context.frame_size
        resampler = av.AudioResampler(stream.codec_context.format, layout, rate, size)
        for part in [*resampler.resample(frame), *resampler.resample(None)]:
            container.mux(stream.encode(part))
        container.mux(stream.encode(None))
    return file.getvalue()


def written(wave, rate, to, subtype):
    """Return a file that libsndfile encodes."""
    file = io.BytesIO()
    soundfile.write(file, wave, rate, subtype, format=to)
    return file.getvalue()


# How each file is encoded, its rate, and the largest difference from Python's samples in units of 16 bits.
SOUNDS = {
    "8-bit.flac": (lambda wave: written(wave, 16000, "FLAC", "PCM_S8"), 16000, 0),
    "16-bit.flac": (lambda wave: written(wave, 44100, "FLAC", "PCM_16"), 44100, 0),
    "24-bit.flac": (lambda wave: written(wave, 96000, "FLAC", "PCM_24"), 96000, 0.01),
    "mu-law.wav": (lambda wave: written(wave, 8000, "WAV", "ULAW"), 8000, 0),
    "vorbis.ogg": (lambda wave: written(wave / 2, 44100, "OGG", "VORBIS"), 44100, 0.1),
    "opus.opus": (lambda wave: written(wave / 2, 48000, "OGG", "OPUS"), 48000, 0.1),
    # Chromium decodes Opus by libopus, PyAV by FFmpeg's own decoder.
    "opus.webm": (lambda wave: encoded(wave / 2, 48000, "webm", "libopus"), 48000, 20),
    "mpeg-1.mp3": (lambda wave: written(wave / 2, 44100, "MP3", "MPEG_LAYER_III"), 44100, 0.2),
    "mpeg-2.mp3": (lambda wave: written(wave / 2, 22050, "MP3", "MPEG_LAYER_III"), 22050, 0.2),
    "mpeg-2.5.mp3": (lambda wave: written(wave / 2, 8000, "MP3", "MPEG_LAYER_III"), 8000, 0.2),
    "tagged.mp3": (lambda wave: encoded(wave / 2, 44100, "mp3", "libmp3lame"), 44100, 0.2),
    # FFmpeg fills perceptual noise (PNS) with random values.
    "aac.m4a": (lambda wave: encoded(wave / 2, 44100, "ipod", "aac", aac_pns="0"), 44100, 0.1),
    "aac.mp4": (lambda wave: encoded(wave / 2, 16000, "mp4", "aac", aac_pns="0"), 16000, 0.1),
}


@pytest.mark.parametrize("name", SOUNDS)
@pytest.mark.parametrize("channels", [1, 2])
def test_sound_files_have_the_values_that_python_gives(browser, tmp_path, name, channels):
    make, rate, tolerance = SOUNDS[name]
    path = tmp_path / name
    # Lossy files are quiet: Chromium clips MP3 to [-1, 1] as it decodes, Python once it has mixed and resampled.
    path.write_bytes(make(sound(20_000, channels, 1.0)))
    for wanted_rate in (rate, 24000):
        found = in_browser(browser, "readSound", path.read_bytes(), about_sound(wanted_rate))
        if isinstance(found, str) and found.startswith("EncodingError"):
            pytest.skip(f"this Chromium can't decode {name}")
        wanted = by_python(path, wanted_rate, 1)
        assert found.shape == wanted.shape
        assert np.abs(found - wanted).max() * 32768 <= tolerance + (wanted_rate != rate) * 0.5


@pytest.mark.parametrize("channels", [1, 2])
def test_sounds_of_the_parity_test_have_the_values_that_python_gives(browser, tmp_path, channels):
    for name, path in write_sounds(tmp_path).items():
        found = in_browser(browser, "readSound", path.read_bytes(), about_sound(RATE, channels))
        if path.suffix == ".aiff":
            assert "varitok encode" in found, name
            continue
        wanted = by_python(path, RATE, channels)
        if path.suffix == ".ogg":  # of Vorbis in a single page, FFmpeg and so Chromium lose the last block
            assert 0 <= wanted.shape[2] - found.shape[2] < 256
            wanted = wanted[..., : found.shape[2]]
        np.testing.assert_allclose(found, wanted, rtol=0, atol=1 / 32768, err_msg=name)


def test_raw_aac_has_the_values_that_python_gives(browser, tmp_path):
    path = tmp_path / "a.aac"
    path.write_bytes(encoded(sound(20_000) / 2, 44100, "adts", "aac", aac_pns="0"))
    found, wanted = in_browser(browser, "readSound", path.read_bytes(), about_sound(44100)), by_python(path, 44100, 1)
    if isinstance(found, str) and found.startswith("EncodingError"):
        pytest.skip("this Chromium can't decode AAC")
    count = min(found.shape[2], wanted.shape[2])  # Python estimates the length from the bit rate
    assert count >= 20_000
    np.testing.assert_allclose(found[..., :count], wanted[..., :count], rtol=0, atol=0.1 / 32768)


def test_opus_of_a_lower_rate_is_close_to_what_python_gives(browser, tmp_path):
    path = tmp_path / "speech.opus"  # libsndfile decodes it at 16 kHz, browsers at 48 kHz, later and with other filters
    path.write_bytes(written(sound(20_000) / 2, 16000, "OGG", "OPUS"))
    found, wanted = in_browser(browser, "readSound", path.read_bytes(), about_sound(16000)), by_python(path, 16000, 1)
    assert found.shape == wanted.shape
    assert ((found - wanted) ** 2).mean() < 0.01 * (wanted**2).mean()


def test_a_long_sound_is_cut_where_its_resampled_seconds_end(browser, tmp_path):
    path = tmp_path / "long.wav"
    path.write_bytes(written(sound(40_000), 11025, "WAV", "PCM_16"))
    found = in_browser(browser, "readSound", path.read_bytes(), about_sound(16000) | {"most_seconds": 2})
    assert found.shape == (1, 1, 32000)
    np.testing.assert_allclose(found, by_python(path, 16000, 1)[..., :32000], rtol=0, atol=0.5 / 32768)


def test_sounds_that_a_browser_cannot_read_are_named(browser):
    about, wave = about_sound(16000), sound(2000, peak=0.5)
    for data, reason in (
        (written(wave, 16000, "AIFF", "PCM_16"), "Error: this page can't find its sample rate; use varitok encode"),
        (written(wave, 1000, "WAV", "PCM_16"), "Error: a sample rate of 1000 Hz, not 2000 to 768000"),
        (written(wave, 1000, "FLAC", "PCM_16"), "Error: a sample rate of 1000 Hz, not 2000 to 768000"),
        (written(wave, 16000, "WAV", "IMA_ADPCM"), "EncodingError: "),
        (written(wave, 16000, "FLAC", "PCM_16")[:-2000], "EncodingError: "),
        (written(wave, 16000, "WAV", "PCM_16")[:30], "RangeError: "),
        (b"RIF", "RangeError: "),
    ):
        found = in_browser(browser, "readSound", data, about)
        assert isinstance(found, str) and found.startswith(reason)


@given(st.integers(1, 3), st.integers(0, 500), st.integers(0, 99))
def test_sounds_are_written_with_the_samples_that_python_gives(browser, channels, length, seed):
    random = np.random.default_rng(seed)
    wave = random.integers(-70_000, 70_000, (channels, length)).astype(np.float32) / 65536  # half of them are ties
    text = base64.b64encode(wave.tobytes()).decode()
    written = browser.run(f"""(async () => {{
      const file = writeWave(new Float32Array(unpack("{text}").buffer), {channels}, 16000);
      return pack(new Uint8Array(await file.arrayBuffer()));
    }})()""")
    found, rate = soundfile.read(io.BytesIO(base64.b64decode(written)), dtype="int16", always_2d=True)
    assert rate == 16000
    np.testing.assert_array_equal(found, np.clip(np.rint(wave.T * 32768), -32768, 32767))
