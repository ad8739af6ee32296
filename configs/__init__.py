"""The configuration: YAML groups, whole named runs in `experiment/`, and `compose`, which turns them into a run.

This is the one folder of the checkout with an `__init__.py`: Hydra finds YAML by `pkg://varitok.configs`.
"""

import math
from typing import Any

from omegaconf import OmegaConf

__all__: list[str] = []


def _hop(encoder: Any) -> int:
    """Multiply an encoder's strides along its first axis: the samples, or frames, of a token."""
    encoder = encoder.get("network", encoder)  # that a nested encoder is around
    strides = [_first(stride) for stride in encoder.get("strides", [])]
    own = [_first(encoder.get(key, 1)) for key in ("hop", "patch", "resample")]
    return int(math.prod([*strides, *own, 2 ** int(encoder.get("wavelets", 0))]))


def _first(value: Any) -> int:
    return int(value) if isinstance(value, int) else int(value[0])


def _lead(encoder: Any) -> int:
    """Count the copies of the first frame that a causal codec of clips puts before it."""
    return _hop(encoder) - 1 if encoder.get("network", encoder).get("causal") else 0


# In YAML, `${hop:${codec.encoder}}`: data are cut in tokens, and only the encoder knows how long they are.
OmegaConf.register_new_resolver("hop", _hop, replace=True)
OmegaConf.register_new_resolver("lead", _lead, replace=True)
