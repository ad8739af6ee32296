"""Images: from files of any kind to uint8 squares."""

import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from PIL import ExifTags, Image, ImageOps
from torch import Tensor
from torch.utils.data import Dataset
from torchvision.transforms.v2 import InterpolationMode, functional

from varitok import UserError, at_least

from .batch import BadSample, Key, Splits, sample_generator
from .crops import centre_box, random_box
from .folders import fetched, list_files
from .members import File, opened

__all__ = [
    "PROTOCOL",
    "SUFFIXES",
    "ImageDataset",
    "ImageFolder",
    "Square",
    "cifar10",
    "decode_image",
    "decoded_size",
    "image_folder",
    "imagenette",
    "open_image",
]

PROTOCOL = (
    "EXIF rotation applied, alpha over white, RGB; largest centred square cropped;"
    " resized by antialiased bicubic interpolation on 8-bit values; nothing else"
)
SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".avif", ".bmp", ".gif", ".tif", ".tiff")
TURNED = (5, 6, 7, 8)  # EXIF's orientations of which rows are columns; others mean nothing
MOST_PIXELS = 1 << 26  # 67 megapixels; what is larger is refused before it is decoded


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
    with _drafted(path, shorter_side, least_side) as image:
        ImageOps.exif_transpose(image, in_place=True)
        pixels = np.array(_rgb(image))
    return torch.from_numpy(pixels).permute(2, 0, 1)  # colours stay the last in memory: cropped and resized faster so


def decoded_size(path: str | File, shorter_side: int | None = None, least_side: int = 1) -> tuple[int, int]:
    """Tell the rows and columns that `decode_image` would give, from the header."""
    with _drafted(path, shorter_side, least_side) as image:
        turned = image.getexif().get(ExifTags.Base.Orientation) in TURNED
        return (image.width, image.height) if turned else (image.height, image.width)


@contextmanager
def _drafted(path: str | File, shorter_side: int | None, least_side: int) -> Iterator[Image.Image]:
    """Open an image that will be decoded at the size which `decode_image` chooses."""
    with open_image(path, least_side) as image:
        if shorter_side and image.format == "JPEG":
            scale = 2 * shorter_side / min(image.size)
            image.draft("RGB", (round(image.width * scale), round(image.height * scale)))
        yield image


