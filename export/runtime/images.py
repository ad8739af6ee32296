"""Run an exported image codec; numpy and ONNX Runtime alone."""

from typing import Any

import numpy as np
import numpy.typing as npt

from varitok import UserError

from .bundle import Array, Bundle, tensors, to_pixels

__all__ = ["ImageBundle"]


class ImageBundle(Bundle):
    """A tokenizer of images.

    Attributes:
        image_size: Side of its images in pixels, S.
    """

    def _read(self) -> None:
        super()._read()
        self.image_size = int(self.config["image_size"])

    def __repr__(self) -> str:
        side, books = self.image_size, " x ".join(str(size) for size in self.book_sizes)
        return f"ImageBundle({str(self.folder)!r}: {side} x {side} images, up to {self.tokens} tokens of {books} codes)"

    @tensors
    def encode(self, image: Any, *, tokens: int | None = None) -> Array:
        """Turn images into codes.

        Args:
            image: A Pillow image, uint8 pixels `(h, w, c)` or `(b, h, w, c)`, or float values `(b, c, S, S)` in
                [-1, 1]. Pillow images and pixels of another size are cropped to their centred square and resized.
            tokens: Keep only so many tokens, 1 to N; all where None.

        Returns:
            int64 `(b, books, tokens)`; float32 `(b, channels, tokens)` where codes are continuous.

        Raises:
            UserError: A shape, type or value that the codec doesn't take.
        """
        kept = self.tokens if tokens is None else tokens
        self._check_tokens(kept)
        return self.run_encoder(self.values(image))[..., :kept]

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
            raise UserError("image: float values must lie in [-1, 1]; some don't, or aren't numbers")
        return values.astype(np.float32)


def _square(pixels: Array, side: int) -> Array:
    """Crop pixels `(h, w, c)` to their centred square and resize it: the protocol of training and evaluation."""
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
