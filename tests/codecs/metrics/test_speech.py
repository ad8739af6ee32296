"""Metrics of speech by networks of packages: parity with small networks in their place, missing packages, silence."""

import importlib.machinery
import sys

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper
from torch import nn

from varitok import UserError
from varitok.codecs.metrics import speech
from varitok.codecs.metrics.speech import METRICS, SpeakerEncoder
from varitok.codecs.modalities.audio import Audio
from varitok.data.synthetic.audio import Voices

RATE = 16_000
NAMES = tuple(metric.name for metric in METRICS)
PACKAGE = {"dnsmos": "speechmos", "speaker": "resemblyzer"}


def voice(index=0, samples=2 * RATE, rate=RATE):
    return Voices(rate, samples, length=8, train=False)[0, index][None]


def measure(name, fake, real, rate=RATE):
    return Audio(rate).comparison(name, "cpu")(fake, real, torch.full((len(real),), real.shape[2])).item()


@pytest.fixture
def packages(tmp_path, monkeypatch):
    """Both packages with small files: DNSMOS's scores are means of the window, the speaker's weights are random."""
    models = tmp_path / "speechmos" / "dnsmos_models"
    models.mkdir(parents=True)
    mean = helper.make_node("ReduceMean", ["input_1"], ["mean"], axes=[1], keepdims=1)
    thrice = helper.make_node("Concat", ["mean"] * 3, ["scores"], axis=1)
    ports = [
        helper.make_tensor_value_info(name, TensorProto.FLOAT, [1, size])
        for name, size in (("input_1", 144_160), ("scores", 3))
    ]
    graph = helper.make_graph([mean, thrice], "mean", ports[:1], ports[1:])
    onnx.save(
        helper.make_model(graph, opset_imports=[helper.make_opsetid("", 13)], ir_version=8), models / "sig_bak_ovr.onnx"
    )
    torch.manual_seed(0)
    lstm, linear = nn.LSTM(40, 256, 3, batch_first=True), nn.Linear(256, 256)
    state = {
        f"{name}.{key}": value
        for name, part in (("lstm", lstm), ("linear", linear))
        for key, value in part.state_dict().items()
    }
    (tmp_path / "resemblyzer").mkdir()
    others = {"similarity_weight": torch.ones(1), "similarity_bias": torch.ones(1)}
    torch.save({"step": 1, "model_state": state | others}, tmp_path / "resemblyzer" / "pretrained.pt")

    def find(name):
        spec = importlib.machinery.ModuleSpec(name, None, is_package=True)
        spec.submodule_search_locations = [str(tmp_path / name)]
        return spec

    monkeypatch.setattr(speech, "find_spec", find)
    return tmp_path


def test_dnsmos_is_the_mean_over_windows_that_begin_each_second(packages):
    # Every second has a level of its own; 12 s have windows from 0, 1 and 2 s, and 3 s are repeated to 12 s.
    for levels in (torch.arange(12), torch.arange(3).repeat(4)):
        real = 0.05 * levels.repeat_interleave(RATE)
        means = [float(real[start : start + 144_160].mean()) for start in (0, RATE, 2 * RATE)]
        wanted = np.mean([-0.06766283 * x**2 + 1.11546468 * x + 0.04602535 for x in means])
        given = real[None, None, : len(levels.unique()) * RATE]
        assert measure("dnsmos", given, given) == pytest.approx(wanted, abs=1e-4)


def test_speakers_are_compared_by_their_embeddings(packages):
    network = SpeakerEncoder(packages / "resemblyzer" / "pretrained.pt")
    one, other = voice(0), voice(4)
    embeddings = [network(sound[0, 0]) for sound in (one, other)]
    assert all(float(vector.norm()) == pytest.approx(1) for vector in embeddings)
    assert measure("speaker", one, one) == pytest.approx(1, abs=1e-5)
    assert measure("speaker", other, one) == pytest.approx(float(embeddings[0] @ embeddings[1]), abs=1e-3)
    assert measure("speaker", one / 64, one) == pytest.approx(1, abs=0.01), "quiet sounds are amplified"
    for samples in (RATE // 10, RATE // 2, 5 * RATE):  # too short, one part, several
        value = measure("speaker", voice(1, samples), voice(2, samples))
        assert np.isnan(value) == (samples < RATE / 5)


def test_parts_cover_the_sound(packages):
    network, seen = SpeakerEncoder(packages / "resemblyzer" / "pretrained.pt"), []
    network.lstm.register_forward_pre_hook(lambda _, given: seen.append(given[0].shape))
    for samples in (1000, 25_600, 38_000, 40_000, 160_000):
        network(torch.zeros(samples))
    assert [shape[0] for shape in seen] == [1, 1, 2, 2, 12] and {shape[1:] for shape in seen} == {(160, 40)}


@pytest.mark.parametrize("name", NAMES)
def test_rates_and_silence(name, packages):
    mute = torch.zeros(1, 1, RATE)
    assert np.isnan(measure(name, voice(samples=RATE), mute)) and np.isfinite(measure(name, mute, voice(samples=RATE)))
    assert np.isfinite(measure(name, voice(rate=24_000), voice(rate=24_000), 24_000))
    with pytest.raises(UserError, match=f"'{name}' needs at least 16000 Hz, and the audio has 8000 Hz"):
        Audio(8_000).comparison(name, "cpu")


@pytest.mark.parametrize("name", NAMES)
def test_a_missing_package_is_named(name, monkeypatch):
    monkeypatch.setitem(sys.modules, PACKAGE[name], None)
    assert name not in Audio(RATE).available()
    with pytest.raises(UserError, match=rf"'{name}' needs the package {PACKAGE[name]}: pip install 'varitok\[speech-m"):
        Audio(RATE).comparison(name, "cpu")


def test_a_file_of_other_weights_is_named(packages):
    torch.save({"model_state": {}}, packages / "resemblyzer" / "pretrained.pt")
    with pytest.raises(UserError, match=r"pretrained.pt: not resemblyzer's weights"):
        Audio(RATE).comparison("speaker", "cpu")


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_the_real_networks_hear_noise(name):
    pytest.importorskip(PACKAGE[name])
    real = voice(samples=10 * RATE)
    values = [measure(name, real + scale * torch.randn_like(real), real) for scale in (0.0, 0.1)]
    assert values[1] < values[0] - 0.05
