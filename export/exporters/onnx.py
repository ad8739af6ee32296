"""Export of a frozen codec to two ONNX graphs, or four if it can stream; a decoder that samples has a loop."""

import contextlib
import io
import logging
import warnings
from pathlib import Path
from typing import Any

import onnx
import torch
from onnx import TensorProto, helper
from torch import Tensor, nn

from varitok.codecs.modalities.base import GraphNames

from .frozen import FrozenCodec, FrozenGenerator, FrozenStream

__all__ = ["Port", "export_graph", "export_onnx"]

OPSET = 20  # from 23 on, the exporter emits a fused attention whose broadcast mask ONNX Runtime rejects


class _Method(nn.Module):
    """A module whose `forward` is one method of a frozen codec, as the exporter requires."""

    def __init__(self, codec: FrozenCodec, name: str) -> None:
        super().__init__()
        self.codec = codec
        self.name = name

    def forward(self, given: Tensor, state: Tensor | None = None) -> Any:
        method = getattr(self.codec, self.name)
        return method(given) if state is None else method(given, state)


class _Step(nn.Module):
    """A module whose `forward` is one step of a codec that samples."""

    def __init__(self, codec: FrozenGenerator) -> None:
        super().__init__()
        self.codec = codec

    def forward(self, codes: Tensor, sample: Tensor, state: Tensor, number: Tensor) -> tuple[Tensor, Tensor]:
        return self.codec.step(codes, sample, state, number)


Axes = list[str | None]  # names of a value's axes; None for an axis of fixed size


