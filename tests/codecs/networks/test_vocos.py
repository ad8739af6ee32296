"""The decoder with an inverse Fourier transform: the transform itself, and the whole network."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from varitok import UserError
from varitok.codecs.networks.layers.sequence import SequenceTransformer
from varitok.codecs.networks.layers.stft import ISTFT
from varitok.codecs.networks.mel import MelFeatures
from varitok.codecs.networks.patch_codec import PatchEncoder
from varitok.codecs.networks.vocos import VocosDecoder

from .checks import check_causal, check_lengths, check_onnx, check_padding, check_script, paint

HOP = 6
PLAIN = {"width": 4, "base": 8, "hidden": 16, "depth": 2, "hop_length": HOP, "window": 24, "groups": 2}
KINDS = {
    "wavtokenizer": PLAIN | {"attention": True},
    "vocos": PLAIN | {"channels": 2, "window": 12},
    "causal": PLAIN | {"causal": True},
    "x_codec": PLAIN | {"depth": 0},
    "mel": PLAIN | {"at_start": True},
}
CHANNELS = {"vocos": 2}


def codec(kind: str) -> tuple[PatchEncoder | MelFeatures, VocosDecoder]:
    """Make a decoder and some encoder of its hop; spectra begin loud enough that errors would show."""
    torch.manual_seed(0)
    causal = kind == "causal"
    middle = SequenceTransformer(8, 1, 2, window=3, layer_scale=1.0) if kind == "x_codec" else None
    decoder = VocosDecoder(**KINDS[kind], middle=middle)  # type: ignore[arg-type]
    for weight in decoder.parameters():
        weight.data.add_(0.2 * torch.randn_like(weight))
    if kind == "mel":
        features = MelFeatures(sample_rate=8000, bands=4, window=24, hop_length=HOP, floor=1e-2, at_start=True)
        return features.eval(), decoder.eval()
    encoder = PatchEncoder(
        width=4, base=8, patch=HOP, strides=[1], depths=[1], heads=2, causal=causal, layer_scale=1.0,
        channels=CHANNELS.get(kind, 1),
    )  # fmt: skip
    return encoder.eval(), decoder.eval()


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=4)
@given(tokens=st.integers(1, 9))
def test_lengths_are_exact(kind: str, tokens: int) -> None:
    check_lengths(codec(kind), tokens, CHANNELS.get(kind, 1))


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=4)
@given(lengths=st.lists(st.integers(1, 6), min_size=2, max_size=3), garbage=st.floats(-3, 3))
def test_a_padded_batch_is_its_single_items(kind: str, lengths: list[int], garbage: float) -> None:
    check_padding(codec(kind), lengths, garbage, CHANNELS.get(kind, 1))


@settings(max_examples=6)
@given(cut=st.integers(1, 5))
def test_a_causal_decoder_does_not_see_what_comes(cut: int) -> None:
    check_causal(codec("causal"), cut)


@pytest.mark.parametrize("kind", KINDS)
def test_they_script(kind: str) -> None:
    check_script(codec(kind), CHANNELS.get(kind, 1))


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_they_export(kind: str) -> None:
    check_onnx(codec(kind), CHANNELS.get(kind, 1))


def spectra(window: int, frames: int) -> tuple[Tensor, Tensor]:
    real, imaginary = torch.randn(2, 2, window // 2 + 1, frames).unbind(0)
    return real, imaginary


@settings(max_examples=25)
@given(downsample=st.integers(1, 40), overlap=st.integers(2, 5), frames=st.integers(2, 12))
def test_the_transform_is_torchs(downsample: int, overlap: int, frames: int) -> None:
    window = downsample * overlap * (2 if downsample * overlap % 2 else 1)
    transform = ISTFT(window, downsample)
    real, imaginary = spectra(window, frames)
    ours = transform(real, imaginary)
    assert ours.shape == (2, 1, frames * downsample)
    # torch cuts half a window, we half a window less half a hop; it refuses an edge where no window reaches.
    left = window // 2 - (window - downsample) // 2
    expected = torch.istft(torch.complex(real, imaginary), window, downsample, window=torch.hann_window(window))
    common = min(expected.shape[1], ours.shape[2] - left)
    torch.testing.assert_close(ours[:, 0, left : left + common], expected[:, :common], atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("window", [64, 1280])
def test_a_sound_comes_back(window: int) -> None:
    hop, frames = window // 4, 9
    signal = torch.randn(1, frames * hop)
    pad = (window - hop) // 2
    spectrum = torch.stft(
        torch.nn.functional.pad(signal, (pad, pad)), window, hop, window=torch.hann_window(window), center=False,
        return_complex=True,
    )  # fmt: skip
    again = ISTFT(window, hop)(spectrum.real, spectrum.imag)[:, 0]
    torch.testing.assert_close(again, signal, atol=1e-5, rtol=1e-5)


def test_a_sound_comes_back_causally_where_its_frames_are_whole() -> None:
    window, hop, frames = 32, 8, 9
    signal = torch.randn(1, (frames - 1) * hop + window)
    spectrum = torch.stft(signal, window, hop, window=torch.hann_window(window), center=False, return_complex=True)
    again = ISTFT(window, hop, causal=True)(spectrum.real, spectrum.imag)[:, 0]
    # The first samples lack the frames that would have begun before.
    torch.testing.assert_close(again[:, window - hop :], signal[:, window - hop : frames * hop], atol=1e-5, rtol=1e-5)


def test_a_chunk_and_what_overlaps_make_the_whole_of_a_causal_transform() -> None:
    """The streaming form that the module promises: frames before a chunk matter as far as a window reaches."""
    transform = ISTFT(24, 6, causal=True)
    real, imaginary = spectra(24, 9)
    whole = transform(real, imaginary)
    part = transform(real[..., 2:], imaginary[..., 2:])
    torch.testing.assert_close(part[..., 3 * 6 :], whole[..., 5 * 6 :], atol=1e-5, rtol=1e-5)


def test_loud_spectra_stay_finite() -> None:
    _, decoder = codec("vocos")
    decoder.out.bias.data.fill_(1e4)
    assert paint(decoder, torch.randn(1, 3, 4)).isfinite().all()


def test_the_transform_is_in_float32_whatever_the_autocast() -> None:
    _, decoder = codec("vocos")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert paint(decoder, torch.randn(1, 3, 4)).dtype == torch.float32


@pytest.mark.parametrize(
    ("wrong", "told"),
    [
        ({"window": 20}, "2 or more times hop_length=6"),
        ({"window": 6}, "2 or more times hop_length=6"),
        ({"hop_length": 5, "window": 15}, "even"),
        ({"causal": True, "attention": True}, "looks ahead"),
        ({"causal": True, "at_start": True}, "at_start=true looks ahead"),
        ({"attention": True, "groups": 3}, "3 groups"),
    ],
)
def test_mistakes_are_told(wrong: dict[str, object], told: str) -> None:
    with pytest.raises(UserError, match=told):
        VocosDecoder(**(PLAIN | wrong))  # type: ignore[arg-type]
