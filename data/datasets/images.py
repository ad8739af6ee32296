"""Images: from files of any kind to uint8 squares."""

from collections.abc import Callable, Sequence
from dataclasses import KW_ONLY, dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple, TypeAlias

import torch
from torch import Tensor
from torchvision.transforms.v2 import InterpolationMode, functional

from varitok import UserError, require_min

from ..batch import Key, SignalDataset, Splits, sample_generator
from ..decoding.images import SUFFIXES, decode_image, decoded_size
from ..storage.listing import list_files
from ..storage.members import File
from .base import download_or_raise, takes
from .crops import center_box, random_box

__all__ = ["PROTOCOL", "ImageDataset", "ImageFiles", "Square", "cifar10", "image_folder", "imagenette"]

PROTOCOL = (
    "EXIF rotation applied, alpha over white, RGB; largest centered square cropped;"
    " resized by antialiased bicubic interpolation on 8-bit values; nothing else"
)
Split: TypeAlias = Literal["train", "val"]


class Square(NamedTuple):
    """A square crop as shares of the image's height and width, and whether it is mirrored."""

    top: float
    left: float
    height: float
    width: float
    mirrored: bool


@dataclass(eq=False, repr=False)
class ImageDataset(SignalDataset):
    """Squares out of images: cropped, resized, and mirrored by chance while training.

    Args:
        read: Returns image number i as uint8 `(3, h, w)`, given the shorter side that is needed, or None for all.
        count: How many images there are.
        image_size: Side of the squares, in pixels.
        train: Crops at random and mirrors; otherwise the largest centered square is taken (`PROTOCOL`).
        least_scale: Smallest side of a random crop, as a share of the shorter side, in (0, 1].
        flip: Mirror every other image.
        seed: Seed of all chance.
    """

    read: Callable[[int, int | None], Tensor]
    count: int
    _: KW_ONLY
    image_size: int
    train: bool
    least_scale: float = 0.8
    flip: bool = True
    seed: int = 0

    def __post_init__(self) -> None:
        require_min({"data.image_size": (self.image_size, 2)})  # torch 2.14 fails to resize bytes to one pixel
        if not 0 < self.least_scale <= 1:
            raise UserError(f"data.least_scale={self.least_scale}: must be in (0, 1]")

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, key: Key) -> Tensor:
        """Return the square of `(epoch, index)`: uint8 `(3, image_size, image_size)`."""
        _, index = key
        size = [self.image_size, self.image_size]
        if not self.train:
            image = self.read(index, None)
            side = min(image.shape[1:])
            box = center_box(image.shape[1:], (side, side))
        else:
            generator = sample_generator(self.seed, key)
            scale = self._scale(generator)
            image = self.read(index, round(self.image_size / scale))
            box = self._box(image.shape[1:], scale, generator)
        # Cropped first, so that a strip 30,000 pixels wide costs no more than its crop.
        (top, height), (left, width) = box
        square = image[:, top : top + height, left : left + width]
        square = functional.resize(square, size, InterpolationMode.BICUBIC, antialias=True)
        if self.train and self._draw_mirror(generator):
            square = square.flip(-1)
        result: Tensor = square.contiguous()
        return result

    def _scale(self, generator: torch.Generator) -> float:
        """Draw the side of a crop, as a share of the shorter side."""
        return self.least_scale + (1 - self.least_scale) * float(torch.rand((), generator=generator))

    def _box(self, shape: Sequence[int], scale: float, generator: torch.Generator) -> list[tuple[int, int]]:
        """Draw a crop."""
        side = max(1, round(scale * min(shape)))
        return random_box(shape, (side, side), generator)

    def _draw_mirror(self, generator: torch.Generator) -> bool:
        return self.flip and float(torch.rand((), generator=generator)) < 0.5


