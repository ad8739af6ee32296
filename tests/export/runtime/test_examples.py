"""The examples in docstrings of the runtime, of containers and of adapters run, and return what they show."""

import doctest
import inspect
import json
from importlib import import_module
from pathlib import Path

import numpy as np
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper, save
from PIL import Image

import varitok
from varitok.codecs.build import build_codec
from varitok.export.bitstream import container, media_files
from varitok.export.bitstream.entropy_coding import codebooks_of, coding_of
from varitok.export.cli.tokenize import main as tokenize
from varitok.export.exporters.bundle import architecture
from varitok.export.runtime.bundle import DECODER, ENCODER, FORMAT_VERSION, STREAMING, sha256
from varitok.export.runtime.load import BUNDLES

from ..conftest import awake, configuration

# Each module with examples, and the bundle that they name `bundle`.
MODULES = {
    "": "image",
    "export.adapters.codec": "image",
    "export.bitstream.container": "audio",
    "export.bitstream.entropy_coding": "audio",
    "export.bitstream.media_files": "image",
    "export.bitstream.packing": "image",
    "export.bitstream.range_coder": "image",
    "export.bitstream.rate_control": "image",
    "export.bitstream.symbols": "image",
    "export.cli.encode_decode": "image",
    "export.cli.info": "image",
    "export.cli.main": "image",
    "export.runtime.audio": "audio",
    "export.runtime.bundle": "image",
    "export.runtime.codes": "image",
    "export.runtime.features": "feature",
    "export.runtime.images": "image",
    "export.runtime.implicit": "clip",
    "export.runtime.load": "image",
    "export.runtime.streaming": "audio",
    "export.runtime.tiling": "video",
    "export.runtime.video": "video",
}
# Channels and downsampling factors.
SHAPES = {"audio": (1, (40,)), "photo": (3, (8, 8)), "video": (3, (4, 8, 8)), "feature": (8, (1, 2, 2))}
STREAM = {"latency_ms": 5, "encoder_state_size": 1, "decoder_state_size": 1, "chunk_tokens": 1}
CONFIGS = {
    "audio": {
        "modality": "audio", "sampling_rate": 8000, "hop_length": 40, "streaming": {"chunk_samples": 40, **STREAM},
    },
    "photo": {"modality": "image", "hop": [8, 8]},
    "video": {"modality": "video", "hop": [4, 8, 8], "lead": 0, "streaming": {"chunk_samples": 4, **STREAM}},
    "feature": {
        "modality": "features", "hop": [1, 2, 2], "lead": 0, "feature_mean": [2] * 8, "feature_deviation": [3] * 8,
    },
    "clip": {"modality": "clip", "frames": 6, "height": 16, "width": 16},
}  # fmt: skip
METHODS = ("encode", "decode", "encoding", "decoding", "pixels", "standardize", "restore_scale", "grid")


def collect(name):
    """Return a module's docstrings with examples, by the object's name; decorated methods are found too."""
    module = import_module(f"varitok.{name}".rstrip("."))
    own = {key: one for key, one in vars(module).items() if getattr(one, "__module__", None) == module.__name__}
    inner = {
        f"{key}.{each}": part for key, one in own.items() if inspect.isclass(one) for each, part in vars(one).items()
    }
    texts = {key: getattr(one, "__doc__", None) for key, one in (own | inner).items()}
    return {key: text for key, text in texts.items() if text and ">>>" in text}


EXAMPLES = [(name, key) for name in MODULES for key in collect(name)]


def write_graph(path, inputs, nodes, constants=()):
    """Write an ONNX graph whose last node is its output, with the state, if it has one, unchanged."""
    kinds = {"codes": TensorProto.INT64, "frames": TensorProto.INT64}
    ports = [
        helper.make_tensor_value_info(key, kinds.get(key, TensorProto.FLOAT), shape) for key, shape in inputs.items()
    ]
    kind = TensorProto.INT64 if nodes[-1].op_type == "Cast" else TensorProto.FLOAT
    made = [helper.make_tensor_value_info("made", kind, None)]
    if "state" in inputs:
        nodes = [*nodes, helper.make_node("Identity", ["state"], ["after"])]
        made.append(helper.make_tensor_value_info("after", TensorProto.FLOAT, None))
    weights = [numpy_helper.from_array(np.asarray(value), key) for key, value in dict(constants).items()]
    graph = helper.make_graph(nodes, "graph", ports, made, weights)
    path.parent.mkdir(exist_ok=True)
    save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), path)


def write_coder(folder, channels, hops, streams):
    """Write graphs that code the mean of a step in two equal codes, 0 to 15."""
    node, axes = helper.make_node, [None] * len(hops)
    encoder = [
        node("AveragePool", ["signal"], ["pooled"], kernel_shape=hops, strides=hops, ceil_mode=1),
        node("ReduceMean", ["pooled"], ["mean"], axes=[1], keepdims=1),
        node("Add", ["mean", "one"], ["raised"]),
        node("Mul", ["raised", "scale"], ["scaled"]),
        node("Clip", ["scaled", "low", "high"], ["clipped"]),
        node("Concat", ["clipped", "clipped"], ["both"], axis=1),
        node("Cast", ["both"], ["made"], to=TensorProto.INT64),
    ]
    decoder = [
        node("Cast", ["codes"], ["floats"], to=TensorProto.FLOAT),
        node("ReduceMean", ["floats"], ["mean"], axes=[1], keepdims=1),
        node("Div", ["mean", "scale"], ["scaled"]),
        node("Sub", ["scaled", "one"], ["latent"]),
        node("ConvTranspose", ["latent", "kernel"], ["made"], kernel_shape=hops, strides=hops),
    ]
    scale = {"one": np.float32(1), "scale": np.float32(7.5)}
    low, kernel = {"low": np.float32(0), "high": np.float32(15)}, np.ones((1, channels, *hops), np.float32)
    names = [(ENCODER, DECODER), *([STREAMING] if streams else [])]
    for index, (encoding, decoding) in enumerate(names):
        state = {"state": [None, 1]} if index else {}
        write_graph(folder / encoding, {"signal": [None, channels, *axes], **state}, encoder, scale | low)
        write_graph(folder / decoding, {"codes": [None, None, *axes], **state}, decoder, scale | {"kernel": kernel})


