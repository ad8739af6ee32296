"""What a bundle holds, and when there is none."""

import hashlib
import json
import os
import re
import runpy
import zipfile
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from omegaconf import OmegaConf
from safetensors import safe_open
from safetensors.torch import load_file

import varitok
from varitok import UserError
from varitok.codecs.build import build_codec
from varitok.codecs.codec import Codec
from varitok.export.exporters.bundle import export_bundle
from varitok.export.exporters.frozen import FrozenCodec
from varitok.export.exporters.parity import ParityError

from ...codecs.examples import SIZE, TOKENS, tiny_codec
from ...composing import composed
from ..conftest import awake

FILES = {
    "README.md",
    "codec.ts",
    "config.json",
    "export.json",
    "golden.safetensors",
    "model.safetensors",
    "onnx/decoder_model.onnx",
    "onnx/encoder_model.onnx",
}
GRAPHS = ("encoder_model", "decoder_model")
ROOT = Path(varitok.__file__).parents[1]


def files_of(folder):
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


def axes(value):
    return [dim.dim_param or dim.dim_value for dim in value.type.tensor_type.shape.dim]


def test_files_and_their_checksums(exported):
    _, folder, report = exported
    assert files_of(folder) == FILES
    assert [path.name for path in folder.parent.iterdir()] == ["bundle"], "something was left beside the bundle"
    assert json.loads((folder / "export.json").read_text()) == json.loads(json.dumps(report))
    assert set(report["files"]) == FILES - {"export.json"}
    for name, file in report["files"].items():
        content = (folder / name).read_bytes()
        assert (file["bytes"], file["sha256"]) == (len(content), hashlib.sha256(content).hexdigest())


def test_every_file_has_the_mode_of_a_new_one(exported, tmp_path):
    new = tmp_path / "new"
    new.touch()
    assert {path.stat().st_mode for path in exported[1].rglob("*") if path.is_file()} == {new.stat().st_mode}


def test_parity_is_reported(exported):
    _, _, report = exported
    assert set(report["parity"]) == {"model.safetensors", "codec.ts", "onnx"}
    for parity in report["parity"].values():
        assert parity["codes_equal"] == 1 and parity["signal_error"] < 1e-5 and parity["tokens"] >= 9 * TOKENS


def test_config_is_plain(exported):
    codec, folder, _ = exported
    config = json.loads((folder / "config.json").read_text())
    assert config["tokens"] == TOKENS and config["image_size"] == SIZE and config["channels"] == 3
    assert config["codebook_sizes"] == list(codec.bottleneck.codebook_sizes)
    assert config["bits_per_token"] == pytest.approx(np.log2(codec.bottleneck.codebook_sizes[0]))
    assert config["value_range"] == [-1, 1] and config["architecture"]["codec"]["type"] == "Codec"
    assert "_target_" not in (folder / "config.json").read_text()


def test_names_and_axes_of_the_graphs(exported):
    _, folder, _ = exported
    encoder, decoder = (onnx.load(folder / "onnx" / f"{name}.onnx") for name in GRAPHS)
    assert [v.name for v in (*encoder.graph.input, *encoder.graph.output)] == ["pixel_values", "image_codes"]
    assert [v.name for v in (*decoder.graph.input, *decoder.graph.output)] == ["image_codes", "reconstruction"]
    assert axes(encoder.graph.input[0]) == ["batch", 3, SIZE, SIZE]
    assert axes(encoder.graph.output[0]) == ["batch", 1, TOKENS]
    assert axes(decoder.graph.input[0]) == ["batch", 1, "num_tokens"]
    assert axes(decoder.graph.output[0]) == ["batch", 3, SIZE, SIZE]
    assert encoder.opset_import[0].version == decoder.opset_import[0].version == 20
    assert encoder.graph.output[0].type.tensor_type.elem_type == onnx.TensorProto.INT64


