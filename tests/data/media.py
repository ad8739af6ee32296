"""Media files of all formats that the tests of readers share: images, sounds and clips as people have them."""

import struct
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import soundfile
from PIL import Image

RATE = 16_000  # of most sounds, in Hz
UNIT = 1 << 16  # of a display matrix


def write_images(folder: Path) -> dict[str, Path]:
    """Write images of all formats, depths, orientations and kinds of transparency; return their paths by name."""
    rng = np.random.default_rng(0)
    coarse = rng.integers(0, 256, (6, 8, 4), dtype=np.uint8)
    rgba = np.asarray(Image.fromarray(coarse).resize((53, 37), Image.Resampling.BICUBIC))
    rgb, gray, deep = rgba[..., :3], rgba[..., 0], rgba[..., 0].astype(np.uint16) * 257
    image, transparent = Image.fromarray(rgb), Image.fromarray(rgba)

    def orientation(value: int) -> Image.Exif:
        exif = Image.Exif()
        exif[0x0112] = value
        return exif

    palette = image.quantize(16)
    made = {
        "rgb.png": (image, {}),
        "gray.png": (Image.fromarray(gray), {}),
        "16_bits.png": (Image.fromarray(deep), {}),
        "alpha.png": (transparent, {}),
        "gray_alpha.png": (transparent.convert("LA"), {}),
        "palette.png": (palette, {}),
        "transparent_palette.png": (palette, {"transparency": 3}),
        "transparent_color.png": (image, {"transparency": tuple(int(value) for value in rgb[0, 0])}),
        "one_bit.png": (Image.fromarray(gray).convert("1"), {}),
        "turned.png": (image, {"exif": orientation(6)}),
        "photo.jpg": (image, {"quality": 95, "subsampling": 0}),
        "subsampled.jpg": (image, {"quality": 80}),
        "progressive.jpg": (image, {"quality": 90, "progressive": True}),
        "gray.jpg": (Image.fromarray(gray), {"quality": 90}),
        "mirrored.jpg": (image, {"quality": 90, "exif": orientation(5)}),
        "lossless.webp": (image, {"lossless": True}),
        "lossy.webp": (image, {"quality": 80}),
        "alpha.webp": (transparent, {"lossless": True, "exact": True}),
        "plain.bmp": (image, {}),
        "plain.gif": (palette, {}),
        "plain.avif": (image, {"quality": 90}),
        "16_bits.tif": (Image.fromarray(deep), {}),
        "floats.tif": (Image.fromarray(gray.astype(np.float32) / 255), {}),
        "cmyk.tif": (image.convert("CMYK"), {}),
    }
    for name, (picture, options) in made.items():
        picture.save(folder / name, **options)
    return {name: folder / name for name in made}


def write_sounds(folder: Path) -> dict[str, Path]:
    """Write sounds of all formats, depths, rates and numbers of channels; return their paths by name."""
    seconds = np.arange(RATE) / RATE
    mono = (0.4 * np.sin(2 * np.pi * 440 * seconds * (1 + seconds))).astype(np.float32)[:, None]
    stereo = np.concatenate([mono, mono[::-1] / 2], 1)
    made = {
        "8_bits.wav": (mono, RATE, "PCM_U8"),
        "16_bits.wav": (mono, RATE, "PCM_16"),
        "24_bits.wav": (mono, RATE, "PCM_24"),
        "32_bits.wav": (mono, RATE, "PCM_32"),
        "floats.wav": (mono, RATE, "FLOAT"),
        "doubles.wav": (mono, RATE, "DOUBLE"),
        "stereo.wav": (stereo, RATE, "PCM_16"),
        "48_khz.wav": (stereo, 48_000, "PCM_16"),
        "11_khz.wav": (mono, 11_025, "PCM_16"),
        "plain.flac": (mono, RATE, "PCM_16"),
        "44_khz.flac": (stereo, 44_100, "PCM_24"),
        "plain.ogg": (mono, RATE, "VORBIS"),
        "plain.mp3": (mono, 44_100, "MPEG_LAYER_III"),
        "plain.aiff": (mono, RATE, "PCM_16"),
    }
    for name, (sound, rate, form) in made.items():
        soundfile.write(folder / name, sound, rate, subtype=form)
    for name, codec in (("plain.m4a", "aac"), ("plain.opus", "libopus")):
        with av.open(str(folder / name), "w", format="ogg" if name.endswith("opus") else None) as file:
            stream = file.add_stream(codec, rate=48_000, layout="mono")
            frame = av.AudioFrame.from_ndarray(mono.T, "fltp", "mono")
            frame.sample_rate, frame.pts = 48_000, 0
            file.mux(stream.encode(frame))
            file.mux(stream.encode(None))
    return {name: folder / name for name in (*made, "plain.m4a", "plain.opus")}


def write_clips(folder: Path) -> dict[str, Path]:
    """Write clips of several containers, frame times and orientations; return their paths by name."""
    corner = np.zeros((12, 32, 48, 3), np.uint8)
    corner[:, :8, :, 1], corner[:, :, :12, 0] = 250, 200
    corner[..., 2] = (20 + 15 * np.arange(12))[:, None, None]
    made: dict[str, tuple[str, str, list[int]]] = {
        "plain.mp4": ("libx264", "yuv420p", list(range(12))),
        "variable.mp4": ("libx264", "yuv420p", [0, 1, 2, 3, 10, 11, 12, 13, 14, 24, 25, 26]),
        "plain.mkv": ("ffv1", "bgr0", list(range(12))),
        "variable.mkv": ("ffv1", "bgr0", [0, 2, 4, 6, 8, 10, 11, 12, 13, 14, 15, 16]),
        "plain.webm": ("libvpx-vp9", "yuv420p", list(range(12))),
        "plain.avi": ("mpeg4", "yuv420p", list(range(12))),
        "plain.gif": ("gif", "rgb8", list(range(12))),
        "plain.mov": ("libx264", "yuv420p", list(range(12))),
        "plain.m4v": ("libx264", "yuv420p", list(range(12))),
    }
    for name, (codec, pixels, times) in made.items():
        kind = "mp4" if name.endswith("m4v") else None
        with av.open(str(folder / name), "w", format=kind) as file:
            stream = file.add_stream(codec, rate=10)
            stream.width, stream.height, stream.pix_fmt = 48, 32, pixels
            for picture, time in zip(corner, times, strict=True):
                frame = av.VideoFrame.from_ndarray(picture, format="rgb24")
                frame.pts, frame.time_base = time, Fraction(1, 10)
                file.mux(stream.encode(frame))
            file.mux(stream.encode(None))
    for name, matrix in (("turned.mp4", (0, 1, -1, 0)), ("mirrored.mp4", (-1, 0, 0, 1))):
        write_matrix(folder / "plain.mp4", folder / name, matrix)
    return {name: folder / name for name in (*made, "turned.mp4", "mirrored.mp4")}


def write_matrix(plain: Path, path: Path, matrix: tuple[int, int, int, int]) -> None:
    """Copy an MP4 file, and write (a, b, c, d) of a display matrix to its track's header (tkhd), as phones do."""
    content = bytearray(plain.read_bytes())
    at = content.index(b"tkhd") + 4 + 40  # version 0
    assert struct.unpack(">9i", content[at : at + 36]) == (UNIT, 0, 0, 0, UNIT, 0, 0, 0, 1 << 30)
    a, b, c, d = (UNIT * value for value in matrix)
    content[at : at + 20] = struct.pack(">5i", a, b, 0, c, d)
    path.write_bytes(content)
