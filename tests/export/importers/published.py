"""Weights as they are published, made from a codec of ours: the inverse of an import."""

from typing import Any

import torch
from torch import Tensor

from varitok.codecs.bottlenecks.statistics import MovingCodebook
from varitok.codecs.build import build_codec
from varitok.codecs.codec import Codec
from varitok.codecs.networks.layers.recurrent import Recurrent
from varitok.export.importers.registry import FAMILIES

from ...composing import composed

NARROW = (
    "codec.encoder.base=4",
    "codec.encoder.width=16",
    "codec.encoder.inner.width=64",
    "bottleneck.num_codebooks=3",
    "bottleneck.level.dim=16",
    "bottleneck.level.codebook_size=32",
)
CONFIG: dict[str, Any] = {  # the config.json of transformers' model of this size
    "audio_channels": 1,
    "codebook_dim": 16,
    "codebook_size": 32,
    "hidden_size": 16,
    "num_filters": 4,
    "sampling_rate": 24000,
    "upsampling_ratios": [8, 5, 4, 2],
    "use_causal_conv": True,
}


def narrow_codec(*overrides: str) -> Codec:
    """Build a narrow EnCodec."""
    torch.manual_seed(0)
    codec = build_codec(composed("experiment=audio/encodec", *NARROW, *overrides)).eval()
    for name, value in codec.state_dict().items():
        if name.endswith("entries"):
            value.copy_(0.1 * torch.randn(value.shape))
    return codec


def published(codec: Codec) -> dict[str, Tensor]:
    """Return the state dict of EnCodec in transformers, before torch's parametrizations."""
    found: dict[str, Tensor] = {}
    for theirs, ours in FAMILIES["encodec"].names(codec):
        module = codec.get_submodule(ours)
        state = {name: value.clone() for name, value in module.state_dict().items()}
        if isinstance(module, Recurrent):
            for level, layer in enumerate(module.onward):
                for name, value in layer.lstm.state_dict().items():  # type: ignore[union-attr]
                    found[f"{theirs}.{name.removesuffix('0')}{level}"] = value.clone()
        elif isinstance(module, MovingCodebook):
            found[f"{theirs}.embed"], found[f"{theirs}.embed_avg"] = state["entries"], state["sums"]
            found |= {f"{theirs}.cluster_size": state["counts"], f"{theirs}.inited": torch.ones(1)}
        else:
            found[f"{theirs}.bias"] = state["bias"]
            found[f"{theirs}.weight_g"] = state["parametrizations.weight.original0"]
            found[f"{theirs}.weight_v"] = state["parametrizations.weight.original1"]
    return found