class ImageFiles(ImageDataset):
    """Squares out of image files.

    Args:
        files: Paths, or members of shards.
        least_side: Shortest side that a file may have, in pixels.
        form: See `ImageDataset`.
    """

    def __init__(self, files: Sequence[File], *, least_side: int = 1, **form: Any) -> None:
        self.files = files
        self.least_side = least_side
        super().__init__(self._read, len(files), **form)

    def _read(self, index: int, shorter_side: int | None) -> Tensor:
        return decode_image(self.files[index], shorter_side, self.least_side)

    def square(self, key: Key) -> Square:
        """Return the training square of `(epoch, index)` within its image, without decoding.

        Raises:
            BadSample: The file can't be read.
        """
        generator = sample_generator(self.seed, key)
        scale = self._scale(generator)
        height, width = decoded_size(self.files[key[1]], round(self.image_size / scale), self.least_side)
        (top, rows), (left, columns) = self._box((height, width), scale, generator)
        return Square(top / height, left / width, rows / height, columns / width, self._draw_mirror(generator))


@takes(ImageDataset, "train")
def splits_of(name: str, make: Callable[..., ImageDataset], *, image_size: int = 64, **form: Any) -> Splits:
    """Make both splits.

    Args:
        name: Name of the dataset, for tables.
        make: Makes a split by its name, "train" or "val", and `ImageDataset`'s keywords.
        image_size: See `ImageDataset`.
        form: See `ImageDataset`.
    """
    train, val = (make(split, train=split == "train", image_size=image_size, **form) for split in ("train", "val"))
    protocol = f"{PROTOCOL}; {image_size} x {image_size} pixels"
    return Splits(train, val, about={"dataset": f"{name}, validation split", "protocol": protocol})


@takes(splits_of)
def image_folder(root: str, *, val_share: float = 0.05, least_side: int = 8, **form: Any) -> Splits:
    """Make both splits of a folder of images, or of shards; see `list_files`, `ImageFiles` and `splits_of`."""

    def make(split: Split, **form: Any) -> ImageDataset:
        return ImageFiles(list_files(root, split, val_share, SUFFIXES, "image"), least_side=least_side, **form)

    return splits_of(str(root), make, **form)


@takes(splits_of)
def cifar10(root: str, *, image_size: int = 32, download: bool = True, least_scale: float = 1.0, **form: Any) -> Splits:
    """Make CIFAR-10's splits: 50,000 and 10,000 images of 32 x 32 pixels, fetched by torchvision; see `splits_of`.

    Raises:
        UserError: The files are not in `root` and can't be fetched.
    """
    from torchvision.datasets import CIFAR10  # noqa: PLC0415

    def make(split: Split, **form: Any) -> ImageDataset:
        load = partial(CIFAR10, root, train=split == "train", download=download)
        pixels = torch.from_numpy(download_or_raise(load, root, "cifar-10-python.tar.gz").data).permute(0, 3, 1, 2)
        return ImageDataset(lambda i, _: pixels[i], len(pixels), **form)

    return splits_of("CIFAR-10", make, image_size=image_size, least_scale=least_scale, **form)


@takes(splits_of)
def imagenette(
    root: str, *, version: Literal["full", "320px", "160px"] = "160px", download: bool = True, **form: Any
) -> Splits:
    """Make Imagenette's splits: 9,469 and 3,925 photos of ten classes of ImageNet, fetched by torchvision.

    Raises:
        UserError: The files are not in `root` and can't be fetched.
    """
    from torchvision.datasets import Imagenette  # noqa: PLC0415

    archive = {"full": "imagenette2.tgz", "320px": "imagenette2-320.tgz", "160px": "imagenette2-160.tgz"}[version]

    def make(split: Split, **form: Any) -> ImageDataset:
        data = download_or_raise(partial(Imagenette, root, split=split, size=version, download=download), root, archive)
        return ImageFiles([Path(file) for file, _ in data._samples], **form)

    return splits_of(f"Imagenette {version}", make, **form)
