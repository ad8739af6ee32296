"""A run and a bundle made by commit 1dbdf91, before rooms, classes and keys had the names of today."""

import csv
import json
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import varitok
from varitok.codecs.build import load_run
from varitok.export.cli.main import main

ARCHIVE = Path(__file__).parent / "audio_1dbdf91.tar.xz"


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("run")
    with tarfile.open(ARCHIVE) as archive:
        archive.extractall(folder, filter="data")
    return folder


def table(path: Path) -> list[dict[str, str]]:
    lines = [line for line in path.read_text().splitlines() if not line.startswith("#")]
    return list(csv.DictReader(lines))


def test_its_bundle_decodes_what_it_decoded(run: Path) -> None:
    golden = load_file(run / "bundle" / "golden.safetensors")
    signal, codes, back = (golden[name] for name in ("input_values", "audio_codes", "audio_values.7"))
    bundle = varitok.load(run / "bundle")
    assert bundle.codebook_sizes == (16, 16, 16)
    assert np.array_equal(bundle.encode(signal.numpy(), bundle.sample_rate), codes.numpy())
    np.testing.assert_allclose(bundle.decode(codes.numpy()), back.numpy(), atol=1e-4)
    module = varitok.load_torch(run / "bundle")
    assert torch.equal(module.encode(signal), codes)
    torch.testing.assert_close(module.decode(codes), back, atol=1e-4, rtol=0)


def test_its_checkpoint_is_evaluated_as_it_was(run: Path, tmp_path: Path) -> None:
    main(["evaluate", str(run), "--workers", "0", "--out", str(tmp_path)])
    now, before = table(tmp_path / "evaluation.csv"), table(run / "evaluation" / "evaluation.csv")
    assert [row.pop("codebooks") for row in now] == [row.pop("books") for row in before]
    for new, old in zip(now, before, strict=True):
        # At -44 dB nothing of the signal is left to be projected on: processors' roundings show.
        assert float(new.pop("si_sdr")) == pytest.approx(float(old.pop("si_sdr")), abs=0.05)
        assert {name: float(new[name]) for name in old} == pytest.approx(
            {n: float(v) for n, v in old.items()}, rel=1e-4, nan_ok=True
        ), "six digits are recorded, and the fifth of a spectral distance depends on the processor"


@pytest.mark.slow
def test_its_checkpoint_is_exported(run: Path, tmp_path: Path) -> None:
    main(["export", str(run), "--out", str(tmp_path / "bundle")])
    golden = load_file(run / "bundle" / "golden.safetensors")
    bundle = varitok.load(tmp_path / "bundle")
    assert np.array_equal(bundle.encode(golden["input_values"].numpy(), 4000), golden["audio_codes"].numpy())
    assert "codebook_sizes" in json.loads((tmp_path / "bundle" / "config.json").read_text())


def test_its_configuration_builds_the_codec_of_its_checkpoint(run: Path) -> None:
    codec, config = load_run(run)
    assert config.bottleneck.num_codebooks == 3 and config.data.downsample == 80 and config.training.ema_decay == 0.99
    assert codec.bottleneck.codebook_sizes == (16, 16, 16)
