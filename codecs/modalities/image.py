"""The image modality."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

from omegaconf import DictConfig
from PIL import Image as Picture
from torch import Tensor
from torch.utils.data import Dataset

from varitok import UserError
from varitok.data.batch import Splits, to_uint8

from ..codec import Codec
from ..metrics import classifier, frechet, image
from ..metrics.metric import Column, Metric
from .base import Exhibit, GraphNames, Modality, Rows
from .media import draw_images, webp

__all__ = ["Image"]


class Image(Modality):
    """Images `(b, c, h, w)`, compared as 8-bit pixels."""

    name = "image"
    noun = kind = file_noun = "image"
    examples: ClassVar[tuple[str, ...]] = ("photos/0075.webp", "photos/0632.webp")
    grid = "h w"
    graph = GraphNames(
        "pixel_values", "image_codes", "reconstruction", ("height", "width"), ("latent_height", "latent_width")
    )
    precision = "bf16-mixed"
    rounding = "both sides are compared as 8-bit values; decoded ones are clamped and rounded to the nearest"
    metrics: tuple[Metric, ...] = (*image.METRICS, frechet.RFID, *classifier.METRICS)
    shown = ("psnr", "ssim")
    rate = Column("bpp", "bpp", "{:.4f}", "bits per pixel", "bits / pixels")

    @classmethod
    def recognizes(cls, codec: Any) -> bool:
        """Return whether a codec has two grid axes, or none."""
        return len(getattr(codec, "downsample", ())) in (0, 2)

    def facts(self, side: int) -> dict[str, int]:
        """Return MS-SSIM's number of scales."""
        return {"scales": image.scales(side, side) if side >= image.WINDOW else 0}

    def as_written(self, signal: Tensor) -> Tensor:
        """Round to 8-bit values, uint8."""
        return to_uint8(signal)

    def amount(self, signal: Tensor, lengths: Tensor) -> float:
        """Return the number of pixels."""
        return float(signal[:, 0].numel())

    def write_samples(self, stem: Path, rows: Rows, scale: int = 1) -> tuple[Path, dict[str, Path]]:
        """Draw a grid of the images."""
        picture = stem.with_suffix(".png")
        draw_images(rows, scale).save(picture)
        return picture, {}

    def exhibit(self, signals: Sequence[Tensor]) -> list[Exhibit]:
        """Return lossless WebP files."""
        pictures = (Picture.fromarray(signal.permute(1, 2, 0).numpy()) for signal in signals)  # (c, h, w) -> (h, w, c)
        return [Exhibit(webp(picture, lossless=True)) for picture in pictures]

    def describe(self, codec: Codec, size: Sequence[int]) -> dict[str, Any]:
        """Return the image size and the patch size; of tokens on a grid, the downsampling factors."""
        if not codec.layout.ordered:
            return {"hop": list(codec.downsample)}
        return {"image_size": size[1], "patch": codec.downsample[0]}

    def folder_splits(self, data: DictConfig, folder: Path) -> Splits:
        """Build the splits of a folder of images."""
        from varitok.data.datasets.images import image_folder  # noqa: PLC0415 (torchvision is slow to import)

        return image_folder(str(folder), image_size=image_size_of(data), val_share=1.0)

    def dataset(
        self, config: Mapping[str, Any], files: Sequence[Path], seconds: float | None, side: int
    ) -> tuple[Dataset[Tensor], str]:
        """Build a dataset of image files, cropped and resized."""
        from varitok.data.datasets.images import PROTOCOL, ImageFiles  # noqa: PLC0415 (torchvision is slow to import)

        side = int(config["image_size"]) if config["tokens"] else side
        return ImageFiles(files, image_size=side, train=False), f"{PROTOCOL}; {side} x {side} pixels"


def image_size_of(data: DictConfig) -> Any:
    """Return the size to which a run's data configuration resizes images and frames.

    Raises:
        UserError: The configuration has none.
    """
    if data.get("image_size") is None:
        raise UserError("--data: the run's configuration has no data.image_size to resize images to")
    return data.image_size
