"""Bundles of two small codecs, exported once for all tests."""

import pytest
import torch
from omegaconf import DictConfig, OmegaConf

from varitok.codecs.build import build_codec
from varitok.codecs.codec import Codec
from varitok.export.bundle import architecture, export_bundle

from ..codecs.examples import PATCH, SIZE, TOKENS, WIDTH


def awake(codec: Codec) -> Codec:
    """Give every parameter a random value: branches that start at zero would hide mistakes."""
    random = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in codec.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=random) * 0.2)
    return codec.eval()


SIZES = {"image_size": SIZE, "patch": PATCH, "tokens": TOKENS, "width": WIDTH, "depth": 1, "heads": 2, "shortcut": True}
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
    "truncate": {"_target_": "varitok.codecs.lengths.Truncate"},
    "mask_token": {"_target_": "varitok.codecs.lengths.MaskToken", "dim": WIDTH},
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
                "_target_": "varitok.codecs.lengths.LengthPolicy",
                "distribution": {"_target_": "varitok.codecs.lengths.Uniform"},
                "mechanism": MECHANISMS[mechanism],
            },
        }
    )


@pytest.fixture(scope="session", params=KINDS, ids="-".join)
def exported(request, tmp_path_factory):
    """Give a codec, its bundle's folder and the report."""
    config = configuration(*request.param)
    codec = awake(build_codec(config))
    folder = tmp_path_factory.mktemp("bundle") / "bundle"
    return codec, folder, export_bundle(codec, folder, architecture=architecture(config))
