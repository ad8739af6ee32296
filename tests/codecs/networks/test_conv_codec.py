"""Convolutional codecs: exact lengths, causality, padding, gradients, scripting, export."""

from functools import cache
from pathlib import Path

import onnxruntime
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from varitok import UserError
from varitok.codecs.build import build
from varitok.codecs.networks.conv_codec import ConvDecoder, ConvEncoder
from varitok.codecs.networks.layers.activations import ACTIVATIONS, Activation, Snake, SnakeBeta
from varitok.codecs.networks.layers.convolution import Convolution, StepNorm, TransposedConvolution
from varitok.codecs.networks.layers.recurrent import Recurrent
from varitok.codecs.networks.layers.sequence import LocalAttention, SequenceTransformer

from ...composing import composed
from .checks import check_causal, check_lengths, check_onnx, check_padding, check_script, paint, sound

CONFIGS = Path(__file__).parents[3] / "configs"

# Odd strides, a stride of one token more by `resample`, and every kind of middle.
PLAIN = {"width": 5, "base": 4, "strides": [2, 3], "dilations": [1, 3]}
KINDS = {
    "dac": PLAIN | {"tanh": True},
    "odd": PLAIN | {"strides": [5, 3], "norm": "none"},
    "seanet": PLAIN
    | {"activation": "elu", "residual_kernel": 3, "dilations": [1], "compress": 2, "conv_shortcut": True},
    "group": PLAIN | {"norm": "group", "activation": "elu"},
    "bigcodec": PLAIN | {"activation": "snake_beta", "anti_aliased": True},
    "causal": PLAIN | {"causal": True},
    "causal_odd": PLAIN
    | {"causal": True, "strides": [3, 5], "channels": 2, "activation": "elu", "multipliers": [1, 3, 2]},
    "mimi": PLAIN | {"causal": True, "resample": 2},
    "stretched": PLAIN | {"resample": 3},
    "encodec": PLAIN | {"causal": True},
    "speech_tokenizer": PLAIN,
    "encodec_24k": PLAIN
    | {"causal": True, "edges": "encodec", "kernel": 3, "last_kernel": 3, "residual_kernel": 3, "dilations": [1]},
    "encodec_48k": PLAIN | {"strides": [2, 5], "norm": "group", "edges": "encodec"},
    "dac_24k": PLAIN | {"strides": [5, 3], "tanh": True, "edges": "dac"},
    "snac": PLAIN | {"edges": "snac", "depthwise": True, "noise": True},
    "snac_44k": PLAIN | {"width": 16, "edges": "snac", "depthwise": True, "noise": True},
    "mimi_24k": PLAIN | {"causal": True, "resample": 2, "edges": "mimi"},
}
CHANNELS = {"causal_odd": 2}
SCRIPTED = ("causal_odd", "group", "snac_44k")  # by the quick tests, as whole codecs are in tests/export
CAUSAL = [kind for kind, config in KINDS.items() if config.get("causal")]


def codec(kind: str) -> tuple[ConvEncoder, ConvDecoder]:
    """Make a pair of the same sizes, in evaluation mode; what starts as nothing is given weight."""
    torch.manual_seed(0)
    config = dict(KINDS[kind])
    last = {"tanh": bool(config.pop("tanh", False)), "noise": bool(config.pop("noise", False))}

    def more() -> dict[str, nn.Module]:
        if kind == "mimi":
            return {"middle": SequenceTransformer(8, 1, 2, causal=True, window=3, layer_scale=1.0)}
        if kind == "snac_44k":
            return {"inner": LocalAttention(16, 2, 4)}
        if kind in ("encodec", "speech_tokenizer"):
            return {"inner": Recurrent(16, 2, bidirectional=kind == "speech_tokenizer")}
        return {}

    if kind == "mimi":
        config["width"] = 8
    encoder, decoder = ConvEncoder(**config, **more()), ConvDecoder(**config, **last, **more())
    return encoder.eval(), decoder.eval()


