"""Grid transformers of images; shapes, padding and chunks are the contract's."""

import pytest
import torch

from varitok import UserError
from varitok.codecs.networks.layers.sequence import SequenceTransformer
from varitok.codecs.networks.vit2d import ViTDecoder, ViTEncoder

SIZES = {"patch": 4, "width": 16, "depth": 1, "heads": 2}


@torch.no_grad()
def test_rows_and_columns_are_places_of_their_own() -> None:
    """Of patches that are equal but for the first, the next in its row and the next in its column differ."""
    torch.manual_seed(0)
    encoder = ViTEncoder(**SIZES).eval()
    image = torch.zeros(1, 3, 8, 8)
    image[..., :4, :4] = 1
    _, right, below, across = encoder(image)[0]
    for one, other in ((right, below), (below, across), (right, across)):
        assert (one - other).abs().max() > 1e-3
    # Rotary positions are relative: the whole may be moved by a row and a column.
    tokens = torch.randn(1, 4, 16)
    network = SequenceTransformer(16, 2, 2, layer_scale=1.0, axes=2)
    found = [network(tokens, rows=3, columns=3, some=torch.tensor([index])) for index in ([0, 1, 3, 4], [4, 5, 7, 8])]
    torch.testing.assert_close(*found)


def test_depths_are_free_and_sizes_are_checked() -> None:
    assert len(ViTEncoder(**{**SIZES, "depth": 0}).transformer.blocks) == 0
    with pytest.raises(UserError, match="width=18 should be a multiple of twice its heads=2"):
        ViTDecoder(**{**SIZES, "width": 18})
    with pytest.raises(UserError, match="axes=4 should be 1 for sequences, 2 for images, or 3 for frames"):
        SequenceTransformer(8, 1, 2, axes=4)
