"""Image datasets: square uint8 crops of image files."""

from collections.abc import Callable, Sequence
from dataclasses import KW_ONLY, dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple, TypeAlias

import torch
from torch import Tensor
from torchvision.transforms.v2 import InterpolationMode, functional

from ..batch import Key, SignalDataset, Splits, sample_generator
from ..decoding.images import center_square, decode_image, decoded_size
from ..decoding.suffixes import IMAGES
from ..storage.listing import Share, list_splits
from ..storage.members import File
from .base import download_or_raise, takes
from .crops import random_box

__all__ = ["PROTOCOL", "ImageDataset", "ImageFiles", "Square", "cifar10", "image_folder", "imagenette"]

PROTOCOL = (
    "EXIF rotation applied, alpha over white, RGB; largest centered square cropped;"
    " resized by antialiased bicubic interpolation on 8-bit values; nothing else"
)
Split: TypeAlias = Literal["train", "val"]
ImageSize: TypeAlias = Annotated[int, "[2, inf)"]  # torch 2.14 fails to resize uint8 to one pixel


class Square(NamedTuple):
    """A square crop: position and size as fractions of the image's height and width, and whether it is mirrored."""

    top: float
    left: float
    height: float
    width: float
    mirrored: bool


@dataclass(eq=False, repr=False)
class ImageDataset(SignalDataset):
    """A dataset of square crops of images, resized; in training at random positions, and mirrored.

    Args:
        read: Function (index, shorter side needed, or None for full size) -> uint8 `(3, h, w)`.
        count: Number of images.
        image_size: Side of the output, in pixels.
        train: Crop at random and mirror; otherwise take the largest centered square (`PROTOCOL`).
        least_scale: Minimum side of a random crop, as a share of the shorter side, in (0, 1].
        flip: In training, mirror with probability 1/2.
        seed: Seed of all randomness.
    """

    read: Callable[[int, int | None], Tensor]
    count: int
    _: KW_ONLY
    image_size: ImageSize
    train: bool
    least_scale: Annotated[float, "(0, 1]"] = 0.8
    flip: bool = True
    seed: Annotated[int, "[0, inf)"] = 0

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, key: Key) -> Tensor:
        """Return the crop of `(epoch, index)`: uint8 `(3, image_size, image_size)`."""
        _, index = key
        size = [self.image_size, self.image_size]
        if not self.train:
            pixels = self.read(index, None).permute(1, 2, 0).numpy()  # (3, h, w) -> (h, w, 3)
            return torch.from_numpy(center_square(pixels, self.image_size)).permute(2, 0, 1).contiguous()
        generator = sample_generator(self.seed, key)
        scale = self._scale(generator)
        image = self.read(index, round(self.image_size / scale))
        # Crop before resizing, so that a panorama 30,000 pixels wide costs no more than its crop.
        (top, height), (left, width) = self._box(image.shape[1:], scale, generator)
        square = image[:, top : top + height, left : left + width]
        square = functional.resize(square, size, InterpolationMode.BICUBIC, antialias=True)
        if self._draw_mirror(generator):
            square = square.flip(-1)
        result: Tensor = square.contiguous()
        return result

    def _scale(self, generator: torch.Generator) -> float:
        """Draw the side of a crop, uniform in [least_scale, 1], as a share of the shorter side."""
        return self.least_scale + (1 - self.least_scale) * float(torch.rand((), generator=generator))

    def _box(self, shape: Sequence[int], scale: float, generator: torch.Generator) -> list[tuple[int, int]]:
        side = max(1, round(scale * min(shape)))
        return random_box(shape, (side, side), generator)

    def _draw_mirror(self, generator: torch.Generator) -> bool:
        return self.flip and float(torch.rand((), generator=generator)) < 0.5


