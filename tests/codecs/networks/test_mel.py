"""The codec of mel bands, in which nothing learns."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torchaudio.functional import melscale_fbanks

from varitok import UserError
from varitok.codecs.bottlenecks.bins import UniformBins
from varitok.codecs.build import build
from varitok.codecs.codec import Codec
from varitok.codecs.networks.mel import MelDecoder, MelFeatures

from ...composing import composed
from .checks import CLOSE, check_lengths, check_onnx, check_padding, check_script, paint

RATE = 16000
SMALL = {"sample_rate": 8000, "bands": 12, "window": 80, "hop_length": 20}


def pair(**changes: object) -> tuple[MelFeatures, MelDecoder]:
    return MelFeatures(**SMALL, floor=1e-2).eval(), MelDecoder(**SMALL | {"iterations": 3} | changes).eval()  # type: ignore[arg-type]


def configured(*overrides: str) -> Codec:
    """Make the codec of the configuration."""
    chosen = ["codec=dmel", "bottleneck=dmel", "length=full", "data=voices", "data.sample_rate=16000", *overrides]
    config = composed(*chosen)
    codec: Codec = build(config.codec, bottleneck=build(config.bottleneck), length=build(config.length))
    return codec.eval()


def tones(seconds: float = 0.5, batch: int = 2) -> Tensor:
    """Make chords of a few partials that fade, `(b, 1, t)`."""
    time = torch.arange(int(RATE * seconds)) / RATE
    pitches = 110.0 * torch.arange(1, batch + 1)[:, None, None]
    partials = torch.arange(1, 9)[None, :, None]
    chord = (torch.sin(2 * math.pi * pitches * partials * time) / partials).sum(1, keepdim=True)
    return 0.2 * chord * torch.exp(-3 * time)


@settings(max_examples=6)
@given(tokens=st.integers(1, 9))
def test_lengths_are_exact(tokens: int) -> None:
    check_lengths(pair(), tokens)


@settings(max_examples=8)
@given(lengths=st.lists(st.integers(1, 9), min_size=2, max_size=3), garbage=st.floats(-3, 3))
def test_a_padded_batch_is_its_single_items(lengths: list[int], garbage: float) -> None:
    check_padding(pair(), lengths, garbage)


def test_scripted_ones_agree() -> None:
    check_script(pair())


@pytest.mark.slow
def test_onnx_agrees() -> None:
    check_onnx(pair())


def test_features_are_logarithms_of_mel_magnitudes() -> None:
    """Against torch's transform, whose frames are centered on the hops' middles by padding."""
    signal = torch.randn(2, 1, 1600)
    features = MelFeatures(sample_rate=RATE, bands=40, window=800, hop_length=200)(signal)
    padded = nn.functional.pad(signal[:, 0], (300, 300))
    spectrum = torch.stft(padded, 800, 200, window=torch.hann_window(800), center=False, return_complex=True).abs()
    bank = melscale_fbanks(401, 0.0, RATE / 2, 40, RATE, norm="slaney", mel_scale="slaney")
    torch.testing.assert_close(features, (spectrum.transpose(1, 2) @ bank).log(), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("at_start", [False, True])
def test_bands_far_below_the_peak_are_those_of_the_signal(at_start: bool) -> None:
    """Three times louder is log(3) more in all bands, also those that are rounding errors in float32."""
    sizes = {"sample_rate": RATE, "bands": 40, "window": 1024, "hop_length": 256}
    features = MelFeatures(**sizes, floor=1e-12, at_start=at_start)  # type: ignore[arg-type]
    quiet = torch.full((3, 1, 4096), 0.25)
    bands = features(quiet)[:, 4:-4]
    assert bands.min() < bands.max() + math.log(1e-7)
    torch.testing.assert_close(features(3 * quiet)[:, 4:-4], bands + math.log(3), atol=1e-4, rtol=0)


def test_a_window_at_the_start_of_a_short_hop_only() -> None:
    with pytest.raises(UserError, match="2 or more times hop_length=50 for at_start=true"):
        MelFeatures(sample_rate=8000, bands=12, window=80, hop_length=50, at_start=True)


@pytest.mark.parametrize("cut", [1, 3])
def test_causal_features_look_back_only(cut: int) -> None:
    features = MelFeatures(sample_rate=8000, bands=12, window=80, hop_length=20, causal=True)
    one = torch.randn(1, 1, 120)
    other = one.clone()
    other[..., cut * 20 :] = torch.randn(120 - cut * 20)
    before, after = features(one), features(other)
    torch.testing.assert_close(before[:, :cut], after[:, :cut])
    assert not torch.allclose(before[:, cut], after[:, cut])


@pytest.mark.parametrize("levels", [5, 16])
def test_levels_are_even_in_the_logarithm(levels: int) -> None:
    """A code is its band's logarithm, rounded to the nearest of the levels; beyond them the last."""
    bottleneck = UniformBins(12, levels, -6.0, 2.0).eval()
    mel = torch.randn(2, 20, 12) * 5
    codes = bottleneck.encode(mel).transpose(1, 2)
    step = 8.0 / (levels - 1)
    assert codes.min() == 0 and codes.max() == levels - 1
    values = bottleneck.decode(codes.transpose(1, 2))
    torch.testing.assert_close(values, codes * step - 6.0)
    assert ((values - mel.clamp(-6.0, 2.0)).abs() <= step / 2 + 1e-5).all()
    # A band that is left out is silent.
    assert (bottleneck.decode(codes.transpose(1, 2)[:, :5])[..., 5:] == -6.0).all()


