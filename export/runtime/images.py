"""Run an exported image codec, with NumPy and ONNX Runtime."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt

from varitok import UserError
from varitok.data.decoding.suffixes import IMAGES
from varitok.data.storage.members import File

from .bundle import Array, Bundle, tensors, to_pixels
from .files import SignalFile, open_input

__all__ = ["ImageBundle"]


class ImageBundle(Bundle):
    """An exported image tokenizer.

    Attributes:
        image_size: Height and width of the images in pixels, S.

    Example:
        >>> bundle = varitok.load("image_tokenizer")
        >>> image = np.zeros((16, 16, 3), np.uint8)  # or a Pillow image
        >>> codes = bundle.encode(image, tokens=4)
        >>> codes.shape, bundle.pixels(bundle.decode(codes)).shape  # (b, codebooks, tokens), (b, h, w, c)
        ((1, 1, 4), (1, 16, 16, 3))
    """

    modality = "image"
    counted = "images"
    suffixes = IMAGES
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
        """Encode images.

        Args:
            image: A Pillow image, uint8 pixels `(h, w, c)` or `(b, h, w, c)`, or float values `(b, c, S, S)` in
                [-1, 1]. Pillow images of any mode are turned upright. They
                and uint8 pixels of another size are center-cropped to a square and resized.
            tokens: Number of tokens to keep, 1 to N; all if None.

        Returns:
            int64 `(b, codebooks, tokens)`; float32 `(b, channels, tokens)` if codes are continuous.

        Raises:
            UserError: The shape, type or a value is not supported.

        Example:
            >>> bundle.encode(np.zeros((2, 16, 16, 3), np.uint8), tokens=3).shape
            (2, 1, 3)
        """
        kept = self.tokens if tokens is None else tokens
        self._check_tokens(kept)
        return self.run_encoder(self.values(image))[..., :kept]

    def steps_of(self, lengths: npt.NDArray[np.int64], steps: int) -> npt.NDArray[np.int64]:
        """Return `steps` for each image: an image has all of its tokens."""
        return np.full_like(lengths, steps)

    def units_of(self, steps: int, length: int) -> npt.NDArray[np.int64]:
        """Return ones: each token belongs to the one image."""
        return np.ones(steps, np.int64)

    @contextmanager
    def open_file(self, path: File) -> Iterator[SignalFile]:
        """Open an image file of any size."""
        from varitok.data.decoding.images import open_image  # noqa: PLC0415 (arrays don't need it)

        with open_input(path) as source, open_image(source) as image:
            yield SignalFile(1, lambda count: iter([self.values(image)]))

    def signal_size(self, codes: Array, units: int | None, facts: tuple[int, ...]) -> tuple[int, ...]:
        """Return the height and width of the images."""
        return self.image_size, self.image_size

    def write_file(
        self, chunks: Iterable[npt.NDArray[np.float32]], facts: tuple[int, ...], to: str, file: BinaryIO
    ) -> dict[str, Any]:
        """Write one image; PNG and WebP are lossless."""
        from PIL import Image  # noqa: PLC0415 (only image files need it)

        first, *others = chunks
        if others:
            raise UserError(f"holds {1 + len(others)} images; decode them one by one")
        pixels = self.pixels(first)[0]
        image = Image.fromarray(pixels if pixels.shape[2] > 1 else pixels[..., 0])
        image.save(file, "JPEG" if to == "jpg" else to, quality=95, subsampling=0, lossless=True)
        return {}

    def describe_signals(self) -> str:
        """Return the size and channels."""
        return f"images of {self.image_size} x {self.image_size} pixels, {self.channels} channels"

    def describe_rates(self) -> dict[str, Any]:
        """Return the number of tokens and their payload in bytes."""
        return {"tokens": f"1 to {self.tokens} for an image"} | self._describe_lengths("an image")

    def pixels(self, signal: npt.ArrayLike) -> npt.NDArray[np.uint8]:
        """Convert images `(b, c, h, w)` in [-1, 1] to uint8 `(b, h, w, c)`, rounded to the nearest integer.

        Example:
            >>> bundle.pixels(np.ones((1, 3, 2, 2)))[0, 0, 0].tolist()
            [255, 255, 255]
        """
        return to_pixels(signal)

    def values(self, image: Any) -> npt.NDArray[np.float32]:
        """Convert any accepted image to float32 `(b, c, S, S)` in [-1, 1]."""
        if hasattr(image, "convert"):  # a Pillow image; no import of Pillow is needed
            image = _pixels(image, self.channels)
        values = np.asarray(image)
        side, c = self.image_size, self.channels
        if values.dtype == np.uint8:
            values = values[None] if values.ndim == 3 else values
            if values.ndim != 4 or values.shape[3] != c or not values.size:
                raise UserError(f"image: pixels (height, width, {c}) or (batch, ...) are expected, got {values.shape}")
            if values.shape[1:3] != (side, side):
                values = _squares(values, side)
            # (b, h, w, c) -> (b, c, h, w)
            return np.moveaxis(values, -1, 1).astype(np.float32) / np.float32(127.5) - 1
        if values.dtype.kind != "f":
            raise UserError(f"image: uint8 pixels or floats in [-1, 1] are expected, got {values.dtype}")
        if values.ndim != 4 or values.shape[1:] != (c, side, side) or not values.size:
            raise UserError(f"image: float values (batch, {c}, {side}, {side}) are expected, got {values.shape}")
        if not np.abs(values).max() <= 1 + 1e-3:  # also False for NaN
            raise UserError("image: float values must be numbers in [-1, 1]; some aren't")
        return values.astype(np.float32)


def _pixels(image: Any, channels: int) -> Array:
    """Convert a Pillow image to pixels `(h, w, c)`."""
    from varitok.data.decoding.images import upright_rgb  # noqa: PLC0415 (arrays don't need it)

    try:
        rgb = upright_rgb(image)
    except ValueError as error:
        raise UserError(f"image: {error}") from error
    return np.asarray(rgb if channels == 3 else rgb.convert("L")).reshape(*rgb.size[::-1], -1)


def _squares(images: Array, side: int) -> Array:
    """Prepare pixels `(b, h, w, c)` of another size as in evaluation: `(b, side, side, c)`."""
    from varitok.data.decoding.images import center_square  # noqa: PLC0415 (images of the right size don't need it)

    return np.stack([center_square(pixels, side) for pixels in images])
