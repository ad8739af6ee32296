"""The export form is the codec."""

import pytest
import torch
from torch.nn.utils import parametrizations

from varitok.export.exporters.frozen import FrozenCodec
from varitok.export.exporters.torchscript import export_torchscript, load_torchscript

from ...codecs.examples import BOTTLENECKS, SIZE, STARTS, TOKENS, tiny_codec
from ..conftest import awake


def images(batch):
    return torch.rand(batch, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(1)) * 2 - 1


# Each bottleneck and each mechanism: neither knows of the other.
@pytest.mark.parametrize(
    ("bottleneck", "mechanism"), [*((name, "truncate") for name in BOTTLENECKS), ("vq", "mask_token"), ("fsq", "zeros")]
)
@torch.no_grad()
def test_equals_the_codec_and_scripts(bottleneck, mechanism, tmp_path):
    codec = awake(tiny_codec(bottleneck, mechanism))
    frozen = FrozenCodec(codec)
    export_torchscript(frozen, tmp_path / "codec.ts", {"a": "b"})
    scripted, metadata = load_torchscript(tmp_path / "codec.ts")
    assert metadata == {"a": "b"}
    for batch in (1, 3):
        codes = codec.encode(images(batch))
        for artifact in (frozen, scripted):
            assert torch.equal(artifact.encode(images(batch)), codes)
            for k in range(1, TOKENS + 1):
                expected = codec.decode(codes[..., :k]).clamp(-1, 1)
                torch.testing.assert_close(artifact.decode(codes[..., :k]), expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("start", STARTS)
@torch.no_grad()
def test_all_starts_of_the_network(start):
    codec = awake(tiny_codec("vq", "truncate", start))
    frozen = FrozenCodec(codec)
    expected = codec.decode(codec.encode(images(2))).clamp(-1, 1)
    torch.testing.assert_close(frozen(images(2)), expected, atol=1e-5, rtol=0)


@torch.no_grad()
def test_parametrized_weights_are_folded(tmp_path):
    codec = awake(tiny_codec())
    parametrizations.weight_norm(codec.decoder.out)
    codec.decoder.out.parametrizations.weight.original0.mul_(3)
    codes = codec.encode(images(2))
    expected = codec.decode(codes).clamp(-1, 1)
    frozen = FrozenCodec(codec)
    assert not any("parametrizations" in name for name in frozen.state_dict())
    assert "decoder.out.parametrizations.weight.original0" in codec.state_dict(), "the codec itself was changed"
    export_torchscript(frozen, tmp_path / "codec.ts", {})
    for artifact in (frozen, load_torchscript(tmp_path / "codec.ts")[0]):
        torch.testing.assert_close(artifact.decode(codes), expected, atol=1e-5, rtol=0)


def test_is_float32_and_the_codec_stays_as_it_is():
    codec = tiny_codec().train().to(torch.float64)
    frozen = FrozenCodec(codec)
    assert {value.dtype for value in frozen.state_dict().values()} == {torch.float32}
    assert not any(parameter.requires_grad for parameter in frozen.parameters())
    assert not frozen.training and codec.training
    assert {parameter.dtype for parameter in codec.parameters()} == {torch.float64}
    assert all(parameter.requires_grad for parameter in codec.parameters())


@torch.no_grad()
def test_images_stay_in_range():
    codec = awake(tiny_codec())
    codec.decoder.out.bias.fill_(5)
    frozen = FrozenCodec(codec)
    assert codec.decode(codec.encode(images(1))).max() > 1
    assert frozen(images(1)).abs().max() <= 1
