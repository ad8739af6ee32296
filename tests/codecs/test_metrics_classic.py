"""The comparison with classic codecs: what is counted, what is chosen, the whole script."""

import csv
import importlib.util
import sys
from io import BytesIO
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from PIL import Image

from varitok.codecs.metrics.table import Table

SCRIPT = Path(__file__).resolve().parents[2] / "benchmarks" / "classic_images.py"


@pytest.fixture(scope="module")
def classic() -> ModuleType:
    spec = importlib.util.spec_from_file_location("classic_images", SCRIPT)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    sys.modules["classic_images"] = module
    spec.loader.exec_module(module)
    return module


def _picture(seed: int, side: int = 64) -> Image.Image:
    y, x = np.mgrid[:side, :side] / side
    noise = np.random.default_rng(seed).normal(0, 12, (side, side, 3))
    return Image.fromarray((np.stack([200 * x, 180 * y, 90 * (x + y)], -1) + noise).clip(0, 255).astype(np.uint8))


def _save(kind: str, seed: int = 0, **options: object) -> bytes:
    buffer = BytesIO()
    _picture(seed).save(buffer, kind, **options)
    return buffer.getvalue()


def test_jpeg_payload_is_what_lies_between_the_scan_header_and_the_end(classic: ModuleType) -> None:
    data = _save("JPEG", quality=50)
    start = data.index(b"\xff\xda")
    header = int.from_bytes(data[start + 2 : start + 4], "big")
    assert classic.payload("JPEG", data) == len(data) - (start + 2 + header) - 2
    progressive = _save("JPEG", quality=50, progressive=True)
    assert progressive.count(b"\xff\xda") > 1 and 0 < classic.payload("JPEG", progressive) < len(progressive)


def test_webp_payload_is_the_file_without_20_bytes(classic: ModuleType) -> None:
    for seed in range(6):
        data = _save("WEBP", seed, quality=10 + seed)
        assert len(data) - 21 <= classic.payload("WEBP", data) <= len(data) - 20  # one byte of padding, maybe


def test_metadata_is_not_payload(classic: ModuleType) -> None:
    exif = Image.Exif()
    exif[0x010E] = "a long description" * 20
    for kind in ("JPEG", "WEBP"):  # AVIF keeps metadata in the picture's box; the script writes none
        plain, described = _save(kind, quality=50), _save(kind, quality=50, exif=exif)
        assert len(described) > len(plain) + 300
        assert classic.payload(kind, described) == classic.payload(kind, plain)


def test_avif_payload_is_most_of_what_is_left_when_boxes_are_gone(classic: ModuleType) -> None:
    sizes = [(len(data), classic.payload("AVIF", data)) for data in (_save("AVIF", quality=q) for q in (1, 50))]
    (small, small_payload), (large, large_payload) = sizes
    assert small - small_payload == large - large_payload > 100  # the boxes around are the same
    assert 0 < small_payload < large_payload


def test_the_nearest_setting_is_taken_and_the_better_of_equals(classic: ModuleType) -> None:
    measured = classic.Measured(
        file=torch.tensor([[100, 200, 300], [110, 150, 150]]),
        payload=torch.tensor([[10, 110, 210], [20, 60, 60]]),
        psnr=torch.tensor([[20.0, 25.0, 30.0], [21.0, 26.0, 27.0]]),
        ssim=torch.tensor([[0.2, 0.5, 0.9], [0.3, 0.6, 0.7]]),
    )
    by_file = classic.nearest(measured, "file", 160)
    assert by_file == pytest.approx({"bytes": 175, "psnr": 26, "ssim": 0.6, "at_smallest": 0}, abs=1e-6)
    tiny = classic.nearest(measured, "payload", 3)
    assert tiny == pytest.approx({"bytes": 15, "psnr": 20.5, "ssim": 0.25, "at_smallest": 1}, abs=1e-6)


def test_the_script_writes_its_table_and_plots(classic: ModuleType, tmp_path: Path, capsys, monkeypatch) -> None:
    monkeypatch.setattr(classic, "FORMATS", {k: f._replace(qualities=(5, 60)) for k, f in classic.FORMATS.items()})
    for split in ("train", "val"):
        (tmp_path / "images" / split).mkdir(parents=True)
    for seed in range(2):
        _picture(seed).save(tmp_path / "images" / "val" / f"{seed}.png")
    row = {"bytes": 40, "psnr": 20.0, "ssim": 0.5, "images": 2}
    Table([{"k": 1, **row}, {"k": 9, **row, "bytes": 900}]).write_csv(tmp_path / "ours.csv")
    words = [str(tmp_path / "images"), "--out", str(tmp_path / "results" / "name"), "--table"]
    classic.main([*words, str(tmp_path / "ours.csv")])
    lines = (tmp_path / "results" / "name.csv").read_text().splitlines()
    rows = list(csv.DictReader(line for line in lines if not line.startswith("#")))
    assert len(rows) == 2 * (1 + 3 * 2) and {row["codec"] for row in rows} == {"varitok", "JPEG", "WEBP", "AVIF"}
    whole = [row for row in rows if row["codec"] == "JPEG" and row["counted"] == "file" and row["k"] == "1"]
    assert float(whole[0]["bytes"]) > 40 and whole[0]["at_smallest"] == "1"
    assert (tmp_path / "results" / "name_file.png").is_file() and (tmp_path / "results" / "name_payload.png").is_file()

    Table([{"k": 1, **row, "images": 3}]).write_csv(tmp_path / "other.csv")
    with pytest.raises(SystemExit) as caught:
        classic.main([*words, str(tmp_path / "other.csv")])
    error = capsys.readouterr().err
    assert caught.value.code == 2 and "gives 2 images" in error and error.count("\n") == 1
