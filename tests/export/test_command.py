"""The bundle at the end of a run, and the command that makes one from it."""

import hydra
import numpy as np
import pytest
import torch
from omegaconf import OmegaConf
from safetensors.torch import load_file

import varitok
from varitok.codecs.training.run import build_run
from varitok.export.bundle import main

from ..codecs.examples import TINY_RUN

SMALL = [
    *TINY_RUN,
    "updates=2",
    "callbacks.samples=null",
    "callbacks.evaluation=null",
    "export=bundle",
    "export.formats=[safetensors,onnx]",
]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    with hydra.initialize_config_module("varitok.configs", version_base="1.3"):
        config = hydra.compose("train", SMALL)
    OmegaConf.save(OmegaConf.create(OmegaConf.to_container(config, resolve=True)), folder / "config.yaml")
    run = build_run(config, folder)
    run.trainer.fit(run.module, run.data)
    return folder, run.module


@torch.no_grad()
def test_a_run_ends_with_the_bundle_of_its_averaged_codec(run):
    folder, module = run
    bundle = varitok.load(folder / "bundle")
    pixels = np.random.default_rng(0).integers(0, 256, (3, 16, 16, 3), dtype=np.uint8)
    codes = bundle.encode(pixels)
    expected = module.evaluated.eval().decode(torch.from_numpy(codes)).clamp(-1, 1)
    np.testing.assert_allclose(bundle.decode(codes), expected, atol=1e-5)
    assert module.average is not None
    trained = module.codec.eval().decode(torch.from_numpy(codes)).clamp(-1, 1)
    assert np.abs(bundle.decode(codes) - trained.numpy()).max() > 1e-5
    assert bundle.config["architecture"]["codec"]["encoder"]["type"] == "RegisterEncoder"


def test_the_command_makes_the_same_codec(run, tmp_path, capsys):
    folder, _ = run
    main([str(folder / "checkpoints" / "last.ckpt"), "--out", str(tmp_path / "out"), "--formats", "safetensors"])
    shown = capsys.readouterr().out
    assert "model.safetensors" in shown and "parity holds" in shown and "KiB" in shown
    config = (tmp_path / "out" / "config.json").read_text()
    assert config == (folder / "bundle" / "config.json").read_text()
    assert "_target_" not in config and str(folder) not in config
    weights = [load_file(path / "model.safetensors") for path in (tmp_path / "out", folder / "bundle")]
    assert weights[0].keys() == weights[1].keys()
    assert all(torch.equal(value, weights[1][name]) for name, value in weights[0].items())


@pytest.mark.parametrize("words", [["nowhere"], ["RUN", "--formats", "onxx"], ["RUN", "--out", "RUN/checkpoints"]])
def test_mistakes_end_in_one_line(run, words, capsys):
    with pytest.raises(SystemExit) as caught:
        main([word.replace("RUN", str(run[0])) for word in words])
    assert caught.value.code == 2
    told = capsys.readouterr().err
    assert told.startswith("varitok-export: ") and told.count("\n") == 1
