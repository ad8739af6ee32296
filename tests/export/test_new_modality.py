"""A new modality, 1-D sensor signals, is one class for torch and one for bundles: all commands take it then."""

import json
from contextlib import contextmanager

import numpy as np
import pytest
import torch
from torch.nn import functional

import varitok
from varitok import UserError
from varitok.codecs.bottlenecks.residual import residual
from varitok.codecs.bottlenecks.vq import EMAVectorQuantizer
from varitok.codecs.codec import Codec
from varitok.codecs.evaluation.evaluate import evaluate
from varitok.codecs.evaluation.figure import label_of
from varitok.codecs.evaluation.table import read_csv
from varitok.codecs.lengths.distributions import Full, Uniform
from varitok.codecs.lengths.policy import Axis, LengthPolicy, Truncate
from varitok.codecs.metrics.metric import Column, Metric, stateless
from varitok.codecs.modalities import registry
from varitok.codecs.modalities.base import GraphNames, Modality
from varitok.codecs.networks.conv_codec import ConvDecoder, ConvEncoder
from varitok.codecs.training.callbacks.samples import reconstructions
from varitok.data.batch import Sample, collate
from varitok.export.adapters.codec import BundleCodec
from varitok.export.bitstream import container
from varitok.export.cli.main import main
from varitok.export.exporters.bundle import export_bundle
from varitok.export.runtime import load as loading
from varitok.export.runtime.bundle import Bundle
from varitok.export.runtime.files import SignalFile

CHANNELS, HOP = 5, 8


def correlation(fake, real, lengths):
    return functional.cosine_similarity(fake.flatten(1), real.flatten(1))


class Sensor(Modality):
    name = "sensor"
    noun = kind = "recording"
    grid = "t"
    graph = GraphNames("sensor_values", "sensor_codes", "reconstruction", ("num_samples",), ("num_tokens",))
    rounding = "none"
    metrics = (
        Metric("correlation", "r", "{:.3f}", "correlation", "mean over recordings", build=stateless(correlation)),
        Metric(
            "max_error", "worst", "{:.3f}", definition="largest error", higher_is_better=False,
            build=stateless(lambda fake, real, lengths: (fake - real).abs().amax((1, 2))),
        ),
    )  # fmt: skip
    shown = ("correlation", "max_error")
    rate = Column("bps", "bits/sample", "{:.3f}", "bits per sample", "bits / samples")

    @classmethod
    def recognizes(cls, codec):
        return len(codec.downsample) == 1 and codec.sample_rate is None

    def as_written(self, signal):
        return signal.float()

    def amount(self, signal, lengths):
        return float(lengths.sum())

    def write_samples(self, stem, rows, scale=1):
        path = stem.with_suffix(".json")
        path.write_text(json.dumps({label: [signal.tolist() for signal in signals] for label, signals in rows}))
        return path, {}

    def describe(self, codec, size):
        return {"hop_length": codec.downsample[0]}


class SensorBundle(Bundle):
    modality = "sensor"
    counted = "samples"
    suffixes = (".npy",)
    written = ("npy",)

    def _read(self):
        super()._read()
        self.hops = (int(self.config["hop_length"]),)

    def values(self, signal):
        return np.asarray(signal, np.float32).reshape(1, self.channels, -1)

    @contextmanager
    def open_file(self, path):
        signal = self.values(np.load(path))
        yield SignalFile(signal.shape[2], lambda count: iter([signal]))

    def write_file(self, chunks, facts, to, file):
        signal = np.concatenate(list(chunks), axis=2)[0]
        np.save(file, signal)
        return {"samples": signal.shape[1]}

    def describe_signals(self):
        return f"recordings of {self.channels} channels"

    def describe_rates(self):
        return {"rates": {"all codebooks": f"{self.bits(1) / self.hops[0]:g} bits a sample"}}


@pytest.fixture
def codec(monkeypatch):
    """Add both classes where a newcomer adds them, and return a codec of such signals."""
    monkeypatch.setitem(registry.MODALITIES, Sensor.name, Sensor)
    for column in (Sensor.rate, *Sensor.metrics):
        monkeypatch.setitem(registry.COLUMNS, column.name, column)
    for metric in Sensor.metrics:
        monkeypatch.setitem(registry.METRICS, metric.name, metric)
    monkeypatch.setitem(loading.BUNDLES, SensorBundle.modality, SensorBundle)
    monkeypatch.setattr(container, "MODALITIES", (*container.MODALITIES, SensorBundle.modality))
    torch.manual_seed(0)
    sizes = {"channels": CHANNELS, "width": 16, "base": 8, "strides": [2, 4], "dilations": [3]}
    length = LengthPolicy(Full(), Truncate(), codebooks=Axis(Uniform()))
    return Codec(
        ConvEncoder(**sizes), residual(lambda: EMAVectorQuantizer(16, 32), 3), ConvDecoder(**sizes, tanh=True), length
    ).eval()


def recordings():
    return [torch.rand(CHANNELS, length, generator=torch.Generator().manual_seed(length)) - 0.5 for length in (40, 61)]


def test_it_is_measured_and_drawn(codec, tmp_path):
    batch = collate([Sample(signal) for signal in recordings()])
    table = evaluate(codec, [batch], header={"dataset": "made"})
    table.write_csv(tmp_path / "evaluation.csv")
    (*_, row) = read_csv(tmp_path / "evaluation.csv").rows
    assert row["recordings"] == 2 and row["correlation"] <= 1 and row["bps"] > 0
    table.plot(tmp_path / "evaluation.png")
    assert (tmp_path / "evaluation.png").is_file()
    assert label_of("max_error") == "worst (lower is better)" and label_of("correlation") == "correlation"
    rows = reconstructions(codec, batch)
    picture, _ = registry.modality_of(codec).write_samples(tmp_path / "x", rows)
    assert picture.is_file()
    with pytest.raises(UserError, match="metric 'psnr' is unknown; recordings have correlation, max_error"):
        evaluate(codec, [batch], metrics=["psnr"])


@pytest.mark.slow
def test_it_is_exported_and_its_files_are_coded(codec, tmp_path, capsys):
    bundle = tmp_path / "bundle"
    export_bundle(codec, bundle, streaming=False)
    assert "A codec of sensor signals" in (bundle / "README.md").read_text()
    loaded = varitok.load(bundle)
    assert isinstance(loaded, SensorBundle) and loaded.config["token_layout"] == "b q t"
    table = evaluate(BundleCodec(loaded), [collate([Sample(signal)]) for signal in recordings()])
    assert table.rows[-1]["recordings"] == 2
    np.save(tmp_path / "a.npy", recordings()[1].numpy())
    main(["encode", str(bundle), str(tmp_path / "a.npy")])
    main(["decode", str(bundle), str(tmp_path / "a.vtk"), "--out", str(tmp_path / "back")])
    back = np.load(tmp_path / "back" / "a.npy")
    with torch.inference_mode():
        whole = codec.decode(codec.encode(recordings()[1][None]))[0, :, :61].numpy()
    np.testing.assert_allclose(back, whole, atol=1e-4)
    assert "61 samples" in capsys.readouterr().out
    for path in (bundle, tmp_path / "a.vtk"):
        main(["info", str(path)])
        assert "sensor" in capsys.readouterr().out
