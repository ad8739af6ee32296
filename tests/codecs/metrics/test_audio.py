"""Comparisons of sounds: known values, what padding and silence do, packages that may be missing."""

import math
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torchaudio.functional import melscale_fbanks, resample

from varitok import UserError
from varitok.codecs.metrics.audio import METRICS, round_to_16_bits
from varitok.codecs.modalities.audio import Audio
from varitok.data.synthetic.audio import Voices

RATE = 16_000
BASIC = ("mel", "stft", "si_sdr")
SPEECH = ("stoi", "estoi", "pesq")
PACKAGE = {"stoi": "pystoi", "estoi": "pystoi", "pesq": "pesq"}
BEST = {"mel": 0.0, "stft": 0.0, "si_sdr": 80.0, "stoi": 1.0, "estoi": 1.0, "pesq": 4.6439}


@pytest.fixture(autouse=True)
def installed(request):
    """Pass over what needs a package that isn't there, unless the test puts one in its place."""
    name = getattr(request.node, "callspec", SimpleNamespace(params={})).params.get("name")
    if name in PACKAGE and "monkeypatch" not in request.fixturenames:
        pytest.importorskip(PACKAGE[name])


def voice(index=0, samples=2 * RATE, rate=RATE):
    """A voice `(1, 1, t)`; those of 0, 1, 2 and 4 have pauses."""
    return Voices(rate, samples, length=8, train=False)[0, index][None]


def noise(like, seed=0, scale=1.0):
    return scale * torch.randn(like.shape, generator=torch.Generator().manual_seed(seed))


def measure(name, fake, real, lengths=None, rate=RATE):
    lengths = torch.full((len(real),), real.shape[2]) if lengths is None else torch.tensor(lengths)
    return Audio(rate).comparison(name, "cpu")(fake, real, lengths)


@pytest.mark.parametrize("name", BEST)
def test_identity_is_the_best_and_noise_makes_it_worse(name):
    real = voice()
    values = [measure(name, real + noise(real, scale=scale), real).item() for scale in (0.0, 0.003, 0.03, 0.3)]
    assert values[0] == pytest.approx(BEST[name], abs=1e-4)
    assert values == sorted(values, reverse=name not in ("mel", "stft")) and len(set(values)) == 4


@pytest.mark.parametrize("decibels", [-10.0, 0.0, 12.5, 40.0])
def test_si_sdr_of_noise_at_a_known_distance(decibels):
    real = noise(torch.empty(1, 1, 20_000), 1, 0.1)
    real -= real.mean()
    other = noise(real, 2)
    other -= other.mean()
    other -= (other * real).sum() / real.square().sum() * real  # nothing of the signal is in it
    other *= (real.square().sum() / other.square().sum()).sqrt() * 10 ** (-decibels / 20)
    loudness = 0.5 / (real + other).abs().max()
    for scale, offset in ((1.0, 0.0), (-0.7, 0.1), (0.5, -0.2)):  # neither scale, nor sign, nor offset count
        assert measure("si_sdr", scale * loudness * (real + other) + offset, real) == pytest.approx(decibels, abs=0.01)