@cache
def made(kind: str) -> tuple[ConvEncoder, ConvDecoder]:
    """Make a pair once, for tests that don't change it."""
    return codec(kind)


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=4)
@given(tokens=st.integers(1, 9))
def test_lengths_are_exact(kind: str, tokens: int) -> None:
    check_lengths(made(kind), tokens, CHANNELS.get(kind, 1))


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=4)
@given(lengths=st.lists(st.integers(1, 6), min_size=2, max_size=3), garbage=st.floats(-3, 3))
def test_a_padded_batch_is_its_single_items(kind: str, lengths: list[int], garbage: float) -> None:
    check_padding(made(kind), lengths, garbage, CHANNELS.get(kind, 1))


@pytest.mark.parametrize("kind", CAUSAL)
@settings(max_examples=6)
@given(cut=st.integers(1, 5))
def test_causal_networks_do_not_see_what_comes(kind: str, cut: int) -> None:
    check_causal(made(kind), cut, CHANNELS.get(kind, 1))


def test_networks_that_are_not_causal_do_see_it() -> None:
    encoder, _ = codec("dac")
    signal = sound(encoder, 1, 6)
    other = signal.clone()
    other[..., 3 * encoder.downsample[0] :] += 1
    assert not torch.allclose(encoder(signal)[:, 2], encoder(other)[:, 2])


@pytest.mark.parametrize(
    "kind", [pytest.param(kind, marks=[pytest.mark.slow] * (kind not in SCRIPTED)) for kind in KINDS]
)
def test_they_script(kind: str) -> None:
    check_script(codec(kind), CHANNELS.get(kind, 1))


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_they_export(kind: str) -> None:
    check_onnx(codec(kind), CHANNELS.get(kind, 1))


@pytest.mark.parametrize("dims", [2, 3])
@pytest.mark.parametrize("causal", [False, True])
def test_more_axes(dims: int, causal: bool) -> None:
    strides = [[2, 3], [1, 2]] if dims == 2 else [[2, 1, 2], [1, 2, 3]]
    config = {"width": 6, "base": 4, "strides": strides, "dims": dims, "channels": 3, "causal": causal}
    encoder, decoder = ConvEncoder(**config).eval(), ConvDecoder(**config).eval()
    grid = (4, 2) if dims == 2 else (3, 2, 1)
    size = [side * hop for side, hop in zip(grid, encoder.downsample, strict=True)]
    signal = torch.randn(2, 3, *size)
    latents = encoder(signal)
    assert latents.shape == (2, torch.tensor(grid).prod(), 6)
    painted = decoder(latents, None, [*grid])
    assert painted.shape == signal.shape
    # The first axis has lengths.
    valid = (grid[0] - 1) * torch.tensor(grid[1:]).prod()
    mask = torch.arange(latents.shape[1]) < torch.tensor([[valid], [latents.shape[1]]])
    short = signal[:1, :, : (grid[0] - 1) * encoder.downsample[0]]
    alone = encoder(short)
    torch.testing.assert_close(encoder(signal, mask)[:1, :valid], alone, atol=1e-5, rtol=1e-5)
    again = decoder(encoder(signal, mask), mask, [*grid])[:1, :, : short.shape[2]]
    torch.testing.assert_close(again, decoder(alone, None, [grid[0] - 1, *grid[1:]]), atol=1e-5, rtol=1e-5)
    if causal:
        other = signal.clone()
        other[:, :, -1] += 1
        torch.testing.assert_close(encoder(other)[:, :valid], latents[:, :valid])
        # Only the first axis is causal.
        other = signal.clone()
        other[..., -1] += 1
        assert not torch.allclose(encoder(other)[:, 0], latents[:, 0])