def test_nothing_learns() -> None:
    assert not list(configured().parameters())


def test_rate_is_the_published_one() -> None:
    codec = configured()
    assert codec.bottleneck.codebook_sizes == (16,) * 80
    assert codec.bottleneck.bits * RATE / codec.downsample[0] == 25600


def test_the_way_back_has_the_same_codes() -> None:
    """Griffin-Lim finds a sound whose bands are nearly those asked for; with every step it comes nearer."""
    signal = tones()
    misses = []
    for iterations in (0, 4, 16):
        codec = configured(f"codec.decoder.iterations={iterations}")
        codes = codec.encode(signal)
        back = codec.decode(codes)
        assert back.shape == signal.shape
        misses.append((codec.encode(back) - codes).abs().float().mean())
    assert misses[0] > 1.2 * misses[1] > 1.2 * misses[2]
    assert misses[2] < 0.75  # of a level


@settings(max_examples=4)
@given(lengths=st.lists(st.integers(1, 6), min_size=2, max_size=3))
def test_codes_of_a_padded_batch_are_its_single_items(lengths: list[int]) -> None:
    codec = configured("codec.decoder.iterations=1")
    signal = torch.randn(len(lengths), 1, 200 * max(lengths))
    codes = codec.encode(signal, torch.tensor(lengths))
    for item, length in enumerate(lengths):
        alone = codec.encode(signal[item : item + 1, :, : 200 * length])
        assert torch.equal(codes[item : item + 1, :, :length], alone)


def test_autocast_changes_nothing() -> None:
    encoder, decoder = pair()
    signal = torch.randn(2, 1, 100)
    latents = encoder(signal)
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(encoder(signal), latents, **CLOSE)
        torch.testing.assert_close(paint(decoder, latents), paint(pair()[1], latents), **CLOSE)


def test_levels_that_do_not_rise_are_refused() -> None:
    with pytest.raises(UserError):
        UniformBins(3, smallest=2.0)


def test_bands_of_another_number_are_refused() -> None:
    with pytest.raises(UserError, match="no map"):
        configured("bottleneck.dim=12")


def test_silence_is_finite() -> None:
    encoder, decoder = pair()
    signal = torch.zeros(1, 1, 60, requires_grad=True)
    back = paint(decoder, encoder(signal))
    back.sum().backward()
    assert back.isfinite().all()
    assert signal.grad is not None and signal.grad.isfinite().all()
    codec = configured()
    assert codec.decode(codec.encode(torch.zeros(1, 1, 1600))).abs().max() < 0.02


@pytest.mark.parametrize("change", [{"window": 81}, {"window": 70}], ids=str)
def test_sizes_that_do_not_fit_are_refused(change: dict[str, object]) -> None:
    with pytest.raises(UserError):
        MelDecoder(**SMALL | change)  # type: ignore[arg-type]