@torch.no_grad()
def test_graphs_take_any_batch_and_any_number_of_tokens(exported):
    codec, folder, _ = exported
    encoder, decoder = (onnxruntime.InferenceSession(folder / "onnx" / f"{name}.onnx") for name in GRAPHS)
    for batch in (1, 2, 7):
        signal = torch.rand(batch, 3, SIZE, SIZE) * 2 - 1
        (codes,) = encoder.run(None, {"pixel_values": signal.numpy()})
        assert np.array_equal(codes, codec.encode(signal).numpy())
        for k in range(1, TOKENS + 1):
            (image,) = decoder.run(None, {"image_codes": codes[..., :k]})
            np.testing.assert_allclose(image, codec.decode(torch.tensor(codes[..., :k])).clamp(-1, 1), atol=1e-5)


def test_metadata_is_the_same_everywhere(exported):
    _, folder, _ = exported
    found = {}
    for name in GRAPHS:
        found[name] = {p.key: p.value for p in onnx.load(folder / "onnx" / f"{name}.onnx").metadata_props}
    with zipfile.ZipFile(folder / "codec.ts") as archive:
        member = next(name for name in archive.namelist() if name.endswith("extra/codec.json"))
        found["codec.ts"] = json.loads(archive.read(member))
    for name in ("model", "golden"):
        with safe_open(folder / f"{name}.safetensors", "pt") as file:
            found[name] = file.metadata()
    roles = {name: metadata.pop("codec.role") for name, metadata in found.items()}
    assert roles == {
        "encoder_model": "encoder", "decoder_model": "decoder", "codec.ts": "codec", "model": "codec", "golden": "codec"
    }  # fmt: skip
    assert "frog" in found["golden"].pop("codec.examples")
    first = found["model"]
    assert all(metadata == first for metadata in found.values())
    assert set(first) == {
        f"codec.{key}" for key in ("format_version", "config", "weights_sha256", "torch", "library_version")
    }
    assert json.loads(first["codec.config"]) == json.loads((folder / "config.json").read_text())
    assert first["codec.library_version"] == varitok.__version__


def test_nothing_of_this_machine_leaks(exported):
    _, folder, _ = exported
    for name in GRAPHS:
        content = (folder / "onnx" / f"{name}.onnx").read_bytes()
        for leak in (b"site-packages", b".py", b"stack_trace", str(ROOT).encode(), os.getcwd().encode(), b"/tmp"):
            assert leak not in content, f"{name}: {leak!r}"
    texts = "".join((folder / name).read_text() for name in ("README.md", "config.json", "export.json"))
    assert str(folder.parent) not in texts and os.getcwd() not in texts


@torch.no_grad()
def test_weights_alone_make_the_codec_again(exported):
    codec, folder, _ = exported
    kind = ("vq_cosine", "truncate") if hasattr(codec.bottleneck, "codebook") else ("fsq", "mask_token")
    fresh = FrozenCodec(tiny_codec(*kind))
    fresh.load_state_dict(load_file(folder / "model.safetensors"))
    golden = load_file(folder / "golden.safetensors")
    assert torch.equal(fresh.encode(golden["pixel_values"]), golden["image_codes"])


