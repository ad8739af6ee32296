"""Frozen networks, the teachers: what they make of signals, wherever it is used.

A dataset may be made of features (`features`), and an objective may compare a codec with them
(`varitok.codecs.losses.guided`). Weights must be on this machine; nothing is downloaded.
"""

import json
import re
from abc import ABC, abstractmethod
from pathlib import Path
from typing import Any, Literal, NamedTuple, TypeAlias

import torch
from torch import Tensor, nn

from varitok import UserError

from ..feature_map import FeatureMap
from ..weights import HOME, weight_folders

__all__ = ["Layer", "Pretrained", "Teacher", "layer_of", "load_pretrained"]

WEIGHTS = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin")

Layer: TypeAlias = int | Literal["last", "mean"]
"""Whose hidden states: a layer's by its number, 0 before the first, the "last" one's after the last norm, or the "mean"
of all."""


class Teacher(nn.Module, ABC):
    """A frozen network that turns signals into features.

    Attributes:
        name: Its name above a table.
        channels: Width of its features.
        pooled_channels: Width of its vector of a whole signal; 0 if it has only the mean.
    """

    name: str
    channels: int
    pooled_channels: int = 0

    @abstractmethod
    def forward(self, signal: Tensor, lengths: Tensor | None = None) -> FeatureMap:
        """Turn signals into features, with a gradient at signals that want one.

        Args:
            signal: `(b, c, *grid)`, uint8 or float in [-1, 1].
            lengths: int64 `(b,)`, valid steps of the first grid axis of sounds and clips; None for all.
        """


class Pretrained(NamedTuple):
    """A network of `transformers`, read from a folder."""

    network: Any
    folder: Path
    processor: dict[str, Any]  # contents of preprocessor_config.json, empty if missing
    missing: list[str]  # names of weights that the file doesn't have, sorted


def load_pretrained(folder: str, what: str, prefix: str = "", processor: bool = False) -> Pretrained:
    """Read a network of `transformers` from this machine.

    Args:
        folder: A path, or a name below a folder of weights.
        what: What should be there, for the error.
        prefix: Before the names of the weights in the file.
        processor: Whether preprocessor_config.json must be there.

    Raises:
        UserError: A file isn't there, `transformers` isn't installed, or can't read it.
    """
    folders = [Path(folder).expanduser(), *(root / folder for root in weight_folders())]
    needed = ["config.json", *(["preprocessor_config.json"] if processor else [])]
    whole = (
        one
        for one in folders
        if all((one / name).is_file() for name in needed) and any((one / name).is_file() for name in WEIGHTS)
    )
    path = next(whole, None)
    if path is None:
        files = f"{', '.join(needed)} and model.safetensors (or pytorch_model.bin)"
        raise UserError(f"{folder}: place {files} of {what} there, or in {HOME / folder}; nothing is downloaded")
    try:
        from transformers import AutoModel  # noqa: PLC0415 (an extra)
    except ImportError as error:
        raise UserError("a teacher needs the package transformers; pip install 'varitok[teachers]'") from error
    renamed = {"key_mapping": {"^" + re.escape(prefix): ""}} if prefix else {}
    try:
        found, told = AutoModel.from_pretrained(str(path), local_files_only=True, output_loading_info=True, **renamed)
        about = path / "preprocessor_config.json"
        read = json.loads(about.read_text(encoding="utf-8")) if about.is_file() else {}
    except Exception as error:  # OSError, ValueError and what safetensors raises
        first = (str(error).splitlines() or [""])[0]
        raise UserError(f"{path}: transformers can't read it ({first})") from error
    return Pretrained(found, path, read, sorted(told["missing_keys"]))


def check_layer(layer: Layer, network: Any) -> Layer:
    """Check a layer and return it.

    Raises:
        UserError: The network doesn't have it.
    """
    most = int(network.config.num_hidden_layers)
    if layer in ("last", "mean") or (isinstance(layer, int) and 0 <= layer <= most):
        return layer
    raise UserError(f"the teacher's layer={layer}: must be last, mean, or from 0 to {most}")


def layer_of(output: Any, layer: Layer) -> Tensor:
    """Take hidden states `(b, n, c)` from what a transformer gives."""
    states: Tensor = output.last_hidden_state
    if layer == "mean":
        states = torch.stack(output.hidden_states).mean(0)
    elif layer != "last":
        states = output.hidden_states[layer]
    return states
