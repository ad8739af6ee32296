"""Run an exported image codec; numpy and ONNX Runtime alone."""

import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from varitok import UserError

from .bundle import Array, Bundle, tensors, to_pixels
from .files import PICTURES, Part, read_picture

__all__ = ["ImageBundle"]


class ImageBundle(Bundle):
    """A tokenizer of images.

    Attributes:
        image_size: Side of its images in pixels, S.
    """

    modality = "image"
    counted = "images"
    suffixes = PICTURES
    written = ("png", "jpg", "webp")

    def _read(self) -> None:
        super()._read()
        self.image_size = int(self.config["image_size"])
        self.hops = (int(self.config.get("patch", 1)),) * 2

    def __repr__(self) -> str:
        side, sizes = self.image_size, " x ".join(str(size) for size in self.codebook_sizes)
        about = f"{side} x {side} images, up to {self.tokens} tokens of {sizes} codes"
        return f"ImageBundle({str(self.folder)!r}: {about})"

    @tensors
    def encode(self, image: Any, *, tokens: int | None = None) -> Array:
        """Turn images into codes.

        Args:
            image: A Pillow image, uint8 pixels `(h, w, c)` or `(b, h, w, c)`, or float values `(b, c, S, S)` in
                [-1, 1]. Pillow images and pixels of another size are cropped to their centered square and resized.
            tokens: Number of tokens to keep, 1 to N; all if None.

        Returns:
            int64 `(b, codebooks, tokens)`; float32 `(b, channels, tokens)` where codes are continuous.

        Raises:
            UserError: A shape, type or value that the codec doesn't take.
        """
        kept = self.tokens if tokens is None else tokens
        self._check_tokens(kept)
        return self.run_encoder(self.values(image))[..., :kept]

    def steps_of(self, lengths: npt.NDArray[np.int64], steps: int) -> npt.NDArray[np.int64]:
        """Return all steps: an image is coded as a whole."""
        return np.full_like(lengths, steps)

    def units_of(self, steps: int, length: int) -> npt.NDArray[np.int64]:
        """Return ones: each step is of the one image."""
        return np.ones(steps, np.int64)

    def read_file(self, path: Path) -> tuple[npt.NDArray[np.float32], float | None]:
        """Read a picture of any size."""
        return self.values(read_picture(path)), None

    def write_file(self, parts: Sequence[Part], to: str, path: Path) -> tuple[bytes, dict[str, Any]]:
        """Decode one picture into a file; PNG and WebP lose nothing."""
        from PIL import Image  # noqa: PLC0415 (codes need no picture)

        if len(parts) > 1:
            raise UserError(f"{path}: holds {len(parts)} pictures; decode them one by one")
        pixels, file = self.pixels(self.decode(parts[0].codes))[0], io.BytesIO()
        image = Image.fromarray(pixels if pixels.shape[2] > 1 else pixels[..., 0])
        image.save(file, "JPEG" if to == "jpg" else to, quality=95, subsampling=0, lossless=True)
        return file.getvalue(), {"tokens": parts[0].codes.shape[2]}

    def describe_signals(self) -> str:
        """Return the size and channels."""
        return f"images of {self.image_size} x {self.image_size} pixels, {self.channels} channels"

    def describe_rates(self) -> dict[str, Any]:
        """Return the sizes of an image."""
        return {"tokens": f"1 to {self.tokens} for an image"} | self._describe_lengths("an image")

    def pixels(self, signal: npt.ArrayLike) -> npt.NDArray[np.uint8]:
        """Turn images `(b, c, h, w)` in [-1, 1] into uint8 `(b, h, w, c)`, rounded to the nearest."""
        return to_pixels(signal)

    def values(self, image: Any) -> npt.NDArray[np.float32]:
        """Bring whatever an image is given as to float32 `(b, c, S, S)` in [-1, 1]."""
        if hasattr(image, "convert"):  # a Pillow image; Pillow itself need not be there
            image = np.asarray(image.convert("RGB" if self.channels == 3 else "L")).reshape(*image.size[::-1], -1)
        values = np.asarray(image)
        side, c = self.image_size, self.channels
        if values.dtype == np.uint8:
            values = values[None] if values.ndim == 3 else values
            if values.ndim != 4 or values.shape[3] != c or not values.size:
                raise UserError(f"image: pixels (height, width, {c}) or (batch, ...) are expected, got {values.shape}")
            if values.shape[1:3] != (side, side):
                values = np.stack([_square(pixels, side) for pixels in values])
            return np.moveaxis(values, -1, 1).astype(np.float32) / np.float32(127.5) - 1
        if values.dtype.kind != "f":
            raise UserError(f"image: uint8 pixels or floats in [-1, 1] are expected, got {values.dtype}")
        if values.ndim != 4 or values.shape[1:] != (c, side, side) or not values.size:
            raise UserError(f"image: float values (batch, {c}, {side}, {side}) are expected, got {values.shape}")
        if not np.abs(values).max() <= 1 + 1e-3:  # NaN too fails this
            raise UserError("image: float values must be numbers in [-1, 1]; some aren't")
        return values.astype(np.float32)


def _square(pixels: Array, side: int) -> Array:
    """Crop pixels `(h, w, c)` to their centered square and resize it: the protocol of training and evaluation."""
    try:
        from PIL import Image  # noqa: PLC0415 (images of the right size don't need it)
    except ImportError as error:
        raise UserError(f"image: give {side} x {side} pixels, or pip install Pillow to have it resized") from error
    height, width, c = pixels.shape
    short = min(height, width)
    top, left = (height - short) // 2, (width - short) // 2
    square = pixels[top : top + short, left : left + short]
    resized = Image.fromarray(square if c > 1 else square[..., 0]).resize((side, side), Image.Resampling.BICUBIC)
    return np.asarray(resized).reshape(side, side, c)
