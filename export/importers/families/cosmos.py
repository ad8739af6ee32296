"""Cosmos' image tokenizers CI and DI (arXiv 2501.03575), by the tensors of Cosmos-Tokenizer.

Their files are TorchScript, which is code. Save the state dict of a loaded one, and import that.
"""

from functools import partial

import torch
from torch import Tensor

from ..derive import Derived, derive
from ..family import Family, Layout, Sizes
from ..source import Source
from .resnet import TAMING, resnet_names, resnet_sizes, unify

__all__ = ["FAMILIES"]

LEVELS = 2  # of the Haar transform
FIRST, LAST = "encoder.conv_in.weight", "decoder.conv_out"


def _to_our_bands(tensor: Tensor, axis: int, scale: float) -> Tensor:
    """Reorder and scale the channels of a Haar transform along an axis.

    Theirs are grouped by the second level's band, the first level's, then the color, ours the other way round. Of the
    two mixed bands, theirs has rows first. Their transform halves at each level, ours keeps the norm.
    """
    order = torch.arange(tensor.shape[axis]).reshape(*[4] * LEVELS, -1)
    for level in range(LEVELS):
        order = order.index_select(level, torch.tensor([0, 2, 1, 3]))
    order = order.permute(*range(LEVELS, -1, -1)).flatten().to(tensor.device)
    return tensor.index_select(axis, order) * scale


def _prepare(source: Source) -> Source:
    source = unify(source)
    if not _has_bands(source):
        return source
    into, out = partial(_to_our_bands, axis=1, scale=0.5**LEVELS), partial(_to_our_bands, axis=0, scale=2.0**LEVELS)
    changes = {FIRST: into, f"{LAST}.weight": out, f"{LAST}.bias": out}
    return derive(source, {name: Derived((name,), how) for name, how in changes.items()})


def _has_bands(source: Source) -> bool:
    """Return whether the first convolution's input is a Haar transform; other families have the same names."""
    channels = source.shapes.get(FIRST, (0, 1))[1]
    return bool(channels % 4**LEVELS == 0)


def _sizes(source: Source) -> Sizes:
    values, _ = resnet_sizes(source)
    if not _has_bands(source):
        return Sizes(values | {"codec.encoder.wavelets": 0}, {})
    dim = source.shapes.get("quant_conv.weight", (0,))[0]
    channels = values["codec.encoder.channels"] // 4**LEVELS
    values |= {"codec.encoder.channels": channels, "codec.encoder.wavelets": LEVELS, "bottleneck.dim": dim}
    return Sizes(values, {})


def _discrete_sizes(source: Source) -> Sizes:
    values = _sizes(source).values
    # Finite scalar quantization has no tensor; the number of its dimensions is that of the map before it.
    levels = {6: [8, 8, 8, 5, 5, 5]}.get(values.pop("bottleneck.dim", 0), [])
    return Sizes(values | {"bottleneck.levels": levels}, {})


LAYOUTS = (Layout("Cosmos-Tokenizer", "encoder.down.0.block.0.norm1.weight", TAMING),)
IGNORED = (r".*\.(_arange|wavelets)", r"(quantizer|inv_quant)\..*", r"distribution\..*")
FAMILIES = (
    Family(
        "cosmos_ci",
        "Cosmos' continuous image tokenizer",
        "image/cosmos_ci",
        LAYOUTS,
        _sizes,
        resnet_names,
        fixed={},
        marks={"codec.encoder.wavelets": LEVELS, "bottleneck.dim": 16},
        ignored=IGNORED,
        prepare=_prepare,
    ),
    Family(
        "cosmos_di",
        "Cosmos' discrete image tokenizer",
        "image/cosmos_di",
        LAYOUTS,
        _discrete_sizes,
        resnet_names,
        fixed={},
        marks={"codec.encoder.wavelets": LEVELS, "bottleneck.levels": [8, 8, 8, 5, 5, 5]},
        ignored=IGNORED,
        prepare=_prepare,
    ),
)
