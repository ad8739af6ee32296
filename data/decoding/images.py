"""Image files of any kind to uint8 RGB."""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch
from PIL import ExifTags, Image, ImageOps
from torch import Tensor

from ..batch import BadSample, convert_errors
from ..storage.members import File, open_file

__all__ = ["SUFFIXES", "decode_image", "decoded_size", "open_image"]

SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".avif", ".bmp", ".gif", ".tif", ".tiff")
TURNED = (5, 6, 7, 8)  # EXIF orientations that swap rows and columns; values beyond EXIF's are ignored
MOST_PIXELS = 1 << 26  # 67 megapixels; larger files are refused before they are decoded


def decode_image(path: str | File, shorter_side: int | None = None, least_side: int = 1) -> Tensor:
    """Read an image file of any mode as RGB.

    Grey, palette, CMYK, 16-bit and alpha (laid over white) are understood, and the EXIF rotation is applied.

    Args:
        path: The file.
        shorter_side: The shorter side that the caller will resize to, in pixels. A JPEG is then decoded at a
            half, a quarter or an eighth of its size where that is still twice as large: enough for a good resize, at a
            fraction of the time.
        least_side: Shortest side that is accepted, in pixels.

    Returns:
        uint8 `(3, h, w)`.

    Raises:
        BadSample: The file can't be read as an image, is too large, or too small.
    """
    with open_image(path, least_side, shorter_side) as image:
        ImageOps.exif_transpose(image, in_place=True)
        pixels = np.array(_rgb(image))
    return torch.from_numpy(pixels).permute(2, 0, 1)  # colors stay the last in memory: cropped and resized faster so


def decoded_size(path: str | File, shorter_side: int | None = None, least_side: int = 1) -> tuple[int, int]:
    """Return the rows and columns of `decode_image`'s result, from the header."""
    with open_image(path, least_side, shorter_side) as image:
        turned = image.getexif().get(ExifTags.Base.Orientation) in TURNED
        return (image.width, image.height) if turned else (image.height, image.width)


@contextmanager
def open_image(path: str | File, least_side: int = 1, shorter_side: int | None = None) -> Iterator[Image.Image]:
    """Open an image file, reading only its header at first; any failure in the block becomes a `BadSample`.

    The arguments and errors are those of `decode_image`.
    """
    with convert_errors(path), warnings.catch_warnings():
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        with Image.open(open_file(path)) as image:
            if image.width * image.height > MOST_PIXELS:
                raise BadSample(str(path), f"{image.width} x {image.height} pixels are too many")
            if min(image.size) < least_side:
                raise BadSample(str(path), f"{image.width} x {image.height} pixels are too few")
            if shorter_side and image.format == "JPEG":
                scale = 2 * shorter_side / min(image.size)
                image.draft("RGB", (round(image.width * scale), round(image.height * scale)))
            yield image


def _rgb(image: Image.Image) -> Image.Image:
    """Turn any mode into RGB."""
    if image.mode.startswith("I;16") or image.mode == "I":
        # Pillow would clip 16-bit values to 255, so scale them.
        return Image.fromarray((np.asarray(image).astype(np.int64) >> 8).clip(0, 255).astype(np.uint8)).convert("RGB")
    if "A" in image.getbands() or "transparency" in image.info:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, "white")
        return Image.alpha_composite(white, image).convert("RGB")
    return image if image.mode == "RGB" else image.convert("RGB")  # which would copy it