@torch.no_grad()
def test_golden_vectors_come_again(exported):
    codec, folder, _ = exported
    golden = load_file(folder / "golden.safetensors")
    assert set(golden) == {"pixel_values", "image_codes", *(f"reconstruction.{k}" for k in (1, TOKENS // 2, TOKENS))}
    assert ((golden["pixel_values"] + 1) * 127.5).sub(
        golden["pixel_values"].add(1).mul(127.5).round()
    ).abs().max() < 1e-3
    bundle = varitok.load(folder)
    codes = bundle.encode(golden["pixel_values"].numpy())
    assert np.array_equal(codes, golden["image_codes"])
    for k in (1, TOKENS // 2, TOKENS):
        np.testing.assert_allclose(bundle.decode(codes[..., :k]), golden[f"reconstruction.{k}"], atol=1e-5)
        expected = codec.decode(golden["image_codes"][..., :k]).clamp(-1, 1)
        torch.testing.assert_close(golden[f"reconstruction.{k}"], expected, atol=1e-5, rtol=0)


def test_examples_of_the_card_run(exported, tmp_path, monkeypatch):
    _, folder, _ = exported
    card = (folder / "README.md").read_text()
    examples = re.findall(r"```python\n(.*?)```", card, flags=re.DOTALL)
    assert len(examples) == 3
    checks = (
        f"assert image.shape == (1, 3, {SIZE}, {SIZE}), image.shape",
        f"assert pixels.shape == (1, {SIZE}, {SIZE}, 3) and pixels.dtype == np.uint8",
        f"assert back.shape == (1, 3, {SIZE}, {SIZE}), back.shape",
    )
    monkeypatch.chdir(folder)
    for example, holds in zip(examples, checks, strict=True):
        (tmp_path / "example.py").write_text(example + holds)
        runpy.run_path(str(tmp_path / "example.py"))


def test_the_card_begins_with_what_the_hub_reads(exported):
    front, _, rest = (exported[1] / "README.md").read_text().removeprefix("---\n").partition("---\n")
    assert OmegaConf.create(front) == {
        "library_name": "varitok",
        "tags": ["varitok", "tokenizer", "neural-codec", "image", "onnx"],
    }
    assert rest.startswith("\n# An image tokenizer")


def test_card_counts_bits(exported):
    codec, folder, _ = exported
    card = (folder / "README.md").read_text()
    for k in (1, 2, 4, TOKENS):
        assert f"| {k} | {codec.bits(k):.6g} |" in card


class Drifting(Codec):
    """A codec that isn't what its parts say."""

    def decode(self, codes, grid=None):
        return super().decode(codes, grid) + 0.1


def drifting():
    codec = awake(tiny_codec())
    codec.__class__ = Drifting
    return codec


def test_failed_parity_leaves_no_bundle(tmp_path):
    with pytest.raises(ParityError, match=rf"^model\.safetensors, batch 1, 1 of {TOKENS} tokens: signals differ by \d"):
        export_bundle(drifting(), tmp_path / "bundle", formats=["safetensors"])
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_logarithms_of_bands_far_below_the_peak_pass_the_gate(tmp_path):
    """The gate compares a constant signal, which has nothing in most of Vocos' bands."""
    form = ["bands=12", "window=64", "hop_length=16"]
    narrow = ["codec.decoder.base=16", "codec.decoder.hidden=48", "codec.decoder.depth=2"]
    torch.manual_seed(0)
    vocos = build_codec(composed("experiment=audio/vocos", *(f"codec.encoder.{one}" for one in form), *narrow)).eval()
    parity = export_bundle(vocos, tmp_path / "bundle")["parity"]
    assert all(found["codes_equal"] == 1 for found in parity.values())


def test_an_old_bundle_stays_until_the_new_one_is_done(tmp_path):
    folder = tmp_path / "bundle"
    export_bundle(awake(tiny_codec()), folder, formats=["safetensors"])
    before = (folder / "export.json").read_bytes()
    with pytest.raises(ParityError):
        export_bundle(drifting(), folder, formats=["safetensors"])
    assert (folder / "export.json").read_bytes() == before
    export_bundle(awake(tiny_codec("vq")), folder, formats=["safetensors"])
    assert (folder / "export.json").read_bytes() != before
    assert [path.name for path in tmp_path.iterdir()] == ["bundle"]


def test_a_folder_of_something_else_is_left_alone(tmp_path):
    (tmp_path / "letter.txt").write_text("Dear")
    with pytest.raises(UserError, match="is not a bundle"):
        export_bundle(tiny_codec(), tmp_path, formats=["safetensors"])
    with pytest.raises(UserError, match="is not a bundle"):
        export_bundle(tiny_codec(), tmp_path / "letter.txt", formats=["safetensors"])
    assert files_of(tmp_path) == {"letter.txt"}


def test_an_unwritable_folder_is_told(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"file/bundle: can't be written \(.+\); name another folder"):
        export_bundle(tiny_codec(), tmp_path / "file" / "bundle", formats=["safetensors"])


@pytest.mark.parametrize("formats", [["onxx"], []])
def test_an_unknown_format_is_told(tmp_path, formats):
    with pytest.raises(UserError, match="known are safetensors, torchscript, onnx"):
        export_bundle(tiny_codec(), tmp_path / "bundle", formats=formats)
    assert not list(tmp_path.iterdir())


def test_a_bundle_without_graphs_says_so(tmp_path):
    export_bundle(awake(tiny_codec()), tmp_path / "bundle", formats=["safetensors"])
    with pytest.raises(UserError, match=r"encoder_model\.onnx: missing; .*with onnx among its formats"):
        varitok.load(tmp_path / "bundle")
