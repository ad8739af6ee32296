"""The configuration: YAML groups, whole named runs in `experiment/`, and `compose`, which turns them into a run.

This is the one folder of the checkout with an `__init__.py`: Hydra finds YAML by `pkg://varitok.configs`.
"""

import math
from typing import Any

from omegaconf import OmegaConf

__all__: list[str] = []


def _hop(encoder: Any) -> int:
    """Multiply an encoder's strides along its first axis: the samples of a token."""
    strides = [stride if isinstance(stride, int) else stride[0] for stride in encoder.get("strides", [])]
    return math.prod([*strides, *(int(encoder.get(key, 1)) for key in ("hop", "patch", "resample"))])


# In YAML, `${hop:${codec.encoder}}`: data are cut in tokens, and only the encoder knows how long they are.
OmegaConf.register_new_resolver("hop", _hop, replace=True)
