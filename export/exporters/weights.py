"""Weights of fewer bits: smaller files, whose codes and signals are still those of the exported codec.

Weights are rounded before the export. So the parity gate compares every file with the rounded codec, and files agree as
those of any bundle do. What rounding costs shows `varitok compare BUNDLE`.
"""

import copy
from pathlib import Path

import numpy as np
import onnx
import torch
from onnx import numpy_helper
from torch import Tensor

from varitok import UserError
from varitok.codecs.codec import Codec

from .frozen import fold

__all__ = ["WEIGHTS", "pack_graphs", "round_weights", "smallest"]

WEIGHTS = ("float32", "float16", "int8")
LEAST = 256  # elements of a tensor that is rounded; biases and norms aren't
TOP = 127.0


def round_weights(codec: Codec, weights: str) -> Codec:
    """Return a codec whose matrices and kernels have the values of a smaller type; codebooks keep theirs.

    `int8` has a scale for each row, the first axis, that is a power of two: so its values are also exact in float16.

    Args:
        codec: The codec, which `float32` returns itself; it isn't changed.
        weights: A name in `WEIGHTS`.

    Raises:
        UserError: The name is unknown.
    """
    if weights not in WEIGHTS:
        raise UserError(f"weights: {weights} is not known; known are {', '.join(WEIGHTS)}")
    if weights == "float32":
        return codec
    codec = copy.deepcopy(codec)
    for module in codec.modules():
        fold(module)
    quantizer = {id(parameter) for parameter in codec.bottleneck.parameters()}
    for parameter in codec.parameters():
        if parameter.dim() > 1 and parameter.numel() >= LEAST and id(parameter) not in quantizer:
            value = parameter.detach().float()
            parameter.data = value.half().float() if weights == "float16" else _rounded_rows(value)
    return codec


def _rounded_rows(value: Tensor) -> Tensor:
    """Round each row to whole multiples, at most 127, of a power of two."""
    scale = torch.from_numpy(_scales(value.numpy(), axis=0))
    return (value / scale).round() * scale


def _scales(value: np.ndarray, axis: int, top: float = TOP) -> np.ndarray:
    """Return the least power of two for each index of an axis whose values are at most `top` times it; keep axes."""
    others = tuple(i for i in range(value.ndim) if i != axis)
    largest = np.abs(value).max(axis=others, keepdims=True)
    exponents = np.ceil(np.log2(np.where(largest > 0, largest, top) / top))
    return np.exp2(exponents).astype(value.dtype)


def smallest(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Convert the tensors of a state that float16 represents exactly to it; whoever loads them converts them back."""
    return {name: _halved(value) for name, value in state.items()}


def _halved(value: Tensor) -> Tensor:
    halved = value.half()
    exact = value.dtype == torch.float32 and value.numel() >= LEAST and torch.equal(halved.float(), value)
    return halved if exact else value


def pack_graphs(folder: Path) -> None:
    """Store the weights of a folder's graphs that int8 or float16 represent exactly as these; int16 those of float64.

    The graphs convert them back, which ONNX Runtime does once, when it loads them.
    """
    for path in sorted(folder.glob("*.onnx")):
        model = onnx.load(path)
        _pack(model.graph)
        onnx.checker.check_model(model, full_check=True)
        onnx.save(model, path)


def _pack(graph: onnx.GraphProto) -> None:
    weights, nodes = [], []
    for weight in graph.initializer:
        value = numpy_helper.to_array(weight)
        large = value.dtype in (np.float32, np.float64) and value.size >= LEAST
        stored, made = _packed(weight.name, value) if large else ([weight], [])
        weights += stored or [weight]
        nodes += made
    nodes += graph.node
    for node in graph.node:
        for attribute in node.attribute:
            if attribute.HasField("g"):  # the body of a loop
                _pack(attribute.g)
    del graph.initializer[:], graph.node[:]
    graph.initializer.extend(weights)
    graph.node.extend(nodes)


def _packed(name: str, value: np.ndarray) -> tuple[list[onnx.TensorProto], list[onnx.NodeProto]]:
    """Return the tensors and nodes that make a weight; none if neither type represents it exactly."""
    small, whole, scale = (f"{name}.{part}" for part in ("stored", "whole", "scale"))
    double = value.dtype == np.float64
    target = onnx.TensorProto.DOUBLE if double else onnx.TensorProto.FLOAT
    for kind in (np.int8, np.int16) if double else (np.int8,):
        for axis in range(value.ndim):
            scales = _scales(value, axis, float(np.iinfo(kind).max))
            if np.array_equal(found := value / scales, np.rint(found)):
                stored = [numpy_helper.from_array(found.astype(kind), small), numpy_helper.from_array(scales, scale)]
                cast = onnx.helper.make_node("Cast", [small], [whole], to=target)
                return stored, [cast, onnx.helper.make_node("Mul", [whole, scale], [name])]
    halved = value.astype(np.float16)
    if not double and np.array_equal(halved.astype(np.float32), value):
        return [numpy_helper.from_array(halved, small)], [onnx.helper.make_node("Cast", [small], [name], to=target)]
    return [], []
