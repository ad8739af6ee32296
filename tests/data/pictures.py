"""Image files, good and bad, that the tests share."""

import io
import struct
import zlib
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image


def picture(width: int = 24, height: int = 20, seed: int = 0) -> Image.Image:
    """Make a smooth RGB image, its corners of different colors."""
    corners = np.random.default_rng(seed).integers(0, 256, (2, 2, 3), dtype=np.uint8)
    return Image.fromarray(corners).resize((width, height), Image.Resampling.BILINEAR)


def encoded(image: Image.Image, kind: str, **options: Any) -> bytes:
    """Write an image to memory."""
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def png_that_claims(width: int, height: int) -> bytes:
    """Make a PNG of a few bytes whose header promises a size."""
    body = b"IHDR" + struct.pack(">II5B", width, height, 8, 2, 0, 0, 0)
    header = struct.pack(">I", 13) + body + struct.pack(">I", zlib.crc32(body))
    small = encoded(picture(), "PNG")
    return small[:8] + header + small[33:]


BROKEN: dict[str, bytes] = {
    "truncated.jpg": encoded(picture(64, 64), "JPEG")[:-300],
    "truncated.png": encoded(picture(64, 64), "PNG")[:-300],
    "text.png": b"<html>404: no such picture</html>",
    "empty.jpg": b"",
    "one_pixel.png": encoded(picture(1, 1), "PNG"),
    "thin.png": encoded(picture(90, 3), "PNG"),
    "bomb.png": png_that_claims(30_000, 30_000),
    "large.png": png_that_claims(9_000, 9_000),
}
"""Files that can't be used as they are, by name."""


def fill(folder: Path, good: int, broken: dict[str, bytes] | None = None) -> Path:
    """Write a folder of good PNGs and of broken files."""
    folder.mkdir(parents=True, exist_ok=True)
    for number in range(good):
        picture(24, 20 + number % 5, seed=number).save(folder / f"good_{number:03}.png")
    for name, content in (broken or {}).items():
        (folder / name).write_bytes(content)
    return folder
