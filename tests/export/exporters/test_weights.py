"""A bundle of rounded weights is smaller, and all of its files agree on what the rounded codec computes."""

import json

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from onnx import numpy_helper

import varitok
from varitok import UserError
from varitok.codecs.build import build_codec
from varitok.export.exporters.bundle import architecture, export_bundle
from varitok.export.exporters.rebuild import rebuild
from varitok.export.exporters.weights import pack_graphs, round_weights

from ...codecs.examples import SIZE, tiled_codec, tiny_codec
from ..conftest import awake, configuration

TYPES = {"float16": onnx.TensorProto.FLOAT16, "int8": onnx.TensorProto.INT8}


@pytest.mark.parametrize("weights", ["int8", pytest.param("float16", marks=pytest.mark.slow)])
def test_files_are_smaller_and_agree(weights, tmp_path):
    config = configuration("vq_cosine", "truncate")
    for side in ("encoder", "decoder"):
        config.codec[side].width = 32
    torch.manual_seed(0)
    codec = build_codec(config)
    settings = {"architecture": architecture(config), "formats": ["safetensors", "onnx"], "weights": weights}
    report = export_bundle(codec, tmp_path / "bundle", **settings)
    assert all(parity["codes_equal"] == 1 for parity in report["parity"].values())
    assert json.loads((tmp_path / "bundle/config.json").read_text())["weights"] == weights
    whole = 4 * sum(parameter.numel() for parameter in codec.parameters())
    assert report["files"]["model.safetensors"]["bytes"] < 0.65 * whole
    graph = onnx.load(tmp_path / "bundle/onnx/encoder_model.onnx").graph
    found = {value.name: value.data_type for value in graph.initializer if np.prod(value.dims) > 1000}
    assert TYPES[weights] in found.values() and onnx.TensorProto.FLOAT not in found.values()
    pixels = np.random.default_rng(0).integers(0, 256, (5, SIZE, SIZE, 3), dtype=np.uint8)
    bundle, rebuilt = varitok.load(tmp_path / "bundle"), rebuild(tmp_path / "bundle")
    assert next(rebuilt.parameters()).dtype == torch.float32
    assert np.array_equal(bundle.encode(pixels), rebuilt.encode(torch.from_numpy(bundle.values(pixels))).numpy())


@pytest.mark.parametrize("weights", TYPES)
def test_rounding_is_close_and_leaves_codebooks_and_the_codec_alone(weights):
    codec = awake(tiled_codec())
    before = {name: value.clone() for name, value in codec.state_dict().items()}
    rounded = round_weights(codec, weights)
    assert all(torch.equal(value, before[name]) for name, value in codec.state_dict().items())
    for name, value in rounded.bottleneck.state_dict().items():
        assert torch.equal(value, before[f"bottleneck.{name}"])
    with torch.no_grad():
        signal = torch.rand(2, 3, 16, 16) * 2 - 1
        exact, close = (each.decoder(each.encoder(signal), None, [2, 2]) for each in (codec, rounded))
    assert 0 < (exact - close).abs().mean() < 0.1 * exact.std()


@given(
    arrays.arrays(
        np.float32,
        arrays.array_shapes(min_dims=2, max_dims=4, min_side=1, max_side=6),
        elements=st.floats(-1e4, 1e4, width=32),
    ),
    st.sampled_from(["float16", "int8"]),
    st.booleans(),
)
def test_any_rounded_weight_is_packed_without_loss(tmp_path_factory, value, weights, turned):
    value = np.tile(value, (1, 256) + (1,) * (value.ndim - 2))
    layer = torch.nn.ParameterList([torch.nn.Parameter(torch.from_numpy(value))])
    layer.bottleneck = torch.nn.Module()
    rounded = round_weights(layer, weights)[0].detach().numpy()
    if turned:  # as exporters do with matrices
        rounded = np.ascontiguousarray(np.swapaxes(rounded, 0, 1))
    folder = tmp_path_factory.mktemp("graph")
    node = onnx.helper.make_node("Identity", ["w"], ["out"])
    graph = [node], "g", [], [_port("out", "FLOAT", rounded.shape)], [numpy_helper.from_array(rounded, "w")]
    _save(onnx.helper.make_graph(*graph), folder)
    pack_graphs(folder)
    packed = onnx.load(folder / "g.onnx").graph.initializer
    assert packed[0].data_type in TYPES.values()
    (back,) = onnxruntime.InferenceSession(folder / "g.onnx").run(None, {})
    assert np.array_equal(back, rounded)


@given(st.integers(0, 2**32 - 1), st.sampled_from([40, 30000]), st.booleans())
def test_fixed_point_weights_of_float64_are_packed_as_integers(tmp_path_factory, seed, top, turned):
    whole = np.random.default_rng(seed).integers(-top, top, (9, 40))
    value = (whole.T if turned else whole) * 2.0**-12
    folder = tmp_path_factory.mktemp("graph")
    node = onnx.helper.make_node("Identity", ["w"], ["out"])
    graph = [node], "g", [], [_port("out", "DOUBLE", value.shape)], [numpy_helper.from_array(value, "w")]
    _save(onnx.helper.make_graph(*graph), folder)
    pack_graphs(folder)
    kinds = onnx.TensorProto.INT8, onnx.TensorProto.INT16
    assert onnx.load(folder / "g.onnx").graph.initializer[0].data_type == kinds[top > 40]
    (back,) = onnxruntime.InferenceSession(folder / "g.onnx").run(None, {})
    assert np.array_equal(back, value)


def test_weights_in_a_loop_are_packed(tmp_path):
    """A decoder that samples has its weights there."""
    weight = np.arange(-128, 128, dtype=np.float32).reshape(16, 16) / 256
    body = onnx.helper.make_graph(
        [onnx.helper.make_node("MatMul", ["x", "w"], ["y"]), onnx.helper.make_node("Identity", ["more"], ["again"])],
        "body",
        [_port("i", "INT64", []), _port("more", "BOOL", []), _port("x", "FLOAT", [1, 16])],
        [_port("again", "BOOL", []), _port("y", "FLOAT", [1, 16])],
        [numpy_helper.from_array(weight, "w")],
    )
    nodes = [onnx.helper.make_node("Loop", ["count", "", "given"], ["out"], body=body)]
    ports = [_port("given", "FLOAT", [1, 16])], [_port("out", "FLOAT", [1, 16])]
    _save(onnx.helper.make_graph(nodes, "g", *ports, [numpy_helper.from_array(np.int64(2), "count")]), tmp_path)
    given = {"given": np.ones((1, 16), np.float32)}
    (before,) = onnxruntime.InferenceSession(tmp_path / "g.onnx").run(None, given)
    pack_graphs(tmp_path)
    (after,) = onnxruntime.InferenceSession(tmp_path / "g.onnx").run(None, given)
    loop = next(node for node in onnx.load(tmp_path / "g.onnx").graph.node if node.op_type == "Loop")
    assert loop.attribute[0].g.initializer[0].data_type in TYPES.values()
    assert np.array_equal(before, after)


def _port(name, kind, shape):
    return onnx.helper.make_tensor_value_info(name, getattr(onnx.TensorProto, kind), shape)


def _save(graph, folder):
    onnx.save(
        onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 20)], ir_version=10),
        folder / "g.onnx",
    )


def test_an_unknown_type_is_one_line(tmp_path):
    with pytest.raises(UserError, match=r"^weights: int4 is not known; known are float32, float16, int8$"):
        export_bundle(tiny_codec(), tmp_path / "bundle", weights="int4")