class ImageFiles(ImageDataset):
    """A dataset of square crops of image files.

    Args:
        files: Paths, or members of shards.
        least_side: Minimum shorter side of a file, in pixels.
        form: See `ImageDataset`.
    """

    def __init__(self, files: Sequence[File], *, least_side: int = 1, **form: Any) -> None:
        self.files = files
        self.least_side = least_side
        super().__init__(self._read, len(files), **form)

    def _read(self, index: int, shorter_side: int | None) -> Tensor:
        pixels = decode_image(self.files[index], shorter_side, self.least_side)
        # (h, w, 3) -> (3, h, w), as a view: channels-last memory is cropped and resized faster.
        return torch.from_numpy(pixels).permute(2, 0, 1)

    def square(self, key: Key) -> Square:
        """Return the training crop of `(epoch, index)` within its image, without decoding.

        Raises:
            BadSample: The file can't be read.
        """
        generator = sample_generator(self.seed, key)
        scale = self._scale(generator)
        height, width = decoded_size(self.files[key[1]], round(self.image_size / scale), self.least_side)
        (top, rows), (left, columns) = self._box((height, width), scale, generator)
        return Square(top / height, left / width, rows / height, columns / width, self._draw_mirror(generator))


@takes(ImageDataset, "train")
def splits_of(name: str, make: Callable[..., ImageDataset], *, image_size: ImageSize = 64, **form: Any) -> Splits:
    """Build both splits.

    Args:
        name: Name of the dataset, for tables.
        make: Function that builds a split from its name, "train" or "val", and `ImageDataset`'s keyword arguments.
        image_size: See `ImageDataset`.
        form: See `ImageDataset`.
    """
    train, val = (make(split, train=split == "train", image_size=image_size, **form) for split in ("train", "val"))
    protocol = f"{PROTOCOL}; {image_size} x {image_size} pixels"
    return Splits(train, val, about={"dataset": f"{name}, validation split", "protocol": protocol})


@takes(splits_of)
def image_folder(root: str, *, val_share: Share = 0.05, least_side: int = 8, **form: Any) -> Splits:
    """Build both splits of a folder of images or shards; see `list_splits`, `ImageFiles` and `splits_of`.

    >>> from varitok import data
    >>> splits = image_folder(f"{data.__path__[0]}/embedded/photos", image_size=32)
    >>> len(splits.train), len(splits.val)
    (898, 47)
    >>> splits.train[0, 5].shape  # sample 5 in epoch 0: uint8 (3, h, w)
    torch.Size([3, 32, 32])
    """

    def make(split: Split, **form: Any) -> ImageDataset:
        return ImageFiles(getattr(files, split), least_side=least_side, **form)

    files = list_splits(root, val_share, IMAGES, "image")
    return splits_of(str(root), make, **form)


@takes(splits_of)
def cifar10(
    root: str,
    *,
    image_size: ImageSize = 32,
    download: bool = True,
    least_scale: Annotated[float, "(0, 1]"] = 1.0,
    **form: Any,
) -> Splits:
    """Build the splits of CIFAR-10: 50,000 and 10,000 images of 32 x 32 pixels, downloaded by torchvision.

    Raises:
        UserError: The files are not in `root` and can't be downloaded.
    """
    from torchvision.datasets import CIFAR10  # noqa: PLC0415

    def make(split: Split, **form: Any) -> ImageDataset:
        load = partial(CIFAR10, root, train=split == "train", download=download)
        # (n, h, w, 3) -> (n, 3, h, w)
        pixels = torch.from_numpy(download_or_raise(load, root, "cifar-10-python.tar.gz").data).permute(0, 3, 1, 2)
        return ImageDataset(partial(_row, pixels), len(pixels), **form)

    return splits_of("CIFAR-10", make, image_size=image_size, least_scale=least_scale, **form)


def _row(pixels: Tensor, index: int, shorter_side: int | None) -> Tensor:
    return pixels[index]


@takes(splits_of)
def imagenette(
    root: str, *, version: Literal["full", "320px", "160px"] = "160px", download: bool = True, **form: Any
) -> Splits:
    """Build the splits of Imagenette: 9,469 and 3,925 photos of ten ImageNet classes, downloaded by torchvision.

    Raises:
        UserError: The files are not in `root` and can't be downloaded.
    """
    from torchvision.datasets import Imagenette  # noqa: PLC0415

    archive = {"full": "imagenette2.tgz", "320px": "imagenette2-320.tgz", "160px": "imagenette2-160.tgz"}[version]

    def make(split: Split, **form: Any) -> ImageDataset:
        data = download_or_raise(partial(Imagenette, root, split=split, size=version, download=download), root, archive)
        return ImageFiles([Path(file) for file, _ in data._samples], **form)

    return splits_of(f"Imagenette {version}", make, **form)