def export_onnx(codec: FrozenCodec, folder: Path, example: Tensor, metadata: dict[str, str], names: GraphNames) -> None:
    """Write `encoder_model.onnx` and `decoder_model.onnx`, and their `_streaming` variants if the codec can stream.

    The variants also have an input `state`, float32 `(batch, S)`, initially zeros, and an output `state_out`.

    Args:
        codec: Codec to export.
        folder: Folder of the graphs.
        example: Signals `(2, c, *grid)` in [-1, 1].
        metadata: Metadata of all graphs; `codec.role` is added.
        names: The modality's names of inputs, outputs and axes.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with torch.inference_mode():
        codes = codec.encode(example)
    # Example sizes are at least 2 and all different, so that the exporter takes none for a constant.
    axis = codec.layout.code_axis
    kept = codes.narrow(axis, 0, max(2, codes.shape[axis] - 1))
    kept = kept.repeat(3, *(1 for _ in codes.shape[1:]))[:5].clone()
    rows = "num_codebooks" if codes.shape[1] > 1 and not codes.is_floating_point() else None
    # With placed tokens all axes are free; with ordered tokens only the number of frames and blocks is.
    sides: Axes = list(names.axes)
    tokens: Axes = list(names.latent_axes)
    given: Axes = list(names.latent_axes)
    if codec.layout.ordered:
        blocks = codec.layout.code_axis - 2
        sides[blocks:] = [None] * (len(sides) - blocks)
        tokens[blocks:], given[blocks:] = [None], ["num_tokens"]
    back = [side and f"{side}_out" for side in sides]
    signal: Port = (names.signal, ["batch", None, *sides])
    found: Port = (names.codes, ["batch", None, *tokens])
    read: Port = (names.codes, ["batch", rows, *given])
    painted: Port = (names.back, ["batch", None, *back])
    encoder, decoder = (metadata | {"codec.role": role} for role in ("encoder", "decoder"))
    export_graph(_Method(codec, "encode"), [example], folder / "encoder_model.onnx", [signal], [found], encoder)
    if isinstance(codec, FrozenGenerator):
        noised: Port = ("noise", ["batch", None, *sides])
        _export_sampler(codec, kept, folder / "decoder_model.onnx", [read, noised], painted, decoder)
    else:
        export_graph(_Method(codec, "decode"), [kept], folder / "decoder_model.onnx", [read], [painted], decoder)
    if isinstance(codec, FrozenStream):
        size = "state_size" if codec.layout.free_sides else None  # grows with the frame size
        before: Port = ("state", ["batch", size])
        after: Port = ("state_out", ["batch", size])
        sizes = codec.state_sizes(*codes.shape[3:])
        state = torch.zeros(len(example), sizes[0])
        path = folder / "encoder_model_streaming.onnx"
        export_graph(_Method(codec, "encode_chunk"), [example, state], path, [signal, before], [found, after], encoder)
        state = torch.zeros(len(kept), sizes[1])
        path = folder / "decoder_model_streaming.onnx"
        export_graph(_Method(codec, "decode_chunk"), [kept, state], path, [read, before], [painted, after], decoder)


Port = tuple[str, Axes]


def export_graph(
    module: nn.Module,
    examples: list[Tensor],
    path: Path,
    sources: list[Port],
    targets: list[Port],
    metadata: dict[str, str],
) -> None:
    """Export one graph; a port is the name of an input or output, with the names of its free axes."""
    _save(_translate(module, examples, sources, targets), path, sources, targets, metadata)


def _export_sampler(
    codec: FrozenGenerator, codes: Tensor, path: Path, sources: list[Port], target: Port, metadata: dict[str, str]
) -> None:
    """Export the graph of a decoder that samples from codes and noise: a loop over a step, with its weights once."""
    noise = codec.noise.expand(len(codes), *codec.noise.shape[1:]).clone()
    carried: list[Port] = [("sample", sources[1][1]), ("state", sources[1][1])]
    after: list[Port] = [("sample_out", target[1]), ("state_out", target[1])]
    examples = [codes, noise, torch.zeros_like(noise), torch.tensor(0)]
    step = _translate(_Step(codec), examples, [sources[0], *carried, ("number", [])], after)
    _save(_repeat(step, codec.steps, sources[1][0], target[0]), path, sources, [target], metadata)


def _repeat(step: onnx.ModelProto, count: int, begin: str, end: str) -> onnx.ModelProto:
    """Return a model that runs a step `count` times, in a Loop.

    Args:
        step: A model with four inputs, the second and third carried from step to step as its two outputs, the third
            from zeros on; the last is the number of the step.
        count: Number of steps.
        begin: Name of the input that is the first sample.
        end: Name of the output, the last sample.
    """
    given, sample, state, number = step.graph.input
    more, again = (helper.make_tensor_value_info(name, TensorProto.BOOL, []) for name in ("more", "again"))
    nodes = [
        helper.make_node("Sub", [begin, begin], ["zeros"]),
        helper.make_node("Loop", ["count", "", begin, "zeros"], [end, "state_end"], body=step.graph),
    ]
    body = nodes[1].attribute[0].g
    del body.input[:]
    body.input.extend([number, more, sample, state])
    body.node.append(helper.make_node("Identity", [more.name], [again.name]))
    body.output.insert(0, again)
    first, last = (helper.make_value_info(name, port.type) for name, port in ((begin, sample), (end, body.output[1])))
    number_of_steps = helper.make_tensor("count", TensorProto.INT64, [], [count])
    graph = helper.make_graph(nodes, "sampler", [given, first], [last], [number_of_steps])
    return helper.make_model(
        graph, opset_imports=step.opset_import, functions=step.functions, ir_version=step.ir_version
    )


def _translate(module: nn.Module, examples: list[Tensor], sources: list[Port], targets: list[Port]) -> onnx.ModelProto:
    """Translate a module to ONNX, without traces of this machine."""
    dynamic = tuple({axis: name for axis, name in enumerate(axes) if name} for _, axes in sources)
    with _quiet(), torch.no_grad():
        program = torch.onnx.export(
            module.eval(),
            tuple(examples),
            input_names=[name for name, _ in sources],
            output_names=[name for name, _ in targets],
            dynamic_shapes=dynamic,
            opset_version=OPSET,
            dynamo=True,
            external_data=False,
            verbose=False,
        )
    assert program is not None
    model = program.model_proto
    _clean(model)
    return model


def _save(
    model: onnx.ModelProto, path: Path, sources: list[Port], targets: list[Port], metadata: dict[str, str]
) -> None:
    """Save a model with names of its free axes, and metadata."""
    for value, (_, axes) in zip((*model.graph.input, *model.graph.output), (*sources, *targets), strict=True):
        _name_axes(value, axes)
    onnx.helper.set_model_props(model, metadata)
    onnx.checker.check_model(model, full_check=True)
    onnx.save(model, path)


@contextlib.contextmanager
def _quiet():  # type: ignore[no-untyped-def]
    """Silence the exporter, which prints its progress and logs its versions."""
    level = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(level)


def _clean(model: onnx.ModelProto) -> None:
    """Remove traces of this machine: the exporter writes stack traces with paths and source lines into nodes."""
    for holder in (model.graph, *model.functions):
        del holder.metadata_props[:]
        holder.doc_string = ""
        for node in holder.node:
            del node.metadata_props[:]
            node.doc_string = ""
    for value in (*model.graph.value_info, *model.graph.input, *model.graph.output, *model.graph.initializer):
        del value.metadata_props[:]
        value.doc_string = ""
    del model.graph.value_info[:]  # inferred shapes use the exporter's own names of axes


def _name_axes(value: onnx.ValueInfoProto, names: list[str | None]) -> None:
    """Name the free axes of an input or output."""
    for dimension, name in zip(value.type.tensor_type.shape.dim, names, strict=True):
        if name:
            dimension.Clear()
            dimension.dim_param = name
