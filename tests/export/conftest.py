"""Bundles of small codecs, exported once for all tests."""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from filelock import FileLock
from omegaconf import DictConfig, OmegaConf

from varitok.codecs.build import build_codec
from varitok.codecs.codec import Codec
from varitok.export.exporters.bundle import architecture, export_bundle

from ..codecs.examples import HOP, PATCH, SIZE, TOKENS, WIDTH, sound_codec


def awake(codec: Codec) -> Codec:
    """Set every parameter to a random value: branches that start at zero would hide mistakes."""
    random = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in codec.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=random) * 0.2)
    return codec.eval()


SIZES = {"image_size": SIZE, "patch": PATCH, "tokens": TOKENS, "width": WIDTH, "depth": 1, "heads": 2, "cosines": 2}
BOTTLENECKS = {
    "vq_cosine": {
        "_target_": "varitok.codecs.bottlenecks.vq.VectorQuantizer",
        "dim": 5,
        "codebook_size": 37,
        "cosine": True,
    },
    "fsq": {"_target_": "varitok.codecs.bottlenecks.fsq.FiniteScalarQuantizer", "levels": [8, 5, 5]},
}
MECHANISMS = {
    "truncate": {"_target_": "varitok.codecs.lengths.policy.Truncate"},
    "mask_token": {"_target_": "varitok.codecs.lengths.policy.MaskToken", "dim": WIDTH},
}
KINDS = [("vq_cosine", "truncate"), pytest.param(("fsq", "mask_token"), marks=pytest.mark.slow)]


def configuration(bottleneck: str, mechanism: str) -> DictConfig:
    """Configure a codec of 16 x 16 images, 6 tokens, as a run would: its bundle says how it was built."""
    networks = "varitok.codecs.networks.register_vit"
    return OmegaConf.create(
        {
            "codec": {
                "_target_": "varitok.codecs.codec.Codec",
                "encoder": {"_target_": f"{networks}.RegisterEncoder", **SIZES},
                "decoder": {"_target_": f"{networks}.RegisterDecoder", **SIZES},
                "unit_latents": True,
            },
            "bottleneck": BOTTLENECKS[bottleneck],
            "length": {
                "_target_": "varitok.codecs.lengths.policy.LengthPolicy",
                "distribution": {"_target_": "varitok.codecs.lengths.distributions.Uniform"},
                "mechanism": MECHANISMS[mechanism],
            },
        }
    )


@pytest.fixture(scope="session")
def once(tmp_path_factory) -> Callable[..., tuple[Path, dict[str, Any]]]:
    """Export a bundle once for all of xdist's workers, which takes long; gives its folder and the report."""
    own = tmp_path_factory.getbasetemp()
    shared = own.parent if "PYTEST_XDIST_WORKER" in os.environ else own

    def exported_once(name: str, codec: Codec, **options: Any) -> tuple[Path, dict[str, Any]]:
        folder, told = shared / name / "bundle", shared / f"{name}.json"
        with FileLock(shared / f"{name}.lock"):
            if not told.exists():
                told.write_text(json.dumps(export_bundle(codec, folder, **options)))
        return folder, json.loads(told.read_text())

    return exported_once


@pytest.fixture(scope="session", params=KINDS, ids="-".join)
def exported(request, once):
    """Return a codec, its bundle's folder and the report."""
    config = configuration(*request.param)
    codec = awake(build_codec(config))
    return codec, *once("-".join(request.param), codec, architecture=architecture(config))


@pytest.fixture(scope="session")
def exported_sounds(once):
    """Return an audio codec, its bundle's folder and the report."""
    codec = sound_codec()
    codec(torch.rand(4, 1, 40 * HOP) * 2 - 1)
    codec.bottleneck.update()
    return codec.eval(), *once("sounds", codec)