def write_bundle(folder, name):
    """Write a bundle of hand-made graphs, which takes milliseconds: exporting a causal codec takes a minute."""
    folder.mkdir()
    config = {"format_version": FORMAT_VERSION, "tokens": 0, "codebook_sizes": [16, 16], **CONFIGS[name]}
    if name in SHAPES:
        channels, hops = SHAPES[name]
        config["channels"] = channels
        write_coder(folder, channels, hops, "streaming" in config)
    else:
        black = helper.make_node("ConstantOfShape", ["shape"], ["made"])
        count = helper.make_node("Shape", ["frames"], ["count"])
        shape = helper.make_node("Concat", ["count", "rest"], ["shape"], axis=0)
        write_graph(folder / DECODER, {"frames": [None]}, [count, shape, black], {"rest": np.array([3, 16, 16])})
    (folder / "config.json").write_text(json.dumps(config))
    files = [path for path in folder.rglob("*") if path.is_file()]
    sums = {path.relative_to(folder).as_posix(): {"sha256": sha256(path)} for path in files}
    (folder / "export.json").write_text(json.dumps({"files": sums}))


@pytest.fixture(scope="module")
def bundles(exported_image, tmp_path_factory):
    """Return the folder of a small bundle of each modality."""
    folder = tmp_path_factory.mktemp("examples")
    for name in CONFIGS:
        write_bundle(folder / name, name)
    return {"image": exported_image} | {name: folder / name for name in CONFIGS}


@pytest.fixture(scope="module")
def opened(bundles):
    return {name: varitok.load(folder) for name, folder in bundles.items()}


@pytest.fixture(scope="module")
def exported_image(once):
    config = configuration("vq_cosine", "truncate")  # other tests export it too, under the same name
    return once("vq_cosine-truncate", awake(build_codec(config)), architecture=architecture(config))[0]


@pytest.fixture(scope="module")
def image_codes(exported_image, tmp_path_factory):
    folder = tmp_path_factory.mktemp("corpus")
    Image.fromarray(np.full((16, 16, 3), 90, np.uint8)).save(folder / "photo.png")
    (folder / "photo.txt").write_text("a gray square")
    tokenize([str(folder), "--bundle", str(exported_image), "--out", str(folder / "codes"), "--workers", "0"])
    return folder / "codes"


@pytest.fixture
def place(bundles, opened, image_codes, tmp_path, monkeypatch):
    """Go to a folder with the files that examples name, and return the image and the path of the codes there."""
    monkeypatch.chdir(tmp_path)
    for name, folder in bundles.items():
        Path("clip" if name == "clip" else f"{name}_tokenizer").symlink_to(folder)
    Path("image_codes").symlink_to(image_codes)
    image, path, audio = np.full((16, 16, 3), 90, np.uint8), Path("codes.vtk"), opened["audio"]
    Image.fromarray(image).save("photo.png")
    media_files.encode_file(opened["image"], Path("photo.png"), Path("photo.vtk"), tokens=4, coding="packed")
    codes, coding = np.zeros((1, 2, 10), np.int64), coding_of("packed", codebooks_of(audio))
    with path.open("wb") as file:
        container.write(file, container.header_of(audio, codes, [8000], coding), codes, audio.units_of(10, 400), coding)
    return {"image": image, "path": path}


@pytest.mark.parametrize(("name", "key"), EXAMPLES, ids=[f"{name or 'varitok'}:{key}" for name, key in EXAMPLES])
def test_an_example_returns_what_it_shows(name, key, opened, place):
    module = vars(import_module(f"varitok.{name}".rstrip(".")))
    names = (
        module | place | {"np": np, "torch": torch, "varitok": varitok, "Path": Path, "bundle": opened[MODULES[name]]}
    )
    test, said = doctest.DocTestParser().get_doctest(collect(name)[key], names, key, name, 0), []
    assert doctest.DocTestRunner().run(test, out=said.append).failed == 0, "".join(said)


def test_no_module_with_examples_is_missing():
    root = Path(varitok.__file__).parent
    paths = [*(root / "export").rglob("*.py"), root / "__init__.py"]
    paths = [path for path in paths if path.parent.name != "exporters"]  # tests/test_examples.py runs theirs
    found = {".".join(path.relative_to(root).with_suffix("").parts) for path in paths if ">>>" in path.read_text()}
    assert {name.removesuffix("__init__") for name in found} == set(MODULES)


@pytest.mark.parametrize("kind", BUNDLES.values(), ids=BUNDLES)
def test_each_method_of_a_bundle_has_an_example(kind):
    found = collect(kind.__module__.removeprefix("varitok."))
    shown = "".join(text for key, text in found.items() if key.startswith(kind.__name__))
    own = [name for name in METHODS if name in vars(kind) and (kind.modality, name) != ("features", "pixels")]
    assert own and all(f".{name}(" in shown for name in own), own
