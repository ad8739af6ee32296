"""The video modality."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import torch
from omegaconf import DictConfig
from torch import Tensor
from torch.utils.data import Dataset

from varitok.data.batch import Splits

from ..codec import Codec
from ..metrics import fvd, video
from ..metrics.metric import Column
from .base import Exhibit, GraphNames, Rows
from .image import Image, image_size_of
from .media import draw_clips, mp4, write_mp4

__all__ = ["Video"]

FRAME_RATE = 8.0  # Hz, if the codec has none
SECONDS = 4.0  # default duration kept from a file
AXES = ("num_frames", "height", "width"), ("latent_frames", "latent_height", "latent_width")


class Video(Image):
    """Clips `(b, 3, t, h, w)`, compared as 8-bit pixels.

    The bitrate is in bits per pixel: bits per second would depend on a frame rate, which not every file has.
    """

    name = "video"
    noun = kind = file_noun = "clip"
    examples: ClassVar[tuple[str, ...]] = ("clips/07.mp4", "clips/13.mp4")
    grid = "t h w"
    graph = GraphNames("pixel_values_videos", "video_codes", "reconstruction", *AXES)
    metrics = (*video.METRICS, *fvd.METRICS)
    rate = Column("bpp", "bpp", "{:.4f}", "bits per pixel", "bits / (pixels of a frame * frames)")
    element = "video"

    @classmethod
    def recognizes(cls, codec: Any) -> bool:
        """Return whether a codec has three grid axes and bounded values."""
        return len(getattr(codec, "downsample", ())) == 3 and bool(getattr(codec, "bounded", True))

    def amount(self, signal: Tensor, lengths: Tensor) -> float:
        """Return the number of pixels."""
        return float(lengths.sum()) * signal.shape[3] * signal.shape[4]

    def write_samples(self, stem: Path, rows: Rows, scale: int = 1) -> tuple[Path, dict[str, Path]]:
        """Draw some frames, and write MP4 files, each with a clip beside its reconstructions."""
        picture, media = stem.with_suffix(".png"), {}
        draw_clips(rows, scale).save(picture)
        for column, clips in enumerate(zip(*(clips for _, clips in rows), strict=True)):
            media[str(column)] = stem / f"{column}.mp4"
            write_mp4(media[str(column)], torch.cat(clips, dim=3), self.frame_rate or FRAME_RATE)
        return picture, media

    def exhibit(self, signals: Sequence[Tensor]) -> list[Exhibit]:
        """Return MP4 files."""
        return [Exhibit(b"", mp4(clip, self.frame_rate or FRAME_RATE), "video/mp4") for clip in signals]

    def describe(self, codec: Codec, size: Sequence[int]) -> dict[str, Any]:
        """Return the frame rate, the downsampling factors and the causal pad."""
        return {
            "frame_rate": codec.frame_rate,
            "hop": list(codec.downsample),
            "lead": codec.layout.causal_pad,
        }

    def folder_splits(self, data: DictConfig, folder: Path) -> Splits:
        """Build the splits of a folder of video files."""
        from varitok.data.datasets.video import video_folder  # noqa: PLC0415 (PyAV is slow to import)

        image_size_of(data)
        names = ("crop_tokens", "downsample", "causal_pad", "val_tokens", "image_size", "frame_rate")
        return video_folder(str(folder), val_share=1.0, **{key: data[key] for key in names if key in data})

    def dataset(
        self, config: Mapping[str, Any], files: Sequence[Path], seconds: float | None, side: int
    ) -> tuple[Dataset[Tensor], str]:
        """Build a dataset of video files, cropped, resized and resampled in time."""
        from varitok.data.datasets.video import splits_of  # noqa: PLC0415 (PyAV is slow to import)

        rate, causal_pad = float(config.get("frame_rate") or FRAME_RATE), int(config["lead"])
        frames, *sides = (int(step) for step in config["hop"])
        tokens = max(1, int(((seconds or SECONDS) * rate + causal_pad) // frames))
        height, width = config.get("frame_size") or [-(-side // step) * step for step in sides]
        splits = splits_of(
            "",
            files,
            files,
            crop_tokens=tokens,
            downsample=frames,
            causal_pad=causal_pad,
            image_size=(height, width),
            frame_rate=rate,
        )
        return splits.val, splits.about["protocol"]
