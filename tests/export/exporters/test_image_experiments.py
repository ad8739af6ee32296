"""Every experiment of images on a grid trains two updates at a tiny size, and its bundle codes another size."""

from pathlib import Path

import numpy as np
import pytest
import torch
from omegaconf import DictConfig, OmegaConf

import varitok
from varitok.codecs.training.run import build_run

from ...codecs.examples import GRID_IMAGES, NARROW, QUIET, StandIn, shrink, shrink_scales
from ...composing import composed

# Bottlenecks whose tables take seconds to search.
SMALLER = {"bits": 6, "codebook_size": 64, "dim": NARROW["width"]}


def _compose(name: str) -> DictConfig:
    config = composed(
        f"experiment=image/{name}", "data=dead_leaves", "data.image_size=32", "data.length=4", "data.val_length=2",
        "loader.batch_size=2", "loader.workers=0", "loader.captions=false", "updates=2", "training.log_every=1",
        "trainer=default", "trainer.accelerator=cpu", "trainer.enable_progress_bar=false", *QUIET,
    )  # fmt: skip
    shrink(config.codec)
    shrink(config.bottleneck, SMALLER)
    shrink_scales(config)
    shrink(config.objective, {"width": 2, "layers": 1})
    _randomize(config.objective)
    return config


def _randomize(node: DictConfig) -> None:
    """Put a network of random weights in the place of each pretrained one."""
    for key, value in node.items():
        if OmegaConf.is_dict(value) and value.get("_target_", "").startswith("varitok.data."):
            node[key] = {"_target_": "varitok.data.teachers.vision.RandomTeacher", "patch": 8}
        elif OmegaConf.is_dict(value):
            _randomize(value)
    if "network" in node and "layers" in node:
        node["layers"] = None


@pytest.mark.slow
@pytest.mark.parametrize("name", GRID_IMAGES)
def test_one_trains_and_exports(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The parity gate compares ONNX and TorchScript with the codec at several sizes; here ONNX at one more."""
    monkeypatch.setattr("varitok.codecs.losses.perceptual.LPIPS", lambda net: StandIn())
    run = build_run(_compose(name), tmp_path)
    run.trainer.fit(run.module, run.data)
    assert run.module.update == 2
    assert all(parameter.isfinite().all() for parameter in run.module.parameters())
    bundle, codec = varitok.load(tmp_path / "bundle"), run.module.evaluated.cpu().eval()
    image = torch.rand(1, 3, 41, 70, generator=torch.Generator().manual_seed(0)) * 2 - 1
    with torch.no_grad():
        codes = codec.encode(image)
        decoded = codec.decode(codes, (41, 70))
    assert codes.shape[2:] == tuple(-(-side // step) for side, step in zip((41, 70), codec.downsample, strict=True))
    found = bundle.encode(image.numpy())
    if codec.num_codebooks:
        assert np.array_equal(found, codes.numpy())
    np.testing.assert_allclose(found, codes.numpy(), atol=1e-4)
    np.testing.assert_allclose(bundle.decode(codes.numpy(), (41, 70)), decoded.clamp(-1, 1).numpy(), atol=1e-4)
