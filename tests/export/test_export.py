"""The way out: frozen codecs, bundles, and the runtime that needs none of this code."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

import varitok
from varitok import UserError
from varitok.export import bundle as bundle_module
from varitok.export.bundle import describe, export_bundle
from varitok.export.frozen import FrozenCodec
from varitok.export.parity import ParityError, check_parity
from varitok.export.torchscript import export_torchscript, load_torchscript

from ..codecs.examples import BOTTLENECKS, MECHANISMS, SIZE, TOKENS, tiny_codec

ROOT = Path(__file__).parents[2]
ALL = pytest.mark.parametrize(("bottleneck", "mechanism"), [(b, m) for b in BOTTLENECKS for m in MECHANISMS])


def awake(bottleneck, mechanism):
    """Give every parameter a random value: branches that start at zero would hide mistakes."""
    codec, random = tiny_codec(bottleneck, mechanism), torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in codec.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=random) * 0.2)
    return codec.eval()


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    codec = awake("vq", "mask_token")
    folder = tmp_path_factory.mktemp("export") / "bundle"
    return codec, folder, export_bundle(codec, folder)


@pytest.fixture
def copy(exported, tmp_path):
    """A copy of the bundle to be damaged."""
    folder = tmp_path / "bundle"
    subprocess.run(["cp", "-r", exported[1], folder], check=True)
    return folder


@ALL
def test_frozen_codec_and_its_script_agree_with_the_codec(bottleneck, mechanism, tmp_path):
    codec = awake(bottleneck, mechanism)
    frozen = FrozenCodec(codec)
    export_torchscript(frozen, tmp_path / "codec.ts", {"key": "value"})
    script, metadata = load_torchscript(tmp_path / "codec.ts")
    assert metadata == {"key": "value"}
    for batch in (1, 4):
        signal = torch.rand(batch, 3, SIZE, SIZE) * 2 - 1
        codes = codec.encode(signal)
        assert torch.equal(frozen.encode(signal), codes) and torch.equal(script.encode(signal), codes)
        for k in range(1, TOKENS + 1):
            expected = codec.decode(codes[..., :k]).clamp(-1, 1)
            for form in (frozen, script):
                torch.testing.assert_close(form.decode(codes[..., :k]), expected, atol=1e-5, rtol=0)


def test_freezing_leaves_the_codec_as_it_is():
    codec = tiny_codec().train()
    FrozenCodec(codec)
    assert codec.training and all(parameter.requires_grad for parameter in codec.parameters())


def test_folded_weight_norm():
    codec = awake("fsq", "truncate")
    torch.nn.utils.parametrizations.weight_norm(codec.project_in)
    frozen = FrozenCodec(codec)
    assert not any("parametrizations" in name for name in frozen.state_dict())
    signal = torch.rand(2, 3, SIZE, SIZE)
    assert torch.equal(frozen.encode(signal), codec.encode(signal))


def test_a_bundle_holds_what_the_design_says(exported):
    _, folder, report = exported
    files = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
    graphs = {"onnx/encoder_model.onnx", "onnx/decoder_model.onnx"}
    assert files == graphs | {
        "README.md", "codec.ts", "config.json", "export.json", "golden.safetensors", "model.safetensors"
    }  # fmt: skip
    assert report == json.loads((folder / "export.json").read_text())
    assert set(report["parity"]) == {"codec.ts", "onnx"}
    assert all(figures["equal_codes"] == 1 for figures in report["parity"].values())
    assert "_target_" not in (folder / "config.json").read_text()


def test_graphs_have_the_ecosystems_names_and_free_axes(exported):
    def ports(values):
        return {v.name: [d.dim_param or d.dim_value for d in v.type.tensor_type.shape.dim] for v in values}

    encoder, decoder = (onnx.load(exported[1] / "onnx" / f"{role}_model.onnx") for role in ("encoder", "decoder"))
    assert ports(encoder.graph.input) == {"pixel_values": ["batch", 3, SIZE, SIZE]}
    assert ports(encoder.graph.output) == {"image_codes": ["batch", 1, TOKENS]}
    assert ports(decoder.graph.input) == {"image_codes": ["batch", 1, "num_tokens"]}
    assert ports(decoder.graph.output) == {"reconstruction": ["batch", 3, SIZE, SIZE]}


def test_metadata_is_the_same_everywhere(exported):
    codec, folder, _ = exported
    with safe_open(folder / "model.safetensors", "pt") as file:
        weights = file.metadata()
    _, script = load_torchscript(folder / "codec.ts")
    graphs = [
        {p.key: p.value for p in onnx.load(folder / f"onnx/{role}_model.onnx").metadata_props}
        for role in ("encoder", "decoder")
    ]
    assert [graph.pop("codec.role") for graph in graphs] == ["encoder", "decoder"]
    assert weights.pop("codec.role") == script.pop("codec.role") == "codec"
    assert weights == script == graphs[0] == graphs[1]
    assert json.loads(weights["codec.config"]) == describe(codec) == json.loads((folder / "config.json").read_text())


def test_nothing_tells_of_this_machine(exported):
    for path in (exported[1] / "onnx").iterdir():
        content = path.read_bytes()
        for trace in (b".py", b"site-packages", b"stack_trace", os.fsencode(Path.home()) + b"/", os.fsencode(ROOT)):
            assert trace not in content, (path.name, trace)


def test_golden_vectors_come_back(exported):
    golden = load_file(exported[1] / "golden.safetensors")
    tokenizer = varitok.load(exported[1])
    codes = tokenizer.encode(golden["signal"].numpy())
    np.testing.assert_array_equal(codes, golden["codes"].numpy())
    kept = [int(name.rpartition("_")[2]) for name in golden if name.startswith("reconstruction_")]
    assert {1, TOKENS} <= set(kept)
    for k in kept:
        np.testing.assert_allclose(tokenizer.decode(codes[..., :k]), golden[f"reconstruction_{k}"], atol=1e-5)


def test_any_batch_and_any_prefix(exported):
    codec, folder, _ = exported
    tokenizer = varitok.load(folder)
    for batch in (1, 2, 7):
        signal = torch.rand(batch, 3, SIZE, SIZE) * 2 - 1
        for k in range(1, TOKENS + 1):
            codes = tokenizer.encode(signal.numpy(), tokens=k)
            assert codes.shape == (batch, 1, k) and codes.dtype == np.int64
            expected = codec.decode(torch.from_numpy(codes)).clamp(-1, 1).detach()
            np.testing.assert_allclose(tokenizer.decode(codes), expected, atol=1e-5)


def test_pixels_go_in_and_come_out(exported):
    tokenizer = varitok.load(exported[1])
    pixels = np.random.default_rng(0).integers(0, 256, (2, SIZE, SIZE, 3), dtype=np.uint8)
    signal = pixels.transpose(0, 3, 1, 2) / np.float32(127.5) - np.float32(1)
    np.testing.assert_array_equal(tokenizer.encode(pixels), tokenizer.encode(signal.astype(np.float32)))
    np.testing.assert_array_equal(tokenizer.encode(pixels[0]), tokenizer.encode(pixels)[:1])
    np.testing.assert_array_equal(tokenizer.pixels(signal), pixels)
    assert tokenizer.bits(2) == exported[0].bits(2) and f"1 to {TOKENS} tokens" in repr(tokenizer)


@pytest.mark.parametrize("k", [0, -1, TOKENS + 1])
def test_number_of_tokens_out_of_range(exported, k):
    tokenizer = varitok.load(exported[1])
    with pytest.raises(UserError, match=f"keeps from 1 to {TOKENS}"):
        tokenizer.encode(np.zeros((SIZE, SIZE, 3), np.uint8), tokens=k)
    with pytest.raises(UserError, match=f"keeps from 1 to {TOKENS}"):
        tokenizer.decode(np.zeros((1, 1, max(k, 0)), np.int64))


@pytest.mark.parametrize("code", [-1, 37, 10**12])
def test_codes_out_of_range(exported, code):
    with pytest.raises(UserError, match=f"codes: {code} in book 0, whose codes go from 0 to 36"):
        varitok.load(exported[1]).decode(np.full((1, 1, 2), code))


@pytest.mark.parametrize(
    "codes", [np.zeros((1, 2)), np.zeros((1, 2, 3), np.int64), np.zeros((1, 1, 3)), np.zeros((1, 3), np.int64)]
)
def test_codes_of_another_shape(exported, codes):
    with pytest.raises(UserError, match="expected integers of shape"):
        varitok.load(exported[1]).decode(codes)


@pytest.mark.parametrize(
    "image",
    [
        np.zeros((1, 1, 3), np.uint8),
        np.zeros((SIZE, SIZE), np.uint8),
        np.zeros((1, 3, SIZE, SIZE), np.int64),
        np.zeros((1, 3, SIZE, SIZE + 1), np.float32),
        np.full((1, 3, SIZE, SIZE), np.nan, np.float32),
    ],
)
def test_images_that_can_not_be_encoded(exported, image):
    with pytest.raises(UserError, match=r"^image: "):
        varitok.load(exported[1]).encode(image)


@pytest.mark.parametrize("name", ["config.json", "export.json", "onnx/encoder_model.onnx", "onnx/decoder_model.onnx"])
def test_a_missing_file_is_named(copy, name):
    (copy / name).unlink()
    with pytest.raises(UserError, match=re.escape(name)):
        varitok.load(copy)


@pytest.mark.parametrize("name", ["config.json", "onnx/encoder_model.onnx", "onnx/decoder_model.onnx"])
def test_an_altered_file_is_named(copy, name):
    path = copy / name
    content = path.read_bytes()
    path.write_bytes(content + b"\n" if name.endswith("json") else content[:-1] + bytes([content[-1] ^ 1]))
    with pytest.raises(UserError, match=f"{re.escape(name)}: altered"):
        varitok.load(copy)


def test_an_unknown_format_and_what_is_no_bundle(copy, tmp_path):
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps(config | {"format_version": 99}))
    with pytest.raises(UserError, match="format 99"):
        varitok.load(copy)
    with pytest.raises(UserError, match="no such folder"):
        varitok.load(tmp_path / "nothing")
    with pytest.raises(UserError, match="is this the folder of a bundle"):
        varitok.load(tmp_path)
    (copy / "config.json").write_text("not json")
    with pytest.raises(UserError, match="not JSON"):
        varitok.load(copy)


def test_a_failed_parity_leaves_the_old_bundle(copy, monkeypatch):
    before = (copy / "export.json").read_bytes()
    other = awake("fsq", "truncate")
    write = export_torchscript
    monkeypatch.setattr(
        bundle_module, "export_torchscript", lambda codec, *rest: write(FrozenCodec(tiny_codec()), *rest)
    )
    with pytest.raises(ParityError, match=r"codec\.ts: .* at batch 1"):
        export_bundle(other, copy, formats=["torchscript"])
    assert (copy / "export.json").read_bytes() == before
    assert list(copy.parent.iterdir()) == [copy]


def test_parity_is_measured_on_signals_too(exported):
    """A decoder that is off by one part in ten thousand does not pass."""
    codec, folder, _ = exported
    off = tiny_codec("vq", "mask_token").eval()
    off.load_state_dict(codec.state_dict())
    with torch.no_grad():
        off.decoder.out.bias.add_(1e-4)
    with pytest.raises(ParityError, match="signals differ by"):
        check_parity(off, folder, 3, SIZE)


def test_a_folder_that_can_not_be_written(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="can't write the bundle there"):
        export_bundle(tiny_codec(), tmp_path / "file" / "bundle", formats=[])
    with pytest.raises(UserError, match="onxn is not one of"):
        export_bundle(tiny_codec(), tmp_path / "bundle", formats=["onxn"])


def _python(code, folder):
    environment = {"PATH": os.environ["PATH"], "PYTHONPATH": str(ROOT / ".pkg")}
    done = subprocess.run(
        [sys.executable, "-c", code], check=False, cwd=folder, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr


def test_loading_needs_no_torch(exported):
    _python(
        "import sys, varitok, numpy as np\n"
        "tokenizer = varitok.load('.')\n"
        f"tokenizer.decode(tokenizer.encode(np.zeros(({SIZE}, {SIZE}, 3), np.uint8)))\n"
        "assert 'torch' not in sys.modules and 'varitok.codecs' not in sys.modules",
        exported[1],
    )


def test_the_card_tells_the_truth(exported):
    blocks = re.findall(r"```python\n(.*?)```", (exported[1] / "README.md").read_text(), re.DOTALL)
    assert len(blocks) == 3
    numpy = (
        f"import numpy as np\npixels = np.zeros(({SIZE}, {SIZE}, 3), np.uint8)\n"
        f"signal = np.zeros((2, 3, {SIZE}, {SIZE}), np.float32)\n"
    )
    for block in blocks:
        _python(
            numpy + ("import torch\nsignal = torch.from_numpy(signal)\n" if "torch.jit" in block else "") + block,
            exported[1],
        )