@settings(max_examples=60)
@given(
    kernel=st.integers(1, 9),
    stride=st.integers(1, 6),
    dilation=st.integers(1, 3),
    steps=st.integers(1, 7),
    causal=st.booleans(),
)
def test_layers_give_exact_lengths_or_refuse(kernel: int, stride: int, dilation: int, steps: int, causal: bool) -> None:
    if (kernel - 1) * dilation + 1 < stride:
        with pytest.raises(UserError, match="shorter than stride"):
            Convolution(1, 1, kernel, stride, dilation, causal=causal)
    else:
        layer = Convolution(2, 3, kernel, stride, dilation, causal=causal)
        assert layer(torch.randn(1, 2, steps * stride)).shape == (1, 3, steps)
    if kernel >= stride:
        layer = TransposedConvolution(2, 3, kernel, stride, causal=causal)
        assert layer(torch.randn(1, 2, steps)).shape == (1, 3, steps * stride)


@settings(max_examples=20)
@given(kernel=st.integers(2, 7), stride=st.integers(1, 3), steps=st.integers(1, 4), more=st.integers(1, 4))
def test_context_is_all_a_causal_chunk_needs(kernel: int, stride: int, steps: int, more: int) -> None:
    """The streaming form that the module promises: `context` steps before a chunk, no padding, the same numbers."""
    torch.manual_seed(0)
    if kernel >= stride:
        layer = Convolution(1, 1, kernel, stride, causal=True)
        signal = torch.randn(1, 1, (steps + more) * stride)
        before = torch.nn.functional.pad(signal, (layer.context, 0))[..., steps * stride :]
        torch.testing.assert_close(layer.layer(before), layer(signal)[..., steps:])
        up = TransposedConvolution(1, 1, kernel, stride, causal=True)
        signal = torch.randn(1, 1, steps + more)
        before = torch.nn.functional.pad(signal, (up.context, 0))[..., steps:]
        torch.testing.assert_close(up(before)[..., up.context * stride :], up(signal)[..., steps * stride :])


def test_step_norm_is_torchs() -> None:
    norm = StepNorm(6, 3)
    nn.init.normal_(norm.weight)
    x = torch.randn(2, 6, 4, 5)
    expected = nn.functional.group_norm(x, 3, norm.weight, norm.bias)
    torch.testing.assert_close(norm(x, None), expected)
    torch.testing.assert_close(norm(x, torch.ones(2, 1, 4, 1, dtype=torch.bool)), expected)