@pytest.mark.parametrize("rate", [RATE, 44_100])
def test_spectral_distances_of_a_known_gain(rate):
    random = np.random.default_rng(0)
    # Multiples of four steps of 16 bits: a half and a quarter of them are exact.
    real = torch.from_numpy(random.integers(-5000, 5001, (1, 1, rate)) * 4 / 32768).float()
    heard = 0.0  # share of the bands that hold a line at all, over windows
    for window, bands in zip((32, 64, 128, 256, 512, 1024, 2048), (5, 10, 20, 40, 80, 160, 320), strict=True):
        bank = melscale_fbanks(window // 2 + 1, 0.0, rate / 2, bands, rate, norm="slaney", mel_scale="slaney")
        heard += (bank.sum(0) > 0).float().mean().item()
    for gain in (0.5, 0.25):
        assert measure("mel", gain * real, real).item() == pytest.approx(-math.log10(gain) * heard, rel=1e-3)
        assert measure("stft", gain * real, real).item() == pytest.approx(-math.log10(gain) * 2, rel=1e-3)


@pytest.mark.parametrize("name", BEST)
def test_padding_and_neighbors_change_nothing(name):
    lengths = [2 * RATE, 20_001, RATE]
    real = torch.cat([voice(index) for index in (0, 1, 2)])
    fake = real + noise(real, scale=0.02)
    alone = [
        measure(name, fake[i : i + 1, :, :length], real[i : i + 1, :, :length]) for i, length in enumerate(lengths)
    ]
    dirty_fake, dirty_real = fake.clone(), real.clone()
    for row, length in enumerate(lengths):
        dirty_fake[row, :, length:] = math.nan
        dirty_real[row, :, length:] = 9.0
    together = measure(name, dirty_fake, dirty_real, lengths)
    assert together.shape == (3,) and together.dtype == torch.float32 and together.isfinite().all()
    assert torch.equal(together, torch.cat(alone))


@pytest.mark.parametrize("name", BEST)
def test_channels_are_averaged_and_silent_ones_left_out_where_nothing_can_be_said(name):
    left, right = voice(0), voice(4)
    fakes = left + noise(left, 1, 0.01), right + noise(right, 2, 0.05)
    one, other = (measure(name, fake, real).item() for fake, real in zip(fakes, (left, right), strict=True))
    assert one != other
    both = measure(name, torch.cat(fakes, 1), torch.cat([left, right], 1))
    assert both.item() == pytest.approx((one + other) / 2, rel=1e-4)
    if name not in ("mel", "stft"):
        mute = torch.zeros_like(left)
        assert measure(name, torch.cat([fakes[0], mute], 1), torch.cat([left, mute], 1)).item() == pytest.approx(one)


@pytest.mark.parametrize("name", BEST)
def test_silence(name):
    real, mute = voice(), torch.zeros(1, 1, 2 * RATE)
    lost = measure(name, mute, real).item()
    if name in ("mel", "stft"):
        assert measure(name, mute, mute) == 0
        assert lost == pytest.approx(measure(name, real, mute).item()) and lost > measure(name, -real / 8, real)
        return
    for original in (mute, mute + 0.25):
        assert measure(name, mute, original).isnan() and measure(name, real, original).isnan()
    assert lost == pytest.approx({"si_sdr": -80, "stoi": 0, "estoi": 0, "pesq": 0.999}[name], abs=0.01)
    assert lost <= measure(name, noise(real, scale=0.3), real) + 0.01  # worse than noise or as bad


@pytest.mark.parametrize("name", BEST)
@pytest.mark.parametrize("length", [1, 2, 3, 17, 31, 100, 399, 1000, 2047, 3999, 6000])
def test_short_sounds_have_a_value_or_none(name, length):
    real = voice()[:, :, 8000 : 8000 + length]
    value = measure(name, real + 0.01 * noise(real), real)
    if name in ("mel", "stft"):
        assert value.isfinite() and value > 0
    elif name == "si_sdr":
        assert value.isnan() == (length == 1)  # one sample is its own mean
    else:
        assert value.isnan() == (length < (4000 if name == "pesq" else 7000))


@pytest.mark.parametrize("rate", [8_000, 11_025, 16_000, 22_050, 24_000, 44_100, 48_000])
def test_rates_leave_a_value_where_the_metric_is_available(rate):
    real = voice(rate=rate, samples=rate)
    names = tuple(name for name in Audio(rate).available() if name in BEST)
    assert names[:3] == BASIC and ("pesq" not in names or rate >= 16_000) and ("stoi" not in names or rate >= 10_000)
    for name in names:
        assert measure(name, real + noise(real, scale=0.01), real, rate=rate).isfinite()
        assert measure(name, real, real, rate=rate).item() == pytest.approx(BEST[name], abs=1e-4)


@pytest.mark.parametrize("name", BEST)
def test_both_sides_are_compared_as_16_bits(name):
    real = voice().mul(32768).round().div(32768).clamp(-1, 1 - 2**-15)
    assert measure(name, real + 0.4 / 32768, real - 0.4 / 32768).item() == pytest.approx(BEST[name], abs=1e-4)
    loud = 3 * real
    assert torch.equal(measure(name, 2 * loud, loud), measure(name, (2 * loud).clamp(-1, 1), loud.clamp(-1, 1)))


def test_what_is_written_is_on_the_grid_of_16_bits():
    signal = torch.tensor([[-2.0, -1.0, -0.6 / 32768, 0.0, 0.4 / 32768, 0.6 / 32768, 1.0]])
    assert torch.equal(round_to_16_bits(signal) * 32768, torch.tensor([[-32768.0, -32768.0, -1, 0, 0, 1, 32767]]))
    assert round_to_16_bits(signal.half()).dtype == torch.float32


@pytest.mark.parametrize("name", BASIC)
def test_what_cannot_be_compared_is_said_in_a_line(name):
    real = voice(samples=4000)
    for value in (math.nan, math.inf):
        broken = real.clone()
        broken[0, 0, 50] = value
        for sides in ((broken, real), (real, broken)):
            with pytest.raises(UserError, match="NaN or infinite"):
                measure(name, *sides)
        assert measure(name, broken, real, [50]).isfinite()  # it is in the padding
    with pytest.raises(UserError, match="shapes"):
        measure(name, real[:, :, 1:], real)
    with pytest.raises(UserError, match="shapes"):
        Audio(RATE).comparison(name, "cpu")(real[0], real[0], torch.tensor([4000]))
    for length in (0, 4001):
        with pytest.raises(UserError, match=f"{length} samples.*from 1 to 4000"):
            measure(name, real, real, [length])


def test_names_are_checked():
    with pytest.raises(UserError, match="'visqol' is unknown; sounds have mel, stft, si_sdr, stoi, estoi, pesq"):
        Audio(RATE).comparison("visqol", "cpu")
    for name, rate in (("stoi", 8000), ("estoi", 9999), ("pesq", 8000)):
        with pytest.raises(UserError, match=rf"'{name}' needs at least \d+ Hz.*{rate} Hz"):
            Audio(rate).comparison(name, "cpu")
    definitions = Audio(12345).definitions([metric.name for metric in METRICS], 0)
    assert all("12345 Hz" in definition and "{" not in definition for definition in definitions.values())
    assert set(definitions) == set(BEST)


@pytest.mark.parametrize("name", SPEECH)
def test_a_missing_package_is_named_and_its_metrics_not_listed(name, monkeypatch):
    for package in ("pystoi", "pesq", "speechmos", "resemblyzer"):
        monkeypatch.setitem(sys.modules, package, None)
    assert Audio(48_000).available() == BASIC
    with pytest.raises(UserError, match=rf"'{name}' needs the package {PACKAGE[name]}: pip install") as caught:
        Audio(RATE).comparison(name, "cpu")
    assert "\n" not in str(caught.value) and "audio-metrics" in str(caught.value)


class _Pesq:
    """In place of the package: the score of a part is its length in seconds."""

    class NoUtterancesError(Exception):
        pass

    class BufferTooShortError(Exception):
        pass

    def __init__(self):
        self.parts = []

    def pesq(self, rate, original, decoded, mode):
        assert (rate, mode) == (RATE, "wb") and original.shape == decoded.shape
        self.parts.append((original, decoded))
        if not np.abs(decoded).max() > 0:
            raise self.NoUtterancesError
        return len(original) / rate


@pytest.mark.parametrize(("seconds", "parts"), [(1, 1), (20, 1), (21, 2), (50, 3)])
def test_pesq_gets_no_more_than_it_has_room_for(seconds, parts, monkeypatch):
    package = _Pesq()
    monkeypatch.setitem(sys.modules, "pesq", package)
    real = noise(torch.empty(1, 1, seconds * RATE), scale=0.1)
    fake = real + 0.01
    assert measure("pesq", fake, real).item() == pytest.approx(seconds / parts, rel=1e-4)
    assert len(package.parts) == parts and all(len(original) <= 20 * RATE for original, _ in package.parts)
    for index, side in enumerate((real, fake)):  # nothing is lost, and sides are not mixed up
        assert np.array_equal(
            np.concatenate([pair[index] for pair in package.parts]), round_to_16_bits(side)[0, 0].numpy()
        )


def test_pesq_of_lost_speech_is_the_worst_and_pauses_of_the_original_have_none(monkeypatch):
    monkeypatch.setitem(sys.modules, "pesq", _Pesq())
    real = noise(torch.empty(1, 1, 40 * RATE), scale=0.1)
    fake = real.clone()
    fake[:, :, : 20 * RATE] = 0
    assert measure("pesq", fake, real).item() == pytest.approx((0.999 + 20) / 2, rel=1e-4)
    assert measure("pesq", real, fake).item() == pytest.approx(20, rel=1e-4)


def test_pesq_survives_more_utterances_than_the_package_has_room_for():
    pytest.importorskip("pesq")
    burst = torch.cat([torch.hann_window(6400), torch.zeros(8000)]).repeat(70)  # 63 s
    real = 0.3 * burst * noise(burst)
    fake = real + noise(real, 1, 0.02)
    assert 1.5 < measure("pesq", fake[None, None], real[None, None]) < 3
    short = 11 * 14400
    assert 1.5 < measure("pesq", fake[None, None, :short], real[None, None, :short]) < 3


def test_pesq_hears_at_16_khz():
    pesq = pytest.importorskip("pesq")
    real = voice(rate=24_000, samples=48_000)
    fake = real + noise(real, scale=0.005)
    sides = [resample(round_to_16_bits(side)[0, 0], 24_000, 16_000).numpy() for side in (real, fake)]
    assert measure("pesq", fake, real, rate=24_000).item() == pytest.approx(pesq.pesq(16_000, *sides, "wb"))


@pytest.mark.parametrize("name", ["stoi", "estoi"])
def test_stoi_is_deaf_to_level_and_leaves_chance_alone(name):
    real = voice()
    fake = real + noise(real, scale=0.02)
    one = measure(name, fake, real).item()
    assert measure(name, fake / 2, real).item() == pytest.approx(one, abs=2e-3)
    # It is the published correlation on the half that the reconstruction has, and none on the lost half.
    half = fake.clone()
    half[:, :, RATE:] = 0
    values = []
    for seed in (3, 4):
        np.random.seed(seed)
        expected = np.random.random()
        np.random.seed(seed)
        values.append(measure(name, half, real).item())
        assert np.random.random() == expected
    assert values[0] == values[1] and 0.2 * one < values[0] < 0.8 * one


def test_stoi_and_its_extension_are_the_package_s_own():
    pystoi = pytest.importorskip("pystoi")
    real = voice(rate=24_000, samples=48_000)
    fake = real + noise(real, scale=0.05)
    sides = [round_to_16_bits(side)[0, 0].double().numpy() for side in (real, fake)]
    values = [measure(name, fake, real, rate=24_000).item() for name in ("stoi", "estoi")]
    expected = [pystoi.stoi(*sides, 24_000, extended=extended) for extended in (False, True)]
    assert values == pytest.approx(expected, rel=1e-5) and values[1] < values[0] - 0.02
