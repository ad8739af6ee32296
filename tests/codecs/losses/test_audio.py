"""Terms that compare sounds: spectra, mel bands, signal to distortion."""

import math

import pytest
import torch
import torchaudio

from varitok import UserError
from varitok.codecs.losses.spectral import SISDR, MultiResolutionSTFT, MultiScaleMel
from varitok.codecs.networks.layers.stft import Spectrum

RATE = 16000
ENCODEC = {
    "windows": (64, 128, 256, 512, 1024),
    "bands": 64,
    "low": 64.0,
    "formula": "htk",
    "power": 2.0,
    "normalized": True,
    "magnitude": 1.0,
    "squared": True,
    "scale": 0.1,
}
TERMS = {
    "dac": lambda: MultiScaleMel(RATE),
    "encodec": lambda: MultiScaleMel(RATE, **ENCODEC),
    "stft": MultiResolutionSTFT,
    "stft_quarters": lambda: MultiResolutionSTFT((2048, 512), None, None, convergence=0.0, magnitude=1.0, scale=1.0),
    "si_sdr": SISDR,
}


def sounds(b=3, c=1, t=4000):
    """A chord in noise, and the same with more noise."""
    random = torch.Generator().manual_seed(0)
    time = torch.arange(t) / RATE
    tones = torch.stack([(2 * math.pi * f * time).sin() for f in (220.0, 1100.0, 3700.0)]).mean(0)
    real = 0.5 * tones + 0.02 * torch.randn(b, c, t, generator=random)
    return (real + 0.1 * torch.randn(real.shape, generator=random)).requires_grad_(), real, torch.full((b,), t)


@pytest.mark.parametrize("name", TERMS)
def test_silence_gives_no_nonsense(name):
    for fake, real in ((0.0, 0.0), (0.1, 0.0), (0.0, 0.1)):
        one = (fake * torch.randn(2, 1, 3000)).requires_grad_()
        value = TERMS[name]()(one, real * torch.randn(2, 1, 3000), torch.tensor([3000, 0]))
        value.backward()
        assert value.isfinite() and one.grad.isfinite().all()


@pytest.mark.parametrize("name", TERMS)
def test_terms_are_float32_under_autocast(name):
    fake, real, lengths = sounds()
    plain = TERMS[name]()(fake, real, lengths)
    with torch.autocast("cpu", torch.bfloat16):
        cast = TERMS[name]()(fake, real, lengths)
    assert cast.dtype == torch.float32
    torch.testing.assert_close(cast, plain)


@pytest.mark.parametrize("formula", ["slaney", "htk"])
@pytest.mark.parametrize(("power", "normalized"), [(1.0, False), (2.0, True)])
def test_mel_bands_are_torchaudios(formula, power, normalized):
    _, real, lengths = sounds(c=2)
    term = MultiScaleMel(
        RATE, (256, 512), (20, 40), low=50.0, formula=formula, power=power, normalized=normalized
    )  # fmt: skip
    for index, (window, bands) in enumerate(((256, 20), (512, 40))):
        transform = torchaudio.transforms.MelSpectrogram(
            RATE,
            window,
            hop_length=window // 4,
            n_mels=bands,
            f_min=50.0,
            power=power,
            normalized=normalized,
            pad_mode="constant",
            norm="slaney" if formula == "slaney" else None,
            mel_scale=formula,
        )
        got, valid = term.spectrogram(real, lengths, index)
        torch.testing.assert_close(got, transform(real).transpose(2, 3), atol=1e-5, rtol=1e-4)
        assert valid.sum(1).tolist() == [math.ceil(4000 / (window // 4))] * 3


def test_dacs_mel_is_the_sum_over_windows_of_log10_differences():
    """A sound ten times as loud differs by 1 in every band of every window."""
    _, real, lengths = sounds()
    term = MultiScaleMel(RATE, (256, 512, 1024), 10, floor=1e-9)
    torch.testing.assert_close(term(10 * real, real, lengths).item(), 3.0, atol=1e-3, rtol=0)


def test_encodecs_mel_adds_powers_and_squared_logarithms():
    """Ten times as loud: power differs by 99 times itself, its log10 by 2, squared 4."""
    _, real, lengths = sounds()
    bands = {**ENCODEC, "windows": (512,), "bands": 10, "floor": 1e-12, "scale": 1.0}
    only = MultiScaleMel(RATE, **{**bands, "logarithm": 0.0})
    both = MultiScaleMel(RATE, **bands)
    power, valid = only.spectrogram(real, lengths)
    plain = 99 * power[:, :, valid[0]].mean()
    torch.testing.assert_close(only(10 * real, real, lengths), plain, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(both(10 * real, real, lengths), plain + 4, rtol=1e-4, atol=1e-3)


def test_spectral_convergence_and_logarithms_are_as_defined():
    """Half as loud: the difference has half the norm, and the logarithms differ by ln 2."""
    _, real, lengths = sounds()
    converged = MultiResolutionSTFT(logarithm=0.0)(real / 2, real, lengths)
    torch.testing.assert_close(converged.item(), 0.5, atol=1e-3, rtol=0)
    logarithms = MultiResolutionSTFT(convergence=0.0, floor=1e-9)(real / 2, real, lengths)
    torch.testing.assert_close(logarithms.item(), math.log(2), atol=1e-3, rtol=0)


def test_a_pause_does_not_drown_the_others():
    """Its spectrum has next to no norm; divided by it, an error that nobody hears would outweigh a voice's."""
    real = 1e-6 * torch.randn(1, 1, 4000, generator=torch.Generator().manual_seed(0))
    fake = 1e-3 * torch.randn(1, 1, 4000, generator=torch.Generator().manual_seed(1))
    assert MultiResolutionSTFT(logarithm=0.0)(fake, real, torch.tensor([4000])) < 0.2


def test_si_sdr_is_known_and_deaf_to_scale_and_offset():
    time = torch.arange(1600) / RATE
    real, noise = (2 * math.pi * 100 * time).sin()[None, None], 0.1 * (2 * math.pi * 200 * time).sin()[None, None]
    lengths, term = torch.tensor([1600]), SISDR()
    assert term(real + noise, real, lengths).item() == pytest.approx(-20, abs=1e-2)
    assert term(0.3 * (real + noise) + 0.2, real, lengths).item() == pytest.approx(-20, abs=1e-2)


def test_a_constant_factor_is_heard_by_mel_and_not_by_si_sdr():
    _, real, lengths = sounds()
    assert MultiScaleMel(RATE)(0.5 * real, real, lengths) > 0.5
    assert SISDR()(0.5 * real, real, lengths) == pytest.approx(SISDR()(real, real, lengths).item(), abs=0.1)


def test_a_spectrums_buffers_are_not_saved():
    assert not MultiScaleMel(RATE).state_dict() and not MultiResolutionSTFT().state_dict()


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: MultiScaleMel(RATE, (256, 512), (20,)), r"mel\.bands: 1 numbers for 2 windows"),
        (lambda: MultiResolutionSTFT((256, 512), (64,)), "stft: 2 transforms, 1 hops"),
        (lambda: Spectrum(256, 300), "hop_length=300"),
        (lambda: Spectrum(256, 64, 512), "window=512"),
    ],
)
def test_sizes_that_do_not_fit_are_named(make, words):
    with pytest.raises(UserError, match=words):
        make()
