"""Focal modulation over sequences, and the codec that is made of it."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional

from varitok import UserError
from varitok.codecs.build import build
from varitok.codecs.codec import Codec
from varitok.codecs.networks.conv_codec import ConvEncoder
from varitok.codecs.networks.focal import FocalDecoder, FocalEncoder, FocalSequence
from varitok.codecs.networks.mel import MelFeatures
from varitok.codecs.networks.vocos import VocosDecoder

from ...composing import composed
from .checks import check_causal, check_lengths, check_onnx, check_padding, check_script

HOP = 20
PLAIN = {"widths": [10, 6], "strides": [2, 1], "window": 3, "span": 4}
CODECS = {
    "plain": PLAIN,
    "deep": PLAIN | {"strides": [1, 3], "depth": 2, "levels": 1, "growth": 0, "activation": "gelu"},
    "causal": PLAIN | {"causal": True},
}
WHOLE = {"width": 6, "depth": 2, "window": 3, "levels": 2}


def codec(kind: str) -> tuple[FocalEncoder, FocalDecoder]:
    torch.manual_seed(0)
    sizes = CODECS[kind]
    causal = bool(sizes.get("causal"))
    features = MelFeatures(sample_rate=8000, bands=8, window=4 * HOP, hop_length=HOP, floor=1e-3, causal=causal)
    vocoder = VocosDecoder(width=8, base=12, hidden=16, depth=1, hop_length=HOP, window=4 * HOP, causal=causal)
    encoder = FocalEncoder(features=features, hop_length=HOP, **sizes)  # type: ignore[arg-type]
    return encoder.eval(), FocalDecoder(vocoder=vocoder, **sizes).eval()  # type: ignore[arg-type]


def sequence(causal: bool, **changes: int) -> FocalSequence:
    torch.manual_seed(0)
    return FocalSequence(**WHOLE | {"causal": causal, "span": 4} | changes).eval()  # type: ignore[arg-type]


@pytest.mark.parametrize("kind", CODECS)
@settings(max_examples=4)
@given(tokens=st.integers(1, 9))
def test_lengths_are_exact(kind: str, tokens: int) -> None:
    check_lengths(codec(kind), tokens)


@pytest.mark.parametrize("kind", CODECS)
@settings(max_examples=4)
@given(lengths=st.lists(st.integers(1, 6), min_size=2, max_size=3), garbage=st.floats(-3, 3))
def test_a_padded_batch_is_its_single_items(kind: str, lengths: list[int], garbage: float) -> None:
    check_padding(codec(kind), lengths, garbage)


@pytest.mark.parametrize("cut", [1, 4])
def test_causal_ones_look_back_only(cut: int) -> None:
    check_causal(codec("causal"), cut)


@pytest.mark.parametrize("kind", [pytest.param(kind, marks=[pytest.mark.slow] * (kind == "deep")) for kind in CODECS])
def test_scripted_ones_agree(kind: str) -> None:
    check_script(codec(kind))


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["plain", "causal"])
def test_onnx_agrees(kind: str) -> None:
    check_onnx(codec(kind))


def test_modulation_is_that_of_the_paper() -> None:
    """Query times the mixed sum of gated contexts: two convolutions, one on the other, and the mean of the last."""
    network = sequence(False, depth=1)
    x = torch.randn(2, 5, 6)
    block = network.blocks[0]
    modulation = block.modulation
    query, context, gates = modulation.into(functional.layer_norm(x, [6])).split([6, 6, 3], 2)
    near = functional.gelu(_depthwise(context, modulation.levels[0]))
    far = functional.gelu(_depthwise(near, modulation.levels[1]))
    everywhere = functional.gelu(far.mean(1, keepdim=True))
    total = near * gates[..., :1] + far * gates[..., 1:2] + everywhere * gates[..., 2:]
    modulated = x + modulation.out(query * modulation.mix(total))
    expected = modulated + block.out(functional.gelu(block.wide(functional.layer_norm(modulated, [6]))))
    torch.testing.assert_close(network(x), expected)


def _depthwise(x: Tensor, convolution: nn.Module) -> Tensor:
    layer = convolution.layer
    return functional.conv1d(x.mT, layer.weight, layer.bias, padding=layer.weight.shape[2] // 2, groups=6).mT


def test_a_plain_one_sees_everything_and_a_causal_one_its_context() -> None:
    x = torch.randn(1, 40, 6).double()
    changed = x.clone()
    changed[:, 7] = torch.randn(6)
    network = sequence(False).double()
    assert ((network(x) - network(changed)).abs().amax(2) > 0).all()
    network = sequence(True).double()
    difference = (network(x) - network(changed)).abs().amax(2)[0]
    assert network.context == 2 * (2 + 4 + 3)
    assert not difference[:7].any() and not difference[8 + network.context :].any()
    assert (difference[7 : 8 + network.context] > 0).all()


def test_it_is_a_middle() -> None:
    sizes = {"width": 6, "base": 4, "strides": [2, 5]}
    encoder = ConvEncoder(**sizes, middle=sequence(False)).eval()  # type: ignore[arg-type]
    mask = torch.arange(7) < torch.tensor([[7], [3]])
    signal = torch.randn(2, 1, 70)
    latents = encoder(signal, mask)
    torch.testing.assert_close(latents[1:, :3], encoder(signal[1:, :, :30]), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name, rate", [("focalcodec", 650.0), ("focalcodec_25", 325.0), ("focalcodec_12", 162.5)])
def test_rates_are_the_published_ones(name: str, rate: float) -> None:
    """From the sizes alone: 13 bits at 50, 25 and 12.5 Hz."""
    config = composed(f"experiment=audio/{name}", "codec.encoder.widths=[6,5,4]")
    encoder: FocalEncoder = build(config.codec.encoder)
    decoder: FocalDecoder = build(config.codec.decoder)
    assert encoder.downsample == decoder.downsample == (config.data.downsample,)
    assert build(config.bottleneck).bits * config.data.sample_rate / encoder.downsample[0] == rate


def test_the_small_preset_codes_speech() -> None:
    words = ["data=voices", "data.sample_rate=16000", "codec=focalcodec_small", "bottleneck=bsq"]
    config = composed(*words, "bottleneck.bits=13", "length=full")
    codec: Codec = build(config.codec, bottleneck=build(config.bottleneck), length=build(config.length)).eval()
    codes = codec.encode(torch.randn(2, 1, 1000))
    assert codes.shape == (2, 1, 4) and codes.max() < 2**13
    assert codec.decode(codes, [1000]).shape == (2, 1, 1000)


@pytest.mark.parametrize(
    "change",
    [
        {"widths": [4]},
        {"hop_length": 40},
        {"causal": True},
    ],
    ids=str,
)
def test_sizes_that_do_not_fit_are_refused(change: dict[str, object]) -> None:
    features = MelFeatures(sample_rate=8000, bands=8, window=80, hop_length=HOP)
    with pytest.raises(UserError):
        FocalEncoder(**{"features": features, "hop_length": HOP} | PLAIN | change)  # type: ignore[arg-type]
