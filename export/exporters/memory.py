"""How much memory a graph's activations take, from the shapes that they have at a few sizes of signals."""

import math
from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import onnxruntime

from ..runtime.bundle import DECODER, ENCODER, Bundle

__all__ = ["measure_memory"]

STEPS = (2, 3, 5)  # of the axis that is varied
VIEWS = ("Reshape", "Squeeze", "Unsqueeze", "Flatten", "Identity")  # their output is their input's memory

Coefficients = npt.NDArray[np.float64]


def measure_memory(bundle: Bundle) -> dict[str, list[float]]:
    """Return the memory of a bundle's encoder and decoder as `[w, p, q]`: bytes = w + m n (p + q n) at the peak.

    w is the graph's size, that is its weights. For images and frames of any size, n is the area and m the number of
    frames; else n is the length and m the area. Empty if all signals have one size.
    """
    if not (bundle.splits or bundle.axes > 1):
        return {}
    hops, codes = bundle.hops, np.int64 if bundle.codebook_sizes else np.float32
    grows = bundle.axes == len(hops) > 1
    inputs, lengths = [], []
    for steps in STEPS:
        grid = (2, steps, 2)[-bundle.axes :] if grows else (steps, bundle.tokens)[: bundle.axes]
        sides = [count * hop for count, hop in zip(grid, hops, strict=False)][: len(grid) if grows else 1]
        lengths.append(sides[-2 if grows else 0])
        sides = [sides[0] - bundle.causal_pad, *sides[1:], *(getattr(bundle, "frame_size", None) or ())]
        inputs.append((np.zeros((1, bundle.channels, *sides), np.float32), np.zeros((1, bundle.rows, *grid), codes)))
    width = 2 * hops[-1] if grows else 1
    frames = 2 * hops[0] if bundle.axes == 3 else 1
    fixed = frames * width if grows else math.prod(inputs[0][0].shape[3:])
    found = {}
    for name, path, values in zip(("encoder", "decoder"), (ENCODER, DECODER), zip(*inputs, strict=True), strict=True):
        graph = bundle.folder / path
        linear, quadratic = _peak(onnx.load(graph), values, lengths) / fixed
        found[name] = [graph.stat().st_size, float(linear), float(quadratic) / width]
    return found


def _peak(model: onnx.ModelProto, values: Sequence[npt.NDArray[Any]], lengths: Sequence[int]) -> Coefficients:
    """Return the largest sums of linear and of quadratic terms of the live activations' bytes."""
    bytes_of = _bytes(model, values, lengths)
    nodes, last, whole = model.graph.node, dict[str, int](), dict[str, str]()
    for index, node in enumerate(nodes):
        if node.op_type in VIEWS:
            whole[node.output[0]] = whole.get(node.input[0], node.input[0])
        last |= {whole.get(name, name): index for name in (*node.output, *node.input)}
    ends = defaultdict[int, list[str]](list)
    for name, index in last.items():
        ends[index].append(name)
    live, peak = np.zeros(2), np.zeros(2)
    for index, node in enumerate(nodes):
        live += sum(bytes_of[name] for name in node.output if name and name not in whole)
        scratch = bytes_of[node.output[0]] * _columns(model, node) if node.op_type == "ConvTranspose" else 0
        peak = np.maximum(peak, live + scratch)
        live -= sum(bytes_of[name] for name in ends[index] if name in bytes_of)
    return peak


def _columns(model: onnx.ModelProto, node: onnx.NodeProto) -> float:
    """Return how many times a transposed convolution's output ONNX Runtime takes beside it: kernel / stride."""
    about = {attribute.name: list(attribute.ints) for attribute in node.attribute}
    return float(np.prod(about.get("kernel_shape", [2])) / np.prod(about.get("strides", [1])))


def _bytes(
    model: onnx.ModelProto, values: Sequence[npt.NDArray[Any]], lengths: Sequence[int]
) -> dict[str, Coefficients]:
    """Return the bytes of each activation as coefficients of n and n^2, at least 0."""
    watched = onnx.ModelProto()
    watched.CopyFrom(model)
    names = [name for node in model.graph.node for name in node.output if name]
    del watched.graph.output[:]
    watched.graph.output.extend(onnx.ValueInfoProto(name=name) for name in names)
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = onnxruntime.InferenceSession(watched.SerializeToString(), options, providers=["CPUExecutionProvider"])
    given = session.get_inputs()[0].name
    table = [[found.nbytes for found in session.run(names, {given: one})] for one in values]
    _, *terms = np.linalg.solve(np.vander(lengths, increasing=True), np.array(table, float))
    return {name: np.clip(both, 0, None) for name, both in zip(names, np.stack(terms, axis=1), strict=True)}
