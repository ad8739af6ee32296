"""The modality of feature clips, a vision transformer's features of video."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf
from torch import Tensor

from varitok.data.batch import Splits

from ..build import build
from ..codec import Codec
from ..metrics import feature
from ..metrics.metric import Column
from .base import Exhibit, GraphNames, Rows
from .media import draw_clips, principal_colors
from .video import AXES, Video

__all__ = ["Feature"]


class Feature(Video):
    """Feature clips `(b, c, t, h, w)`, compared as floats; they are computed from video files."""

    name = "features"
    kind = "feature clip"
    graph = GraphNames("input_features", "feature_codes", "reconstruction", *AXES)
    rounding = "none: features are compared as floats"
    metrics = feature.METRICS
    shown = ("mse", "cosine")
    rate = Column("bpf", "bits/frame", "{:.1f}", "bits per frame", "bits / frames")

    @classmethod
    def recognizes(cls, codec: Any) -> bool:
        """Return whether a codec has three grid axes and unbounded values."""
        return len(getattr(codec, "downsample", ())) == 3 and not getattr(codec, "bounded", True)

    def as_written(self, signal: Tensor) -> Tensor:
        """Return the features unchanged, float32."""
        return signal.float()

    def amount(self, signal: Tensor, lengths: Tensor) -> float:
        """Return the number of frames."""
        return float(lengths.sum())

    def write_samples(self, stem: Path, rows: Rows, scale: int = 1) -> tuple[Path, dict[str, Path]]:
        """Draw the features' principal components as colors."""
        picture = stem.with_suffix(".png")
        draw_clips(principal_colors(rows), scale).save(picture)
        return picture, {}

    def exhibit(self, signals: Sequence[Tensor]) -> list[Exhibit]:
        """Return MP4 files of the features' principal components as colors."""
        return super().exhibit([clip for _, (clip,) in principal_colors([("", [clip]) for clip in signals])])

    def describe(self, codec: Codec, size: Sequence[int]) -> dict[str, Any]:
        """Return a clip's entries, and each channel's mean and standard deviation."""
        own = super().describe(codec, size)
        scales = {name: codec.get_buffer(name).tolist() for name in ("feature_mean", "feature_deviation")}
        blocks = {name: own.pop(name) for name in ("frame_size", "later_tokens") if name in own}
        return own | scales | blocks

    def folder_splits(self, data: DictConfig, folder: Path) -> Splits:
        """Build the splits of a folder of video files, with features standardized by the run's own training clips."""
        clips = super().folder_splits(data.clips, folder)._replace(train=build(data.clips).train)
        others = OmegaConf.masked_copy(data, [str(key) for key in data if key != "clips"])
        features: Splits = build(others, clips=clips)
        return features
