"""The configuration: YAML groups, whole named runs in `experiment/`, and `compose`, which turns them into a run.

This is the one folder of the checkout with an `__init__.py`: Hydra finds YAML by `pkg://varitok.configs`.
"""

import json
import math
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from varitok import UserError

__all__: list[str] = []


def _downsample(encoder: Any) -> int:
    """Multiply an encoder's strides along its first axis: the samples, or frames, of a token."""
    encoder = encoder.get("network", encoder)  # that a nested encoder is around
    strides = [_first(stride) for stride in encoder.get("strides", [])]
    own = [_first(encoder.get(key, 1)) for key in ("hop_length", "patch", "resample")]
    return int(math.prod([*strides, *own, 2 ** int(encoder.get("wavelets", 0))]))


def _first(value: Any) -> int:
    return int(value) if isinstance(value, int) else int(value[0])


def _causal_pad(encoder: Any) -> int:
    """Count the copies of the first frame that a causal codec of clips puts before it."""
    return _downsample(encoder) - 1 if encoder.get("network", encoder).get("causal") else 0


def _of_bundle(folder: str | None, key: str) -> Any:
    """Look a value up in a bundle's config.json; `hop.0` is the first of a list."""
    if folder is None:
        raise UserError("tokenizer is required: give tokenizer=BUNDLE")
    path = Path(folder) / "config.json"
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        for part in key.split("."):
            found = found[int(part) if isinstance(found, list) else part]
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise UserError(f"tokenizer={folder}: no bundle is there, or its config.json has no {key}") from error
    return found


# In YAML, `${downsample:${codec.encoder}}`: data are cut in tokens, and only the encoder knows how long they are.
OmegaConf.register_new_resolver("downsample", _downsample, replace=True)
OmegaConf.register_new_resolver("bundle", _of_bundle, replace=True)
OmegaConf.register_new_resolver("causal_pad", _causal_pad, replace=True)
