"""Example signals for a bundle's test vectors: real photos, speech and clips that come with varitok."""

import csv
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from varitok import data
from varitok.codecs.codec import Codec
from varitok.codecs.modalities.base import Modality
from varitok.data.batch import normalize

from .parity import Size, draw

__all__ = ["EMBEDDED", "example_signals"]

EMBEDDED = Path(data.__path__[0]) / "embedded"
SECONDS = 2.0  # of audio and video
SIDE = 64  # pixels, if the codec takes images and frames of any size


def example_signals(codec: Codec, modality: Modality, config: Mapping[str, Any], size: Size) -> tuple[Tensor, str]:
    """Return two signals `(2, c, *grid)` in [-1, 1], and where they come from.

    They are the modality's `examples`, or synthetic if it has none that this codec takes.

    Args:
        codec: The exported codec.
        modality: Its modality.
        config: The bundle's config.json.
        size: Size `(c, *grid)` of synthetic signals.
    """
    files = [EMBEDDED / name for name in modality.examples]
    if files and not (codec.layout.ordered and modality.grid == "t"):
        side = -(-SIDE // codec.downsample[-1]) * codec.downsample[-1]
        dataset, _ = modality.dataset(config, files, SECONDS, side)
        signals = [normalize(dataset[0, index]) for index in range(len(files))]
        if modality.grid.startswith("t"):  # whole steps
            step, pad = codec.downsample[0], codec.layout.causal_pad
            most = [signal.shape[1] for signal in signals] + [size[1]] * (len(size) > 2)  # clips are large
            length = (min(most) + pad) // step * step - pad
            signals = [signal[:, : max(length, 0)] for signal in signals]
        if signals[0].shape[0] == size[0] and signals[0].numel():
            return torch.stack(signals).contiguous(), "; ".join(_credit(name) for name in modality.examples)
    return draw(2, size, torch.Generator().manual_seed(0)), "synthetic"


def _credit(name: str) -> str:
    """Return the attribution and licence of an embedded file."""
    with (EMBEDDED / "attribution.csv").open(encoding="utf-8", newline="") as file:
        row = next(row for row in csv.DictReader(file) if row["path"] == name)
    return f"{row['attribution']} ({row['licence']})"
