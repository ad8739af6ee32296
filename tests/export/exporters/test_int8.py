"""A decoder of 8-bit weights is smaller, close, and never taken for the exact one."""

import shutil

import numpy as np
import pytest
import torch

import varitok
from varitok import UserError
from varitok.codecs.codec import Codec
from varitok.codecs.networks.register_vit import RegisterDecoder, RegisterEncoder
from varitok.export.bitstream import container
from varitok.export.cli.main import main
from varitok.export.exporters.bundle import export_bundle
from varitok.export.exporters.int8 import quantize_decoder
from varitok.export.runtime.bundle import DECODER_INT8

from ...codecs.examples import BOTTLENECKS, SIZE, tiny_codec
from ..conftest import awake

WITH_INT8 = ["onnx", "onnx_int8"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    torch.manual_seed(0)
    small = tiny_codec("vq_cosine")
    sizes = {"image_size": SIZE, "patch": 8, "tokens": 6, "width": 64, "depth": 2, "heads": 2}
    codec = Codec(RegisterEncoder(**sizes), BOTTLENECKS["vq_cosine"](), RegisterDecoder(**sizes), small.length).eval()
    folder = tmp_path_factory.mktemp("int8") / "bundle"
    export_bundle(codec, folder, formats=WITH_INT8)
    return folder


@pytest.mark.slow
def test_it_is_smaller_and_close(folder):
    exact, small = varitok.load(folder), varitok.load(folder, int8=True)
    codes = exact.encode(np.random.default_rng(0).integers(0, 256, (9, SIZE, SIZE, 3), dtype=np.uint8))
    assert np.array_equal(codes, small.encode(np.random.default_rng(0).integers(0, 256, (9, SIZE, SIZE, 3), np.uint8)))
    one, other = exact.decode(codes), small.decode(codes)
    assert 0 < np.abs(one - other).mean() < 0.05 * one.std()
    sizes = [(folder / f"onnx/decoder_model{end}.onnx").stat().st_size for end in ("", "_int8")]
    assert sizes[1] < 0.6 * sizes[0]
    told = varitok.export.runtime.bundle.read_json(folder / "export.json")["parity"]
    assert 1e-5 < told["onnx_int8"]["signal_error"] < 1 and told["onnx"]["signal_error"] < 1e-5
    assert "int8=True" in (folder / "README.md").read_text()


@pytest.mark.slow
def test_a_file_says_the_same_with_and_without_it(folder, tmp_path):
    plain = tmp_path / "plain"
    shutil.copytree(folder, plain)
    known = container.identity(folder)
    report = varitok.export.runtime.bundle.read_json(plain / "export.json")
    del report["files"]["onnx/decoder_model_int8.onnx"]
    varitok.export.exporters.bundle_folder.write_json(plain / "export.json", report)
    assert container.identity(plain) == known


def test_what_can_not_be_is_told(exported, exported_sounds, tmp_path, capsys):
    codec = awake(tiny_codec())
    with pytest.raises(UserError, match="quantizes a codec's onnx"):
        export_bundle(codec, tmp_path / "a", formats=["safetensors", "onnx_int8"])
    with pytest.raises(UserError, match="int8 is for transformers"):
        quantize_decoder(exported_sounds[1])
    assert not (exported_sounds[1] / DECODER_INT8).exists()
    with pytest.raises(UserError, match="missing; export it again"):
        varitok.load(exported[1], int8=True)
    with pytest.raises(SystemExit):
        main(["decode", str(exported[1]), str(tmp_path), "--int8"])
    assert "decoder_model_int8.onnx: missing" in capsys.readouterr().err
