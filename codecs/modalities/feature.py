"""Features that a vision transformer sees in clips."""

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
    """Feature clips `(b, c, t, rows, columns)`, compared as they are. No file holds them."""

    name = "features"
    kind = "feature clip"
    suffixes = ()
    graph = GraphNames("input_features", "feature_codes", "reconstruction", *AXES)
    rounding = "none: features are compared as floats"
    metrics = feature.METRICS
    shown = ("mse", "cosine")
    rate = Column("bpf", "bits/frame", "{:.1f}", "bits per frame", "bits / frames")

    @classmethod
    def recognizes(cls, codec: Any) -> bool:
        """Return whether a codec has a grid of frames, rows and columns, of features."""
        return len(getattr(codec, "downsample", ())) == 3 and not getattr(codec, "bounded", True)

    def as_written(self, signal: Tensor) -> Tensor:
        """Return them as they are."""
        return signal.float()

    def amount(self, signal: Tensor, lengths: Tensor) -> float:
        """Return the number of frames."""
        return float(lengths.sum())

    def write_samples(self, stem: Path, rows: Rows, scale: int = 1) -> tuple[Path, dict[str, Path]]:
        """Draw them as colors."""
        picture = stem.with_suffix(".png")
        draw_clips(principal_colors(rows), scale).save(picture)
        return picture, {}

    def exhibit(self, signals: Sequence[Tensor]) -> list[Exhibit]:
        """Return films of them as colors."""
        return super().exhibit([clip for _, (clip,) in principal_colors([("", [clip]) for clip in signals])])

    def describe(self, codec: Codec, size: Sequence[int]) -> dict[str, Any]:
        """Return a clip's entries, and what standardizes each channel."""
        own = super().describe(codec, size)
        scales = {name: codec.get_buffer(name).tolist() for name in ("feature_mean", "feature_deviation")}
        blocks = {name: own.pop(name) for name in ("frame_size", "later_tokens") if name in own}
        return own | scales | blocks

    def folder_splits(self, data: DictConfig, folder: Path) -> Splits:
        """Build both splits of a folder of clips, standardized as the run's own training clips are."""
        clips = super().folder_splits(data.clips, folder)._replace(train=build(data.clips).train)
        others = OmegaConf.masked_copy(data, [str(key) for key in data if key != "clips"])
        features: Splits = build(others, clips=clips)
        return features
