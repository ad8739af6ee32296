"""Grid transformers of images; shapes, padding and chunks are the contract's."""

import pytest
import torch

from varitok import UserError
from varitok.codecs.networks.layers.positions import grid_waves
from varitok.codecs.networks.layers.sequence import SequenceTransformer
from varitok.codecs.networks.resnet import ResNetDecoder, ResNetEncoder
from varitok.codecs.networks.vit2d import ViTDecoder, ViTEncoder

SIZES = {"patch": 4, "width": 16, "depth": 1, "heads": 2}


@torch.no_grad()
@pytest.mark.parametrize("positions", ["rotary", "sincos"])
def test_rows_and_columns_are_places_of_their_own(positions: str) -> None:
    """Of patches that are equal but for the first, the next in its row and the next in its column differ."""
    torch.manual_seed(0)
    encoder = ViTEncoder(**SIZES, positions=positions).eval()
    image = torch.zeros(1, 3, 8, 8)
    image[..., :4, :4] = 1
    _, right, below, across = encoder(image)[0]
    for one, other in ((right, below), (below, across), (right, across)):
        assert (one - other).abs().max() > 1e-3


@torch.no_grad()
def test_positions_are_relative_or_wherever_the_grid_ends() -> None:
    torch.manual_seed(0)
    torch.testing.assert_close(grid_waves(10, 5, 4)[..., :2, :3], grid_waves(10, 2, 3))
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
    with pytest.raises(UserError, match="positions=none should be rotary or sincos"):
        ViTEncoder(**SIZES, positions="none")
    with pytest.raises(UserError, match="gated perceptrons have positions=rotary"):
        ViTEncoder(**SIZES, positions="sincos", gated=True)


@torch.no_grad()
@pytest.mark.filterwarnings("ignore:.*torch.jit.script.*:FutureWarning")
def test_a_network_around_the_patches_knows_their_mask() -> None:
    """Convolutions to half the rows and columns before patches of 2 x 2: a token is for 4 x 4 pixels, masked too."""
    torch.manual_seed(0)
    form = {"width": 6, "base": 4, "strides": [2], "multipliers": [1, 2], "depth": 1, "dims": 2, "units": "joint"}
    form |= {"causal": False, "groups": 2}
    sizes = {**SIZES, "patch": 2}
    encoder = ViTEncoder(**sizes, network=ResNetEncoder(**form)).eval()
    decoder = ViTDecoder(**sizes, network=ResNetDecoder(**form)).eval()
    assert encoder.downsample == decoder.downsample == (4, 4)
    image, mask = torch.randn(2, 3, 16, 8), torch.arange(8) < torch.tensor([[8], [4]])
    latents = encoder(image, mask)
    decoded = decoder(latents, mask, [4, 2])
    torch.testing.assert_close(latents[1:, :4], encoder(image[1:, :, :8]))
    torch.testing.assert_close(decoded[1:, :, :8], decoder(latents[1:, :4], None, [2, 2]))
    assert decoded.shape == image.shape and not decoded[1, :, 8:].any()
    torch.testing.assert_close(torch.jit.script(encoder)(image, mask), latents)
    torch.testing.assert_close(torch.jit.script(decoder)(latents, mask, [4, 2]), decoded)