@contextmanager
def open_image(path: str | File, least_side: int = 1) -> Iterator[Image.Image]:
    """Open an image file, of which only the header is read at first; what goes wrong in the block is a `BadSample`.

    Args:
        path: The file.
        least_side: Shortest side that is accepted, in pixels.

    Raises:
        BadSample: The file can't be read as an image, is too large, or too small.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(opened(path)) as image:
                if image.width * image.height > MOST_PIXELS:
                    raise BadSample(str(path), f"{image.width} x {image.height} pixels are too many")
                if min(image.size) < least_side:
                    raise BadSample(str(path), f"{image.width} x {image.height} pixels are too few")
                yield image
    except BadSample:
        raise
    except Exception as error:  # Pillow raises OSError, SyntaxError, ValueError and more on broken files
        reason = str(error).replace(str(path), "file") or type(error).__name__
        raise BadSample(str(path), reason) from None


def _rgb(image: Image.Image) -> Image.Image:
    """Turn any mode into RGB."""
    if image.mode.startswith("I;16") or image.mode == "I":
        # Pillow would clip to 255; what is 16 bit is scaled.
        return Image.fromarray((np.asarray(image).astype(np.int64) >> 8).clip(0, 255).astype(np.uint8)).convert("RGB")
    if "A" in image.getbands() or "transparency" in image.info:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, "white")
        return Image.alpha_composite(white, image).convert("RGB")
    return image if image.mode == "RGB" else image.convert("RGB")  # which would copy it


class Square(NamedTuple):
    """Where in an image a square lies, in shares of its height and width.

    Attributes:
        top: Share above it.
        left: Share before it.
        height: Share of the height that it takes.
        width: Share of the width.
        mirrored: Whether left and right are exchanged.
    """

    top: float
    left: float
    height: float
    width: float
    mirrored: bool


class ImageDataset(Dataset[Tensor]):
    """Squares out of images: cropped, resized, and mirrored by chance while training.

    Args:
        read: Gives image number i as uint8 `(3, h, w)`; is told the shorter side that will be wanted, or None.
        count: How many images there are.
        image_size: Side of the squares, in pixels.
        train: Crops at random and mirrors; otherwise the largest centred square is taken (`PROTOCOL`).
        least_scale: Smallest side of a random crop, as a share of the shorter side, in (0, 1].
        flip: Mirror every other image.
        seed: Seed of all chance.
    """

    def __init__(
        self,
        read: Callable[[int, int | None], Tensor],
        count: int,
        *,
        image_size: int,
        train: bool,
        least_scale: float = 0.8,
        flip: bool = True,
        seed: int = 0,
    ) -> None:
        at_least({"data.image_size": (image_size, 2)})  # torch 2.14 fails to resize bytes to one pixel
        if not 0 < least_scale <= 1:
            raise UserError(f"data.least_scale={least_scale}: must lie in (0, 1]")
        self.read = read
        self.count = count
        self.image_size = image_size
        self.train = train
        self.least_scale = least_scale
        self.flip = flip
        self.seed = seed

    def __len__(self) -> int:
        """Count the images."""
        return self.count

    def __getitem__(self, key: Key) -> Tensor:
        """Give the square of `(epoch, index)`: uint8 `(3, image_size, image_size)`.

        Raises:
            BadSample: The file can't be read.
        """
        _, index = key
        size = [self.image_size, self.image_size]
        if not self.train:
            image = self.read(index, None)
            side = min(image.shape[1:])
            box = centre_box(image.shape[1:], (side, side))
        else:
            generator = sample_generator(self.seed, key)
            scale = self._scale(generator)
            image = self.read(index, round(self.image_size / scale))
            box = self._box(image.shape[1:], scale, generator)
        # Cropped first, so that a strip 30,000 pixels wide costs no more than its crop.
        (top, height), (left, width) = box
        square = image[:, top : top + height, left : left + width]
        square = functional.resize(square, size, InterpolationMode.BICUBIC, antialias=True)
        if self.train and self._mirrored(generator):
            square = square.flip(-1)
        result: Tensor = square.contiguous()
        return result

    def _scale(self, generator: torch.Generator) -> float:
        """Draw the side of a crop, as a share of the shorter side."""
        return self.least_scale + (1 - self.least_scale) * float(torch.rand((), generator=generator))

    def _box(self, shape: Sequence[int], scale: float, generator: torch.Generator) -> list[tuple[int, int]]:
        """Draw where a crop lies."""
        side = max(1, round(scale * min(shape)))
        return random_box(shape, (side, side), generator)

    def _mirrored(self, generator: torch.Generator) -> bool:
        return self.flip and float(torch.rand((), generator=generator)) < 0.5


class ImageFolder(ImageDataset):
    """All images below a folder, or in shards.

    Which files are trained on and which are held out: see `list_files`.

    Args:
        root: The folder, or an address of shards.
        split: "train" or "val".
        image_size: Side of the squares, in pixels.
        val_share: Share of the files that is held out.
        least_side: Shortest side that a file may have, in pixels.
        least_scale: See `ImageDataset`.
        flip: See `ImageDataset`.
        seed: See `ImageDataset`.

    Raises:
        UserError: The folder isn't there, or holds no image.
    """

    def __init__(
        self,
        root: str | Path,
        split: Literal["train", "val"],
        *,
        image_size: int,
        val_share: float = 0.05,
        least_side: int = 8,
        least_scale: float = 0.8,
        flip: bool = True,
        seed: int = 0,
    ) -> None:
        self.least_side = least_side
        self.files = list_files(root, split, val_share, SUFFIXES, "image")
        super().__init__(
            self._read,
            len(self.files),
            image_size=image_size,
            train=split == "train",
            least_scale=least_scale,
            flip=flip,
            seed=seed,
        )

    def _read(self, index: int, shorter_side: int | None) -> Tensor:
        return decode_image(self.files[index], shorter_side, self.least_side)

    def square(self, key: Key) -> Square:
        """Tell where in its image the training square of `(epoch, index)` lies; nothing is decoded.

        Raises:
            BadSample: The file can't be read.
        """
        generator = sample_generator(self.seed, key)
        scale = self._scale(generator)
        height, width = decoded_size(self.files[key[1]], round(self.image_size / scale), self.least_side)
        (top, rows), (left, columns) = self._box((height, width), scale, generator)
        return Square(top / height, left / width, rows / height, columns / width, self._mirrored(generator))


def image_folder(
    root: str,
    *,
    image_size: int = 64,
    val_share: float = 0.05,
    least_side: int = 8,
    least_scale: float = 0.8,
    flip: bool = True,
    seed: int = 0,
) -> Splits:
    """Make both splits of a folder of images, or of shards; see `ImageFolder`."""
    common: dict[str, Any] = {
        "image_size": image_size,
        "val_share": val_share,
        "least_side": least_side,
        "least_scale": least_scale,
        "flip": flip,
        "seed": seed,
    }
    splits = ImageFolder(root, "train", **common), ImageFolder(root, "val", **common)
    return Splits(*splits, about=_about(str(root), image_size))


def cifar10(root: str, image_size: int = 32, download: bool = True, flip: bool = True, seed: int = 0) -> Splits:
    """Make CIFAR-10's splits: 50,000 and 10,000 images of 32 x 32 pixels, fetched by torchvision.

    Raises:
        UserError: The files are not in `root` and can't be fetched.
    """
    from torchvision.datasets import CIFAR10  # noqa: PLC0415

    def split(train: bool) -> ImageDataset:
        data = fetched(lambda: CIFAR10(root, train=train, download=download), root, "cifar-10-python.tar.gz")
        pixels = torch.from_numpy(data.data).permute(0, 3, 1, 2)
        return ImageDataset(
            lambda i, _: pixels[i],
            len(pixels),
            image_size=image_size,
            train=train,
            least_scale=1.0,
            flip=flip,
            seed=seed,
        )

    return Splits(split(True), split(False), about=_about("CIFAR-10", image_size))


def imagenette(
    root: str,
    *,
    image_size: int = 64,
    version: Literal["full", "320px", "160px"] = "160px",
    download: bool = True,
    least_scale: float = 0.8,
    flip: bool = True,
    seed: int = 0,
) -> Splits:
    """Make Imagenette's splits: 9,469 and 3,925 photos of ten classes of ImageNet, fetched by torchvision.

    Raises:
        UserError: The files are not in `root` and can't be fetched.
    """
    from torchvision.datasets import Imagenette  # noqa: PLC0415

    archive = {"full": "imagenette2.tgz", "320px": "imagenette2-320.tgz", "160px": "imagenette2-160.tgz"}[version]

    def split(name: Literal["train", "val"]) -> ImageDataset:
        data = fetched(lambda: Imagenette(root, split=name, size=version, download=download), root, archive)
        files = [Path(file) for file, _ in data._samples]
        return ImageDataset(
            lambda i, side: decode_image(files[i], side),
            len(files),
            image_size=image_size,
            train=name == "train",
            least_scale=least_scale,
            flip=flip,
            seed=seed,
        )

    return Splits(split("train"), split("val"), about=_about(f"Imagenette {version}", image_size))


def _about(name: str, image_size: int) -> dict[str, str]:
    return {"dataset": f"{name}, validation split", "protocol": f"{PROTOCOL}; {image_size} x {image_size} pixels"}
