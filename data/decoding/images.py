"""Decode image files to uint8 RGB."""

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
MOST_PIXELS = 1 << 26  # 67 megapixels; larger files are rejected before decoding


def decode_image(path: str | File, shorter_side: int | None = None, least_side: int = 1) -> Tensor:
    """Decode an image file to RGB.

    Gray, palette, CMYK, 16-bit and alpha (composited over white) are supported. The EXIF rotation is applied.

    Args:
        path: The file.
        shorter_side: The shorter side that the caller will resize to, in pixels. A JPEG is then decoded at 1/2, 1/4
            or 1/8 of its size if that is still at least twice as large: enough for resizing, and much faster.
        least_side: Minimum length of the shorter side, in pixels.

    Returns:
        uint8 `(3, h, w)`.

    Raises:
        BadSample: The file can't be read as an image, is too large, or too small.
    """
    with open_image(path, least_side, shorter_side) as image:
        ImageOps.exif_transpose(image, in_place=True)
        pixels = np.array(_rgb(image))
    # (h, w, 3) -> (3, h, w), as a view: channels-last memory is cropped and resized faster.
    return torch.from_numpy(pixels).permute(2, 0, 1)


def decoded_size(path: str | File, shorter_side: int | None = None, least_side: int = 1) -> tuple[int, int]:
    """Return height and width of `decode_image`'s result, from the header."""
    with open_image(path, least_side, shorter_side) as image:
        turned = image.getexif().get(ExifTags.Base.Orientation) in TURNED
        return (image.width, image.height) if turned else (image.height, image.width)


@contextmanager
def open_image(path: str | File, least_side: int = 1, shorter_side: int | None = None) -> Iterator[Image.Image]:
    """Open an image file, reading only its header; any error within the `with` block becomes a `BadSample`.

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
    """Convert an image of any mode to RGB."""
    if image.mode.startswith("I;16") or image.mode == "I":
        # Pillow would clip 16-bit values to 255, so scale them.
        return Image.fromarray((np.asarray(image).astype(np.int64) >> 8).clip(0, 255).astype(np.uint8)).convert("RGB")
    if "A" in image.getbands() or "transparency" in image.info:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, "white")
        return Image.alpha_composite(white, image).convert("RGB")
    return image if image.mode == "RGB" else image.convert("RGB")  # `convert` would copy an RGB image
