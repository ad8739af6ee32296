"""Names of SEANet's layers in EnCodec and Mimi, by transformers' names, and what their shapes say."""

import re
from collections.abc import Iterator
from typing import Any

from torch import nn

from varitok.codecs.networks.conv_codec import ConvDecoder, ConvEncoder
from varitok.codecs.networks.layers.stages import ResidualUnit

from ..source import Source

__all__ = ["encoder_sizes", "seanet_names"]


def seanet_names(encoder: ConvEncoder, decoder: ConvDecoder) -> Iterator[tuple[str, str]]:
    """List the modules of an encoder and a decoder whose layers are numbered in the order of execution."""
    yield from _convolution("encoder.layers.0", "encoder.first", encoder.first)
    index = 1
    for level, stage in enumerate(encoder.stages):
        ours = f"encoder.stages.{level}"
        for number, unit in enumerate(stage.units):  # type: ignore[arg-type]
            yield from _unit(f"encoder.layers.{index}", f"{ours}.units.{number}", unit)
            index += 1
        yield from _convolution(f"encoder.layers.{index + 1}", f"{ours}.conv", stage.conv)  # type: ignore[arg-type]
        index += 2
    if encoder.inner is not None:
        yield f"encoder.layers.{index}.lstm", "encoder.inner"
        index += 1
    yield from _convolution(f"encoder.layers.{index + 1}", "encoder.last", encoder.last)

    yield from _convolution("decoder.layers.0", "decoder.first", decoder.first)
    index = 1
    if decoder.inner is not None:
        yield "decoder.layers.1.lstm", "decoder.inner"
        index += 1
    for level, stage in enumerate(decoder.stages):
        ours = f"decoder.stages.{level}"
        yield from _convolution(f"decoder.layers.{index + 1}", f"{ours}.conv", stage.conv)  # type: ignore[arg-type]
        index += 2
        for number, unit in enumerate(stage.units):  # type: ignore[arg-type]
            yield from _unit(f"decoder.layers.{index}", f"{ours}.units.{number}", unit)
            index += 1
    yield from _convolution(f"decoder.layers.{index + 1}", "decoder.last", decoder.last)


def _convolution(theirs: str, ours: str, layer: nn.Module) -> Iterator[tuple[str, str]]:
    yield f"{theirs}.conv", f"{ours}.layer"
    if layer.step_norm is not None:
        yield f"{theirs}.norm", f"{ours}.step_norm"


def _unit(theirs: str, ours: str, unit: ResidualUnit) -> Iterator[tuple[str, str]]:
    yield from _convolution(f"{theirs}.block.1", f"{ours}.wide", unit.wide)
    yield from _convolution(f"{theirs}.block.3", f"{ours}.pointwise", unit.pointwise)
    if unit.shortcut is not None:
        yield from _convolution(f"{theirs}.shortcut", f"{ours}.shortcut", unit.shortcut)


def encoder_sizes(source: Source) -> dict[str, Any]:
    """Read the encoder's sizes, by the names of `ConvEncoder`'s arguments, from tensors."""
    owners = {re.sub(r"\.(weight|weight_v|parametrizations\.weight\.original1)$", "", name) for name in source.shapes}
    plain = [name for name in owners if re.fullmatch(r"encoder\.layers\.\d+\.conv", name)]
    first, *stages, last = sorted(plain, key=lambda name: int(name.split(".")[2]))
    base, channels, kernel = source.weight_shape(first)
    shapes = [source.weight_shape(name) for name in stages]
    width, _, last_kernel = source.weight_shape(last)
    # Layer 1 is a stage's first residual unit: with EnCodec's single one, layer 3 is the strided convolution.
    units = int(stages[0].split(".")[2]) - 2
    hidden, _, residual_kernel = source.weight_shape("encoder.layers.1.block.1.conv")
    return {
        "width": width,
        "base": base,
        "strides": [shape[2] // 2 for shape in shapes],
        "channels": channels,
        "kernel": kernel,
        "last_kernel": last_kernel,
        "residual_kernel": residual_kernel,
        "dilations": [2**unit for unit in range(units)],
        "compress": base // hidden,
        "conv_shortcut": "encoder.layers.1.shortcut.conv" in owners,
        "norm": _norm(source, first),
    }


def _norm(source: Source, first: str) -> str:
    if f"{first.removesuffix('conv')}norm.weight" in source.shapes:
        return "group"
    return "none" if f"{first}.weight" in source.shapes else "weight"
