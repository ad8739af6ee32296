"""The agreement of tiles with whole images, as an export measures it."""

import pytest
import torch

import varitok
from varitok.export.exporters.tiles import measure_tiles

from ..runtime.test_examples import write_bundle


@pytest.fixture
def bundle(tmp_path):
    """Hand-made graphs: a code is the mean of 8 x 8 pixels."""
    write_bundle(tmp_path / "photo", "photo")
    return varitok.load(tmp_path / "photo")


def test_centers_are_compared(bundle, monkeypatch):
    image = torch.rand(1, 3, 20, 30, generator=torch.Generator().manual_seed(0)) * 2 - 1
    assert measure_tiles(bundle, image, 64)[:2] == (64, 1.0) and measure_tiles(bundle, image, 3).side == 32
    graph, shapes = bundle.run_encoder, []

    def worse(pixels):
        """Code the image's first row and column, which only borders are, otherwise."""
        shapes.append(pixels.shape)
        codes = graph(pixels)
        codes[..., 0, :] = codes[..., :, 0] = 0
        return codes

    monkeypatch.setattr(bundle, "run_encoder", worse)
    assert measure_tiles(bundle, image, 64).codes_equal == 1
    assert [shape[2:] for shape in shapes] == [(112, 112), *[(64, 64)] * 4]
    # What depends on the whole tile, as a group norm's statistics do.
    monkeypatch.setattr(bundle, "run_encoder", lambda pixels: (graph(pixels) + pixels.shape[2] // 112) % 16)
    paint = bundle.run_decoder
    monkeypatch.setattr(bundle, "run_decoder", lambda codes: paint(codes) + 0.01 * codes.shape[2])
    found = measure_tiles(bundle, image, 64)
    assert found.codes_equal == 0 and found.signal_error == pytest.approx(0.01 * (14 - 8), abs=1e-6)
