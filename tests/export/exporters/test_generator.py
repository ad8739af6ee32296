"""A decoder that samples is exported with its steps: it decodes codes and a seed to one signal everywhere."""

import numpy as np
import pytest
import torch
from omegaconf import OmegaConf
from PIL import Image

import varitok
from varitok import UserError
from varitok.codecs.build import build_codec
from varitok.data.noise import gaussian
from varitok.export.cli.encode_decode import decode, encode
from varitok.export.exporters.bundle import architecture, export_bundle
from varitok.export.exporters.frozen import FrozenGenerator, freeze
from varitok.export.exporters.rebuild import rebuild
from varitok.export.exporters.torchscript import export_torchscript, load_torchscript
from varitok.export.report.live.page import write_live

from ...codecs.examples import SIZE, TOKENS
from ..conftest import SIZES, awake, configuration
from .test_frozen import images

DECODER = {
    "_target_": "varitok.codecs.networks.flow.FlowDecoder",
    "network": {"_target_": "varitok.codecs.networks.diffusion_vit.DiffusionTransformer", **SIZES},
    "guidance": {"_target_": "varitok.codecs.networks.flow.Guidance", "scale": 3.0},
    "steps": 4,
}


def config_of(mechanism="mask_token", **options):
    config = configuration("fsq", mechanism)
    config.codec.decoder = OmegaConf.create(DECODER | options)
    return config


@pytest.fixture(scope="module")
def generator(once):
    """Return a codec, its bundle's folder and the report."""
    config = config_of()
    codec = awake(build_codec(config))
    return codec, *once("generator", codec, architecture=architecture(config))


@pytest.mark.parametrize(
    ("mechanism", "options"),
    [
        ("mask_token", {}),
        pytest.param("truncate", {"solver": "heun", "guidance": None, "predicts": "signal"}, marks=pytest.mark.slow),
    ],
)
@torch.no_grad()
def test_equals_the_codec_and_scripts(mechanism, options, tmp_path):
    codec = awake(build_codec(config_of(mechanism, **options)))
    frozen = freeze(codec)
    assert isinstance(frozen, FrozenGenerator) and "noise" not in frozen.state_dict()
    export_torchscript(frozen, tmp_path / "codec.ts", {})
    scripted = load_torchscript(tmp_path / "codec.ts")[0]
    codes, other = codec.encode(images(3)), torch.from_numpy(gaussian((3, SIZE, SIZE), 5))[None]
    for artifact in (frozen, scripted):
        for kept in (1, TOKENS):
            codec.decoder.seed = 0
            expected = codec.decode(codes[..., :kept]).clamp(-1, 1)
            torch.testing.assert_close(artifact.decode(codes[..., :kept]), expected, atol=1e-5, rtol=0)
            codec.decoder.seed = 5
            expected = codec.decode(codes[..., :kept]).clamp(-1, 1)
            torch.testing.assert_close(artifact.sample(codes[..., :kept], other), expected, atol=1e-5, rtol=0)


def test_eight_bit_weights_are_not_for_it(tmp_path):
    with pytest.raises(UserError, match="onnx_int8 is not for a decoder that samples; leave it out"):
        export_bundle(build_codec(config_of()), tmp_path / "bundle", formats=["onnx", "onnx_int8"])


@pytest.mark.slow
@torch.no_grad()
def test_a_bundle_decodes_by_its_seed_or_another(generator):
    codec, folder, report = generator
    assert max(parity["signal_error"] for parity in report["parity"].values()) < 1e-4
    bundle = varitok.load(folder)
    assert bundle.config["sampler"] == {"steps": 4, "seed": 0, "solver": "euler", "guidance": 3.0}
    assert bundle.describe({})["samples"] == "in 4 steps, seed 0"
    codes = codec.encode(images(3))
    for seed in (0, 7):
        bundle.seed = codec.decoder.seed = seed
        for kept in (1, TOKENS):
            found = bundle.decode(codes[..., :kept].numpy())
            expected = codec.decode(codes[..., :kept]).clamp(-1, 1).numpy()
            np.testing.assert_allclose(found, expected, atol=1e-4)
            np.testing.assert_allclose(bundle.decode(codes[1:2, :, :kept].numpy()), found[1:2], atol=1e-5)
    codec.decoder.seed = 0
    torch.testing.assert_close(rebuild(folder).decode(codes), codec.decode(codes).clamp(-1, 1), atol=1e-5, rtol=0)


@pytest.mark.slow
def test_the_loop_has_the_weights_once_and_no_traces_of_this_machine(generator):
    graphs = {path.stem: path.read_bytes() for path in (generator[1] / "onnx").glob("*.onnx")}
    weights = sum(parameter.numel() for parameter in generator[0].decoder.parameters())
    assert len(graphs["decoder_model"]) < 2 * 4 * weights + 200_000
    assert not any(leak in graph for graph in graphs.values() for leak in (b"site-packages", b".py", b"stack_trace"))


@pytest.mark.slow
def test_files_decode_by_seed(generator, tmp_path):
    folder, photo = str(generator[1]), tmp_path / "photo.png"
    Image.effect_noise((SIZE, SIZE), 80).convert("RGB").save(photo)
    encode([folder, str(photo)])
    pixels = {}
    for name, words in {"bundle": [], "same": ["--seed", "0"], "other": ["--seed", "3"]}.items():
        decode([folder, str(tmp_path / "photo.vtk"), "--out", str(tmp_path / name), *words])
        pixels[name] = np.asarray(Image.open(tmp_path / name / "photo.png"))
    np.testing.assert_array_equal(pixels["same"], pixels["bundle"])
    assert (pixels["other"] != pixels["bundle"]).mean() > 0.5
    with pytest.raises(UserError, match="--seed -1: must be from 0 to 4294967295"):
        decode([folder, str(tmp_path / "photo.vtk"), "--seed", "-1"])


@pytest.mark.slow
def test_the_live_page_refuses_it(generator, tmp_path):
    with pytest.raises(UserError, match="the live page supports no decoder that samples; use varitok decode"):
        write_live(tmp_path / "live.html", generator[1])


@pytest.mark.slow
def test_examples_of_its_card_run(generator, tmp_path, monkeypatch):
    monkeypatch.chdir(generator[1])
    card = (generator[1] / "README.md").read_text(encoding="utf-8")
    for example in card.split("```python\n")[1:]:
        exec(example.partition("```")[0], {})


def test_a_seed_is_for_decoders_that_sample(exported, tmp_path):
    with pytest.raises(UserError, match=r"--seed 1: .* decodes without noise; leave it out"):
        decode([str(exported[1]), str(tmp_path), "--seed", "1"])
