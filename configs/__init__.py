"""The configuration: YAML groups, complete runs in `experiment/`, and resolvers for interpolations in YAML.

This is the only folder of the checkout with an `__init__.py`: Hydra finds YAML by `pkg://varitok.configs`.
"""

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from varitok import UserError

__all__: list[str] = []


def _downsample(encoder: Any) -> int:
    """Return an encoder's downsampling factor along its first axis: samples or frames per token."""
    encoder = encoder.get("network", encoder)  # the inner one of a nested encoder
    strides = [_first(stride, "strides") for stride in encoder.get("strides", [])]
    own = [_first(encoder.get(key, 1), key) for key in ("hop_length", "patch", "resample")]
    wavelets = _first(encoder.get("wavelets", 0), "wavelets")
    return math.prod([*strides, *own, 2 ** max(0, min(wavelets, 30))])  # the encoder itself refuses others


def _first(value: Any, key: str) -> int:
    """Return a whole number, or the first of a list, of the encoder's `key`."""
    number = value[0] if isinstance(value, Sequence) and value else value
    try:
        return int(number)
    except (TypeError, ValueError, OverflowError) as error:  # null, nan, inf
        raise UserError(f"codec.encoder.{key}: expected whole numbers, got {value}") from error


def _causal_pad(encoder: Any) -> int:
    """Return the number of copies of the first frame that a causal video codec prepends."""
    return _downsample(encoder) - 1 if encoder.get("network", encoder).get("causal") else 0


def _required(key: str, value: str) -> Any:
    """Refuse a configuration that lacks a key: OmegaConf's `???` wouldn't replace a default of null."""
    raise UserError(f"{key} is required: give {key}={value}")


def _embedded(name: str) -> str:
    """Return the folder of the files of one kind that come with varitok."""
    return str(Path(__file__).parents[1] / "data" / "embedded" / name)


def _of_bundle(folder: str | None, key: str) -> Any:
    """Return a value of a bundle's config.json by its dotted key; `hop.0` is the first item of a list."""
    if not folder:
        raise UserError("tokenizer is required: give tokenizer=BUNDLE")
    path = Path(folder) / "config.json"
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        for part in key.split("."):
            found = found[int(part) if isinstance(found, list) else part]
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise UserError(f"tokenizer={folder}: not a bundle, or its config.json has no {key}") from error
    return found


# In YAML, `${downsample:${codec.encoder}}`: crop lengths are in tokens, whose length depends on the encoder.
OmegaConf.register_new_resolver("downsample", _downsample, replace=True)
OmegaConf.register_new_resolver("embedded", _embedded, replace=True)
OmegaConf.register_new_resolver("bundle", _of_bundle, replace=True)
OmegaConf.register_new_resolver("required", _required, replace=True)
OmegaConf.register_new_resolver("causal_pad", _causal_pad, replace=True)
