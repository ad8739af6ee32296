"""Teachers: frozen pretrained networks that compute features of signals.

The features are the signals of a dataset (`datasets.features`), or targets of loss terms
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
"""Layer whose hidden states are returned: a number (0 is the first layer's input), "last" (after the final norm), or
"mean" over all."""


class Teacher(nn.Module, ABC):
    """A frozen network that turns signals into features.

    Attributes:
        name: Name of the network, for the header of tables.
        channels: Number of feature channels.
        pooled_channels: Size of its pooled vector of a signal; 0 if it has no pooled output.
    """

    name: str
    channels: int
    pooled_channels: int = 0

    @abstractmethod
    def forward(self, signal: Tensor, lengths: Tensor | None = None) -> FeatureMap:
        """Compute features of signals; gradients flow back to signals that require them.

        Args:
            signal: `(b, c, *grid)`, uint8 or float in [-1, 1].
            lengths: int64 `(b,)`, valid steps of the first grid axis of audio and clips; None for all.
        """


class Pretrained(NamedTuple):
    """A pretrained network of `transformers`, loaded from a folder."""

    network: Any
    folder: Path
    processor: dict[str, Any]  # content of preprocessor_config.json, empty if missing
    missing: list[str]  # names of parameters that are missing in the file, sorted


def load_pretrained(
    folder: str, what: str, prefix: str = "", processor: bool = False, auto: str = "AutoModel"
) -> Pretrained:
    """Load a pretrained network of `transformers` from this machine.

    Args:
        folder: A path, or a name below one of `weight_folders`.
        what: Description of the expected network, for the error message.
        prefix: Prefix of the parameter names in the file, which is removed.
        processor: Whether preprocessor_config.json is required.
        auto: Class of `transformers` that loads it.

    Raises:
        UserError: A file is missing, `transformers` isn't installed, or can't read it.
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
        import transformers  # noqa: PLC0415 (an extra)
    except ImportError as error:
        raise UserError(f"{folder}: needs the package transformers; pip install 'varitok[teachers]'") from error
    renamed = {"key_mapping": {"^" + re.escape(prefix): ""}} if prefix else {}
    try:
        found, loading = getattr(transformers, auto).from_pretrained(
            str(path), local_files_only=True, output_loading_info=True, **renamed
        )
        about = path / "preprocessor_config.json"
        read = json.loads(about.read_text(encoding="utf-8")) if about.is_file() else {}
    except Exception as error:  # OSError, ValueError and errors of safetensors
        first = (str(error).splitlines() or [""])[0]
        raise UserError(f"{path}: transformers can't read it ({first})") from error
    return Pretrained(found, path, read, sorted(loading["missing_keys"]))


def check_layer(layer: Layer, network: Any) -> Layer:
    """Check that a network has a layer, and return the layer.

    Raises:
        UserError: The network doesn't have the layer.
    """
    most = int(network.config.num_hidden_layers)
    if layer in ("last", "mean") or (isinstance(layer, int) and 0 <= layer <= most):
        return layer
    raise UserError(f"the teacher's layer={layer}: must be last, mean, or from 0 to {most}")


def layer_of(output: Any, layer: Layer) -> Tensor:
    """Return the hidden states `(b, n, c)` of a layer from the output of a transformer."""
    states: Tensor = output.last_hidden_state
    if layer == "mean":
        states = torch.stack(output.hidden_states).mean(0)
    elif layer != "last":
        states = output.hidden_states[layer]
    return states
