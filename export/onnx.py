"""A frozen codec as two ONNX graphs."""

import contextlib
import io
import logging
import warnings
from pathlib import Path
from typing import NamedTuple

import onnx
import torch
from torch import Tensor, nn

from .frozen import FrozenCodec

__all__ = ["NAMES", "Names", "export_onnx"]

OPSET = 20  # from 23 on the exporter emits a fused attention whose broadcast mask ONNX Runtime refuses


class _Encoder(nn.Module):
    def __init__(self, codec: FrozenCodec) -> None:
        super().__init__()
        self.codec = codec

    def forward(self, signal: Tensor) -> Tensor:
        return self.codec.encode(signal)


class _Decoder(nn.Module):
    def __init__(self, codec: FrozenCodec) -> None:
        super().__init__()
        self.codec = codec

    def forward(self, codes: Tensor) -> Tensor:
        return self.codec.decode(codes)


class Names(NamedTuple):
    """What the ecosystem's libraries call a modality's graph inputs and outputs.

    Attributes:
        signal: Into the encoder.
        codes: Out of it and into the decoder.
        back: Out of the decoder.
    """

    signal: str
    codes: str
    back: str


NAMES = {
    "image": Names("pixel_values", "image_codes", "reconstruction"),
    "audio": Names("input_values", "audio_codes", "audio_values"),
}


def export_onnx(codec: FrozenCodec, folder: Path, example: Tensor, metadata: dict[str, str], names: Names) -> None:
    """Write `encoder_model.onnx` and `decoder_model.onnx`.

    Args:
        codec: What is exported.
        folder: Where to.
        example: Signals `(2, c, *grid)` in [-1, 1].
        metadata: Goes into both graphs, with `codec.role` added.
        names: Of inputs and outputs.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with torch.inference_mode():
        codes = codec.encode(example)
    # Example sizes are 2 or more and all different, so that none is taken for a constant.
    kept = codes[..., : max(2, codes.shape[-1] - 1)].repeat(3, 1, 1)[:5].clone()
    books = "num_codebooks" if codes.shape[1] > 1 and not codes.is_floating_point() else None
    if codec.ordered:
        sides: list[str | None] = [None] * (example.ndim - 2)
        tokens, given, back = None, "num_tokens", sides
    else:
        sides, tokens, given, back = ["num_samples"], "num_frames", "num_frames", ["num_samples_out"]
    _export(
        _Encoder(codec),
        example,
        folder / "encoder_model.onnx",
        (names.signal, ["batch", None, *sides]),
        (names.codes, ["batch", None, tokens]),
        metadata | {"codec.role": "encoder"},
    )
    _export(
        _Decoder(codec),
        kept,
        folder / "decoder_model.onnx",
        (names.codes, ["batch", books, given]),
        (names.back, ["batch", None, *back]),
        metadata | {"codec.role": "decoder"},
    )


Port = tuple[str, list[str | None]]


def _export(
    module: nn.Module, example: Tensor, path: Path, source: Port, target: Port, metadata: dict[str, str]
) -> None:
    """Export one direction; a port is a name and the names of its free axes."""
    dynamic = {axis: name for axis, name in enumerate(source[1]) if name}
    with _quiet(), torch.no_grad():
        program = torch.onnx.export(
            module.eval(),
            (example,),
            input_names=[source[0]],
            output_names=[target[0]],
            dynamic_shapes=(dynamic,),
            opset_version=OPSET,
            dynamo=True,
            external_data=False,
            verbose=False,
        )
    assert program is not None
    model = program.model_proto
    _clean(model)
    _name_axes(model.graph.input[0], source[1])
    _name_axes(model.graph.output[0], target[1])
    onnx.helper.set_model_props(model, metadata)
    onnx.checker.check_model(model, full_check=True)
    onnx.save(model, path)


@contextlib.contextmanager
def _quiet():  # type: ignore[no-untyped-def]
    """Silence the exporter, which tells its progress on stdout and its versions in the log."""
    level = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(level)


def _clean(model: onnx.ModelProto) -> None:
    """Remove what tells of this machine: the exporter writes stack traces with paths and source lines into nodes."""
    for holder in (model.graph, *model.functions):
        del holder.metadata_props[:]
        holder.doc_string = ""
        for node in holder.node:
            del node.metadata_props[:]
            node.doc_string = ""
    for value in (*model.graph.value_info, *model.graph.input, *model.graph.output, *model.graph.initializer):
        del value.metadata_props[:]
        value.doc_string = ""
    del model.graph.value_info[:]  # inferred shapes speak of the exporter's own names of sizes


def _name_axes(value: onnx.ValueInfoProto, names: list[str | None]) -> None:
    """Give the free axes their names."""
    for dimension, name in zip(value.type.tensor_type.shape.dim, names, strict=True):
        if name:
            dimension.Clear()
            dimension.dim_param = name
