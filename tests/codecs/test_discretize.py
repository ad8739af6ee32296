"""A continuous codec becomes discrete without training: the more bins, the nearer its reconstructions."""

import pytest
import torch

from varitok import UserError
from varitok.codecs.build import build_codec
from varitok.codecs.discretize import bridge

from ..composing import composed
from .examples import tiny_codec


@torch.no_grad()
def test_codes_are_bins_of_the_latents_and_more_bins_are_nearer():
    torch.manual_seed(0)
    words = ["data.image_size=16", "codec.encoder.tokens=4", "codec.encoder.width=16", "codec.encoder.depth=1"]
    codec = build_codec(composed("experiment=image/demo", "bottleneck=kl", *words)).eval()
    before = {name: value.clone() for name, value in codec.state_dict().items()}
    images = torch.rand(64, 3, 16, 16) * 2 - 1
    continuous, errors = codec.encode(images), {}
    for bins in (4, 16, 256):
        discrete = bridge(codec, images.split(16), bins)
        codes = discrete.encode(images)
        assert codes.dtype == torch.int64 and discrete.bottleneck.codebook_sizes == (bins,) * codec.bottleneck.dim
        assert 0 <= codes.min() and codes.max() < bins and codes.unique().numel() > 1
        assert discrete.bits(1) == codec.bottleneck.dim * torch.tensor(bins).log2()
        latents = discrete.bottleneck.decode(codes).transpose(1, 2)
        errors[bins] = ((latents - continuous).square().mean() / continuous.var()).item()
    assert errors[16] < errors[4] / 4 and errors[256] < errors[16] / 10, errors
    assert all(torch.equal(value, before[name]) for name, value in codec.state_dict().items())


def test_a_discrete_codec_is_refused():
    with pytest.raises(UserError, match="needs a codec with a KL bottleneck, this one has FiniteScalarQuantizer"):
        bridge(tiny_codec("fsq"), [])
