"""Run an exported image codec, with NumPy and ONNX Runtime."""

import math
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt

from varitok import UserError
from varitok.data.decoding.suffixes import IMAGES
from varitok.data.storage.members import File

from .bundle import Array, product_of, tensors
from .files import SignalFile, open_input
from .memory import Side, plan
from .pixels import PixelBundle
from .tiling import Tile

__all__ = ["ImageBundle"]


class ImageBundle(PixelBundle):
    """An exported image tokenizer, of images of one size if its tokens are ordered, else of any size.

    Attributes:
        image_size: Height and width of the images in pixels, S; None for any.

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
    given = "image"
    sides = "height, width"
    steps = "pixels"

    def _read(self) -> None:
        super()._read()
        self.image_size: int | None = None
        if self.tokens:
            self.image_size = int(self.config["image_size"])
            self.frame_size = self.image_size, self.image_size
            self.hops = (int(self.config.get("patch", 1)),) * 2
        else:
            self.axes = 2
            self.hops = tuple(int(step) for step in self.config["hop"])

    def __repr__(self) -> str:
        sizes = product_of(self.codebook_sizes)
        about = f"a token of {sizes} codes for {' x '.join(map(str, self.hops))} pixels"
        if self.tokens:
            about = f"{self.image_size} x {self.image_size} images, up to {self.tokens} tokens of {sizes} codes"
        return f"ImageBundle({str(self.folder)!r}: {about})"

    def grid(self, height: int, width: int) -> tuple[int, int]:
        """Return the rows and columns of an image's patches, ceil(size / patch) each.

        Example:
            >>> bundle.grid(height=16, width=20)
            (2, 3)
        """
        rows, columns = self._grid((height, width))
        return rows, columns

    @tensors
    def encode(
        self, image: Any, *, tokens: int | None = None, num_codebooks: int | None = None, tile: Tile | None = None
    ) -> Array:
        """Encode images; of images on a grid, the last row and column are repeated up to whole patches.

        Args:
            image: A Pillow image, uint8 pixels `(h, w, c)` or `(b, h, w, c)`, or float values `(b, c, h, w)` in
                [-1, 1]. Pillow images of any mode are turned upright. If tokens are ordered, they and uint8 pixels
                of another size are center-cropped to a square and resized to S x S.
            tokens: Number of ordered tokens to keep, 1 to N; all if None.
            num_codebooks: Number of codebooks to keep; all if None.
            tile: Maximum height and width of a tile in pixels, for tokens on a grid: larger images are encoded in
                overlapping tiles (`tiling.py`). None: the size of training if the network attends (`memory.py`), else
                whole images.

        Returns:
            int64 `(b, num_codebooks, tokens)`, or `(b, num_codebooks, *grid)`; float32 if codes are continuous.

        Raises:
            UserError: The shape, type or a value is not supported.

        Example:
            >>> bundle.encode(np.zeros((2, 16, 16, 3), np.uint8), tokens=3).shape
            (2, 1, 3)
        """
        self.check_kept(tokens, num_codebooks)
        return self.encode_values(self.values(image), tokens=tokens, num_codebooks=num_codebooks, tile=tile)

    @tensors
    def decode(self, codes: Any, size: tuple[int, int] | None = None, *, tile: Tile | None = None) -> Array:
        """Decode the output of `encode` into images, float32 `(b, c, h, w)` in [-1, 1].

        Args:
            codes: Codes of any integer type, `(b, q, k)` with k at most N, or `(b, q, *grid)`; in all or the first
                codebooks. Continuous codes are floats and need all channels.
            size: Height and width of the images; None: those of training, or of whole patches.
            tile: Maximum height and width of a tile in pixels, as in `encode`; overlapping tiles are blended.

        Raises:
            UserError: The shape, type or a code is not the codec's, or the codes are not of this size.

        Example:
            >>> bundle.decode(np.zeros((1, 1, 4), np.int64)).shape
            (1, 3, 16, 16)
        """
        return self._decode(codes, size, tile)

    def _usual_tile(self, side: Side) -> Tile | None:
        """Return the size of training for a network that attends; see `memory.py`."""
        return None if self.tokens else plan(self, side, (), math.inf).tile

    def steps_of(self, lengths: npt.NDArray[np.int64], steps: int) -> npt.NDArray[np.int64]:
        """Return `steps` for each image, all of its ordered tokens, or the rows of its grid."""
        return np.full_like(lengths, steps) if self.tokens else super().steps_of(lengths, steps)

    def units_of(self, steps: int, length: int) -> npt.NDArray[np.int64]:
        """Return ones: each token, or row of them, belongs to the one image."""
        return np.ones(steps, np.int64)

    @property
    def splits(self) -> bool:
        """Return false: an image is read whole, and coded in tiles if it is large."""
        return False

    def facts(self, size: tuple[int, ...], rate: float | None) -> tuple[int, ...]:
        """Return the height and width of an image on a grid."""
        return () if self.tokens else size

    @contextmanager
    def open_file(self, path: File) -> Iterator[SignalFile]:
        """Open an image file of any size."""
        from varitok.data.decoding.images import open_image  # noqa: PLC0415 (arrays don't need it)

        with open_input(path) as source, open_image(source) as image:
            values = self.values(image)
        yield SignalFile(1, lambda count: iter([values]))  # outside: an error of the caller isn't the file's

    def signal_size(self, codes: Array, units: int | None, facts: tuple[int, ...]) -> tuple[int, ...]:
        """Return the height and width of the images; of a truncated one on a grid, of the rows that arrived."""
        if self.frame_size:
            return self.frame_size
        if len(facts) != 2:
            raise UserError("the container lacks its image's height and width; encode the image again")
        height, width = facts
        if units is None:
            height = min(height, codes.shape[2] * self.hops[0])
        self._check_grid(codes, (height, width))
        return height, width

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
        side = self.config.get("image_size")
        size = "any size" if self.image_size is None else f"{side} x {side} pixels"
        trained = f", trained at {side} x {side} pixels" if side and self.image_size is None else ""
        return f"images of {size}, {self.channels} channels{trained}"

    def describe_rates(self) -> dict[str, Any]:
        """Return the number of ordered tokens and their payload in bytes, or the bits per pixel of a grid."""
        if not self.tokens:
            return self._describe_grid()
        return {"tokens": f"1 to {self.tokens} for an image"} | self._describe_lengths("an image")

    def values(self, image: Any) -> npt.NDArray[np.float32]:
        """Convert any accepted image to float32 `(b, c, h, w)` in [-1, 1]."""
        if hasattr(image, "convert"):  # a Pillow image; no import of Pillow is needed
            image = _pixels(image, self.channels)
        return super().values(image)

    def _fit(self, pixels: Array) -> Array:
        """Prepare pixels of another size than the codec's as in evaluation."""
        if self.image_size is None or pixels.shape[1:3] == self.frame_size:
            return pixels
        return _squares(pixels, self.image_size)


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
