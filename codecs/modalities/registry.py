"""Registry of modalities, metrics and table columns; a new modality is added here."""

from typing import Any

from varitok import UserError

from ..metrics.metric import Column
from ..metrics.rate import BYTES, KEPT, USED
from .audio import Audio
from .base import Modality
from .feature import Feature
from .image import Image
from .video import Video

__all__ = ["BITS", "COLUMNS", "METRICS", "MODALITIES", "lower_is_better", "modality_of"]

MODALITIES: dict[str, type[Modality]] = {kind.name: kind for kind in (Audio, Image, Video, Feature)}
"""Modalities by name. A codec has the first one that recognizes it."""

BITS = "bits"  # of the validation codes under a prior
METRICS = {metric.name: metric for kind in MODALITIES.values() for metric in kind.metrics}

COLUMNS: dict[str, Column] = {
    column.name: column
    for column in (*KEPT, BYTES, *(kind.rate for kind in MODALITIES.values()), *METRICS.values(), *USED)
}
"""Printed columns by name, from left to right."""


def modality_of(codec: Any) -> Modality:
    """Return the modality of a codec's signals.

    Raises:
        UserError: No modality recognizes it.
    """
    for kind in MODALITIES.values():
        if kind.recognizes(codec):
            return kind(getattr(codec, "sample_rate", None) or 0, getattr(codec, "frame_rate", None))
    raise UserError(
        f"no modality recognizes a codec with hop_length={list(codec.downsample)}; known are {', '.join(MODALITIES)}"
    )


def lower_is_better(name: str) -> bool:
    """Return whether a measured value is better if it is lower: a metric's, or a prior's bits."""
    return name == BITS or (name in METRICS and not METRICS[name].higher_is_better)