@pytest.mark.slow
def test_step_norm_of_a_large_image_is_as_exact_in_onnx(tmp_path: Path) -> None:
    """ONNX Runtime's InstanceNormalization was 2e-4 off."""
    norm, x = StepNorm(8, 1).eval(), torch.randn(1, 8, 512, 512) + 3
    torch.onnx.export(norm, (x, None), tmp_path / "norm.onnx", dynamo=True, verbose=False)
    session = onnxruntime.InferenceSession(tmp_path / "norm.onnx")
    (found,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    with torch.no_grad():
        exact = norm.double()(x.double(), None)
    assert (torch.from_numpy(found) - exact).abs().max() < 1e-5


@pytest.mark.parametrize("kind", [Snake, SnakeBeta])
def test_snake_is_its_formula_and_its_gradient_too(kind: type[Snake | SnakeBeta]) -> None:
    torch.manual_seed(0)
    module = kind(3).double()
    for weight in module.parameters():
        nn.init.uniform_(weight, 0.5, 1.5)
    x = torch.randn(2, 3, 7, dtype=torch.float64, requires_grad=True)
    a, b = (
        (module.alpha, module.alpha) if isinstance(module, Snake) else (module.log_alpha.exp(), module.log_beta.exp())
    )
    expected = x + (a * x).sin() ** 2 / b
    torch.testing.assert_close(module(x), expected)
    with torch.no_grad():
        torch.testing.assert_close(module(x), expected)
    weights = [x, *module.parameters()]
    got = torch.autograd.grad(module(x).pow(3).sum(), weights)
    torch.testing.assert_close(got, torch.autograd.grad(expected.pow(3).sum(), weights))


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_activations_leave_silence_silent(name: str) -> None:
    assert not Activation(name, 2)(torch.zeros(1, 2, 5)).any()


def test_anti_aliasing_keeps_low_tones_and_folds_less() -> None:
    places = torch.arange(2000.0)
    module = Activation("leaky_relu", 1, anti_aliased=True)
    plain = Activation("leaky_relu", 1)
    low = torch.sin(0.05 * places)[None, None]
    torch.testing.assert_close(module(low)[..., 50:-50], plain(low)[..., 50:-50], atol=0.03, rtol=0)
    # The second harmonic of 0.4 cycles a step is 0.8, which folds to 0.2.
    high = torch.sin(2 * torch.pi * 0.4 * places)[None, None]
    folded_tone = [float(torch.fft.rfft(kind(high)[0, 0]).abs()[400]) for kind in (plain, module)]
    assert folded_tone[1] < 0.5 * folded_tone[0]


def test_noise_is_drawn_in_training_and_a_function_of_the_step_else() -> None:
    _, decoder = codec("snac")
    latents = torch.randn(2, 7, 5)
    one = paint(decoder, latents)
    assert torch.equal(paint(decoder, latents), one)
    assert torch.equal(codec("snac")[1](latents, None, [7]), one)
    decoder.train()
    assert not torch.allclose(paint(decoder, latents), paint(decoder, latents))
    plain = ConvDecoder(**PLAIN, edges="snac", depthwise=True)
    plain.load_state_dict({name: value for name, value in decoder.state_dict().items() if "noise" not in name})
    assert not torch.allclose(paint(plain, latents), one)


@pytest.mark.parametrize("n", [8, 10])
def test_local_attention_sees_its_window_alone(n: int) -> None:
    layer = LocalAttention(8, 2, 4)
    x = torch.randn(1, n, 8)
    other = x.clone()
    other[:, 5, 0] += 1
    changed = (layer(x) != layer(other)).any(2)[0]
    assert changed.nonzero().flatten().tolist() == list(range(4, min(n, 8)))
    torch.testing.assert_close(layer(x)[:, 4:8], layer(x[:, 4:8]))


@pytest.mark.parametrize(
    ("wrong", "told"),
    [
        ({"activation": "snak"}, "one of elu"),
        ({"norm": "wieght"}, "weight, group or none"),
        ({"norm": "group", "causal": True}, "look ahead"),
        ({"anti_aliased": True, "causal": True}, "look ahead"),
        ({"multipliers": [1, 2]}, "3 multipliers"),
        ({"dims": 4}, "dims=4"),
        ({"strides": [[2, 3], 2]}, "1 whole numbers"),
        ({"strides": []}, "empty"),
        ({"dims": 2, "inner": nn.Identity()}, "one axis"),
    ],
)
def test_mistakes_are_told(wrong: dict[str, object], told: str) -> None:
    for network in (ConvEncoder, ConvDecoder):
        with pytest.raises(UserError, match=told):
            network(**(PLAIN | wrong))  # type: ignore[arg-type]


def test_noise_is_for_one_axis() -> None:
    with pytest.raises(UserError, match=r"codec\.decoder\.noise: is for one axis"):
        ConvDecoder(**PLAIN, dims=2, noise=True)


def preset(name: str) -> tuple[nn.Module, nn.Module]:
    """Build a preset's networks without their weights."""
    config = composed(name=f"codec/{name}").codec
    with torch.device("meta"):
        return build(config.encoder), build(config.decoder)


# Samples to a latent and millions of parameters of encoder and decoder, as the papers or the
# released models have them; codebooks come on top.
SIZES = {
    "seanet": (320, 14.85, 0.001),
    "seanet_mimi": (1920, 79.3, 0.01),
    "dac": (512, 76.65, 0.005),
    "snac": (512, 19.8, 0.01),
    "snac_44k": (384, 54.5, 0.01),
    "dac_bigcodec": (200, 159.0, 0.005),
    "taae": (640, 950.0, 0.005),
}


@pytest.mark.parametrize("name", SIZES)
def test_presets_are_of_the_published_sizes(name: str) -> None:
    hop, size, share = SIZES[name]
    networks = preset(name)
    assert networks[0].downsample == (hop,)
    millions = sum(weight.numel() for network in networks for weight in network.parameters()) / 1e6
    assert millions == pytest.approx(size, rel=share)
