"""Decode image files to uint8 RGB."""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import ExifTags, Image, ImageOps

from ..storage.members import Source, open_file
from .errors import BadSample, convert_errors
from .framing import center_box

__all__ = ["center_square", "decode_image", "decoded_size", "open_image", "upright_rgb"]

Pixels = npt.NDArray[np.uint8]
TURNED = (5, 6, 7, 8)  # EXIF orientations that swap rows and columns; values beyond EXIF's are ignored
MOST_PIXELS = 1 << 27  # 134 megapixels; larger files are rejected before decoding


def decode_image(path: str | Source, shorter_side: int | None = None, least_side: int = 1) -> Pixels:
    """Decode an image file to RGB, upright; see `upright_rgb`. The first frame of an animation is decoded.

    Args:
        path: The file.
        shorter_side: The shorter side that the caller will resize to, in pixels. A JPEG is then decoded at 1/2, 1/4
            or 1/8 of its size if that is still at least twice as large: enough for resizing, and much faster.
        least_side: Minimum length of the shorter side, in pixels.

    Returns:
        uint8 `(h, w, 3)`.

    Raises:
        BadSample: The file can't be read as an image, is too large, or too small.
    """
    with open_image(path, least_side, shorter_side) as image:
        return np.array(upright_rgb(image))


def decoded_size(path: str | Source, shorter_side: int | None = None, least_side: int = 1) -> tuple[int, int]:
    """Return height and width of `decode_image`'s result, from the header."""
    with open_image(path, least_side, shorter_side) as image:
        turned = image.getexif().get(ExifTags.Base.Orientation) in TURNED
        return (image.width, image.height) if turned else (image.height, image.width)


@contextmanager
def open_image(path: str | Source, least_side: int = 1, shorter_side: int | None = None) -> Iterator[Image.Image]:
    """Open an image file, reading only its header; any error within the `with` block becomes a `BadSample`.

    The arguments and errors are those of `decode_image`.
    """
    with convert_errors(path), warnings.catch_warnings():
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # MOST_PIXELS is the limit
        with Image.open(open_file(path)) as image:
            if image.width * image.height > MOST_PIXELS:
                raise BadSample(str(path), f"{image.width} x {image.height} pixels are too many")
            if min(image.size) < least_side:
                raise BadSample(str(path), f"{image.width} x {image.height} pixels are too few")
            if shorter_side and image.format == "JPEG":
                scale = 2 * shorter_side / min(image.size)
                image.draft("RGB", (round(image.width * scale), round(image.height * scale)))
            yield image


def upright_rgb(image: Image.Image) -> Image.Image:
    """Convert a Pillow image of any mode to RGB, and apply its EXIF orientation.

    Gray, palette and CMYK are supported. Alpha is composited over white. Of 16-bit values, the upper 8 bits are kept.
    Floats are taken as [0, 1] if none is above 1, otherwise as [0, 255]. Color profiles are ignored.

    Raises:
        ValueError: Values are not finite, or out of range.
    """
    if image.getexif().get(ExifTags.Base.Orientation, 1) != 1:
        image = ImageOps.exif_transpose(image)  # a copy
    if image.mode.startswith("I;16") or image.mode in ("I", "F"):
        return Image.fromarray(_to_8_bits(np.asarray(image))).convert("RGB")  # Pillow would clip to 255
    if "A" in image.getbands() or "transparency" in image.info:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, "white")
        return Image.alpha_composite(white, image).convert("RGB")
    return image if image.mode == "RGB" else image.convert("RGB")  # `convert` would copy an RGB image


def _to_8_bits(values: npt.NDArray[Any]) -> Pixels:
    """Convert 16-bit integers, which Pillow may store in 32 bits, or floats to 8 bits."""
    low, high = float(values.min()), float(values.max())
    floats = values.dtype.kind == "f"
    if not 0 <= low <= high <= (255 if floats else 0xFFFF):  # also False for NaN
        known = "[0, 1] or [0, 255]" if floats else "16 bits"
        raise ValueError(f"values {low:.6g} to {high:.6g} are not in {known}")
    if floats:
        return np.round(values * (255 if high <= 1 else 1)).astype(np.uint8)
    return (values.astype(np.int64) >> 8).astype(np.uint8)


def center_square(pixels: Pixels, side: int) -> Pixels:
    """Crop the centered square of pixels `(h, w, c)`, c 1 or 3, and resize it bicubically: `(side, side, c)`.

    This is how images are prepared for evaluation and for an exported encoder. Training's random crops are resized by
    torchvision, several times faster; its results differ by at most 1.
    """
    *sides, c = pixels.shape
    (top, height), (left, width) = center_box(sides, [min(sides)] * 2)
    square = pixels[top : top + height, left : left + width]
    resized = Image.fromarray(square if c > 1 else square[..., 0]).resize((side, side), Image.Resampling.BICUBIC)
    return np.array(resized).reshape(side, side, c)
