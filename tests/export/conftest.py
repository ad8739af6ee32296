"""Bundles of two small codecs, exported once for all tests."""

import pytest
import torch

from varitok.codecs.codec import Codec
from varitok.export.bundle import export_bundle

from ..codecs.examples import tiny_codec


def awake(codec: Codec) -> Codec:
    """Give every parameter a random value: branches that start at zero would hide mistakes."""
    random = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in codec.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=random) * 0.2)
    return codec.eval()


KINDS = [("vq_cosine", "truncate"), pytest.param(("fsq", "mask_token"), marks=pytest.mark.slow)]


@pytest.fixture(scope="session", params=KINDS, ids="-".join)
def exported(request, tmp_path_factory):
    """Give a codec, its bundle's folder and the report."""
    codec = awake(tiny_codec(*request.param))
    folder = tmp_path_factory.mktemp("bundle") / "bundle"
    return codec, folder, export_bundle(codec, folder, architecture={"codec": {"type": "Codec"}})
