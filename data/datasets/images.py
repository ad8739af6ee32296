"""Image datasets: uint8 crops of image files, square or of several shapes."""

from collections.abc import Callable, Sequence
from dataclasses import KW_ONLY, dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple, TypeAlias

import numpy as np
import torch
from torch import Tensor
from torchvision.transforms.v2 import InterpolationMode, functional

from ..batch import Key, SignalDataset, Splits, sample_generator
from ..decoding.images import center_square, decode_image, decoded_size
from ..decoding.suffixes import IMAGES
from ..permutation import Numbers
from ..storage.listing import Share, list_splits
from ..storage.members import File, Member
from .base import download_or_raise, takes
from .crops import closest_shape, random_box
from .file_lengths import measure_files

__all__ = ["PROTOCOL", "Crop", "ImageDataset", "ImageFiles", "cifar10", "image_folder", "imagenette"]

PROTOCOL = (
    "EXIF rotation applied, alpha over white, RGB; largest centered square cropped;"
    " resized by antialiased bicubic interpolation on 8-bit values; nothing else"
)
Split: TypeAlias = Literal["train", "val"]
ImageSize: TypeAlias = Annotated[int, "[2, inf)"]  # torch 2.14 fails to resize uint8 to one pixel
Shape: TypeAlias = Annotated[tuple[int, int], "[2, inf)"]
"""Height and width, in pixels."""


class Crop(NamedTuple):
    """A crop: position and size as fractions of the image's height and width, and whether it is mirrored."""

    top: float
    left: float
    height: float
    width: float
    mirrored: bool


@dataclass(eq=False, repr=False)
class ImageDataset(SignalDataset):
    """A dataset of square crops of images, resized; in training at random positions, and mirrored.

    If there are several shapes, training crops have the one closest to their image in aspect ratio (`closest_shape`).

    Args:
        read: Function (index, shorter side needed, or None for full size) -> uint8 `(3, h, w)`.
        count: Number of images.
        image_size: Side of the output, in pixels.
        train: Crop at random and mirror; otherwise take the largest centered square (`PROTOCOL`).
        least_scale: Minimum side of a random crop, as a share of the largest crop's, in (0, 1].
        flip: In training, mirror with probability 1/2.
        shapes: Heights and widths of training crops; empty for squares.
        seed: Seed of all randomness.
    """

    read: Callable[[int, int | None], Tensor]
    count: int
    _: KW_ONLY
    image_size: ImageSize
    train: bool
    least_scale: Annotated[float, "(0, 1]"] = 0.8
    flip: bool = True
    shapes: Sequence[tuple[int, int]] = ()
    seed: Annotated[int, "[0, inf)"] = 0

    def __len__(self) -> int:
        return self.count

    def bucket_ids(self) -> Numbers:
        """Return the index into `shapes` of each image; 0 if it can't be read."""
        return np.array([closest_shape(self.shapes, self.extent(index)) for index in range(len(self))])

    def extent(self, index: int) -> tuple[int, int]:
        """Return height and width of an image.

        Raises:
            BadSample: It can't be read.
        """
        _, height, width = self.read(index, None).shape
        return height, width

    def crop_size(self, index: int) -> tuple[int, int]:
        """Return height and width of an image's training crop; errors as `extent`."""
        side = self.image_size
        return self.shapes[closest_shape(self.shapes, self.extent(index))] if self.shapes else (side, side)

    def __getitem__(self, key: Key) -> Tensor:
        """Return the crop of `(epoch, index)`: uint8 `(3, h, w)`, in training of its shape, else a square."""
        _, index = key
        if not self.train:
            pixels = self.read(index, None).permute(1, 2, 0).numpy()  # (3, h, w) -> (h, w, 3)
            return torch.from_numpy(center_square(pixels, self.image_size)).permute(2, 0, 1).contiguous()
        generator = sample_generator(self.seed, key)
        scale, size = self._scale(generator), self.crop_size(index)
        image = self.read(index, round(max(size) / scale))
        # Crop before resizing, so that a panorama 30,000 pixels wide costs no more than its crop.
        (top, height), (left, width) = self._box(image.shape[1:], size, scale, generator)
        crop = image[:, top : top + height, left : left + width]
        crop = functional.resize(crop, list(size), InterpolationMode.BICUBIC, antialias=True)
        if self._draw_mirror(generator):
            crop = crop.flip(-1)
        result: Tensor = crop.contiguous()
        return result

    def _scale(self, generator: torch.Generator) -> float:
        """Draw the side of a crop, uniform in [least_scale, 1], as a share of the largest crop's."""
        return self.least_scale + (1 - self.least_scale) * float(torch.rand((), generator=generator))

    def _box(
        self, shape: Sequence[int], size: tuple[int, int], scale: float, generator: torch.Generator
    ) -> list[tuple[int, int]]:
        """Draw a box of `scale` times the sides of the largest with the proportions of `size`."""
        most = min(shape[0] * size[1], shape[1] * size[0])
        return random_box(shape, [max(1, round(scale * (most / side))) for side in reversed(size)], generator)

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

    def bucket_ids(self) -> Numbers:
        """Return the index into `shapes` of each image; 0 if it can't be read."""
        return measure_files(self.files, self._shape, f"shape {list(self.shapes)}")

    def _shape(self, file: File) -> int:
        return closest_shape(self.shapes, self._extent(file))

    def extent(self, index: int) -> tuple[int, int]:
        """Return height and width of an upright image, from its shard's index or its header."""
        return self._extent(self.files[index])

    def _extent(self, file: File) -> tuple[int, int]:
        if isinstance(file, Member) and "width" in file.facts:
            return file.facts["height"], file.facts["width"]
        return decoded_size(file, None, self.least_side)

    def crop(self, key: Key) -> Crop:
        """Return the training crop of `(epoch, index)` within its image, without decoding.

        Raises:
            BadSample: The file can't be read.
        """
        generator = sample_generator(self.seed, key)
        scale, size = self._scale(generator), self.crop_size(key[1])
        height, width = decoded_size(self.files[key[1]], round(max(size) / scale), self.least_side)
        (top, rows), (left, columns) = self._box((height, width), size, scale, generator)
        return Crop(top / height, left / width, rows / height, columns / width, self._draw_mirror(generator))


@takes(ImageDataset, "train", "shapes")
def splits_of(
    name: str,
    make: Callable[..., ImageDataset],
    *,
    image_size: ImageSize = 64,
    buckets: Sequence[Shape] | None = None,
    **form: Any,
) -> Splits:
    """Build both splits.

    Args:
        name: Name of the dataset, for tables.
        make: Function that builds a split from its name, "train" or "val", and `ImageDataset`'s keyword arguments.
        image_size: See `ImageDataset`.
        buckets: Shapes of training images: height and width of each; None for squares of `image_size`. Validation
            images are always such squares.
        form: See `ImageDataset`.
    """
    shapes = [(height, width) for height, width in buckets or ()]
    train = make("train", train=True, image_size=image_size, shapes=shapes, **form)
    val = make("val", train=False, image_size=image_size, **form)
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
