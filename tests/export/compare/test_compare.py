"""The comparison with classical codecs: Bjontegaard rates, one protocol for all, mistakes in one line."""

import csv
import json
from dataclasses import replace

import numpy as np
import onnx
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from varitok.codecs.evaluation.table import read_rows
from varitok.export.cli.main import main
from varitok.export.compare import images as pictures
from varitok.export.compare.rates import bd_rate
from varitok.export.report.classics import read_classics

RATES, QUALITY = [10.0, 20.0, 50.0, 90.0], [20.0, 24.0, 27.0, 28.0]
CLASSICAL = {codec.name for codec in pictures.CODECS if not codec.obstacle(0, 3)}


steps_of = st.lists(st.floats(0.1, 9), min_size=6, max_size=6)


@given(st.floats(0.1, 10), steps_of, steps_of)
def test_a_rate_that_is_a_multiple_everywhere_is_that_multiple(factor, steps, rises):
    rates, quality = np.cumsum(steps), np.cumsum(rises)
    assert bd_rate(factor * rates, quality, rates, quality) == pytest.approx(100 * (factor - 1), abs=1e-6)
    assert bd_rate(rates, quality, factor * rates, quality) == pytest.approx(100 * (1 / factor - 1), abs=1e-6)


def test_only_qualities_that_both_reach_count():
    assert np.isnan(bd_rate(RATES, QUALITY, RATES, [value + 100 for value in QUALITY]))
    half = [rate / 2 for rate in RATES]
    assert bd_rate(half[1:], QUALITY[1:], RATES, QUALITY) == pytest.approx(-50, abs=3), "slopes at its end are its own"
    assert bd_rate([5.0], [20.0], RATES, QUALITY) == pytest.approx(-50), "of one point the difference there"
    assert np.isnan(bd_rate([5.0], [float("nan")], RATES, QUALITY))
    assert np.isnan(bd_rate([0.0], [20.0], RATES, QUALITY)), "nothing has no logarithm"
    worse = [*RATES, 70.0], [*QUALITY, 21.0]  # a point that costs more and gives less says nothing
    assert bd_rate(half, QUALITY, *worse) == pytest.approx(-50)


def test_an_analytic_pair_of_curves():
    quality = np.linspace(20, 30, 30)
    # log rates differ by a line from 0 to 0.2: 0.1 in the mean
    ours, theirs = np.exp(quality / 5 + 0.02 * (quality - 20)), np.exp(quality / 5)
    assert bd_rate(ours, quality, theirs, quality) == pytest.approx(100 * (np.exp(0.1) - 1), rel=1e-3)


@pytest.fixture
def photos(tmp_path, monkeypatch):
    monkeypatch.setattr(
        pictures,
        "CODECS",
        tuple(replace(codec, settings=codec.settings[::9]) for codec in pictures.CODECS),
    )
    chance = np.random.default_rng(0)
    for name in ("red", "blue"):
        (tmp_path / "photos" / name).mkdir(parents=True)
        for index in range(3):
            pixels = chance.integers(0, 60, (20, 20, 3))
            pixels[..., 0 if name == "red" else 2] += 180
            Image.fromarray(pixels.astype(np.uint8)).save(tmp_path / "photos" / name / f"{index}.png")
    return tmp_path / "photos"


def run(capsys, *words):
    main(["compare", *map(str, words)])
    return capsys.readouterr().out


def test_all_codecs_are_measured_on_the_same_pictures(exported, photos, tmp_path, capsys):
    out = tmp_path / "out"
    (photos / "red" / "broken.png").write_bytes(b"no picture")
    words = [exported[1], "--data", photos, "--out", out, "--classes", photos / "..", "--metrics", "psnr,ssim"]
    shown = run(capsys, *words)
    assert "written to" in shown and "JPEG 2000" in shown
    header, rows = read_rows(out / "comparison.csv")
    assert {row["codec"] for row in rows} == {"varitok", *CLASSICAL} and {row["images"] for row in rows} == {"6"}
    assert ("JPEG XL" in CLASSICAL) != ("left out, JPEG XL: needs" in header["versions"])
    assert header["unreadable files left out"] == "1" and "red" in header["column accuracy"]
    for row in rows:
        assert 0 <= float(row["bytes"]) <= float(row["file_bytes"])
        assert float(row["file_bpp"]) == pytest.approx(8 * float(row["file_bytes"]) / 16**2, rel=1e-4)
    best = {row["codec"]: row for row in rows}
    assert all(float(best[name]["accuracy"]) > 0.8 for name in CLASSICAL)
    assert all((out / name).stat().st_size for name in ("payload.png", "file.png"))
    with (out / "bd_rate.csv").open() as file:
        gains = list(csv.DictReader(line for line in file if not line.startswith("#")))
    assert len(gains) == len(CLASSICAL) * 2 * 2
    found = read_classics(out / "comparison.csv")
    assert found.noun == "image" and {curve.name for curve in found.curves("bytes", "psnr")} == CLASSICAL


def test_a_classifier_that_is_given_judges_itself(exported, photos, tmp_path, capsys):
    mean = onnx.helper.make_node("ReduceMean", ["x"], ["y"], axes=[2, 3], keepdims=0)
    ports = [
        onnx.helper.make_tensor_value_info(name, 1, shape)
        for name, shape in (("x", ["b", 3, "h", "w"]), ("y", ["b", 3]))
    ]
    graph = onnx.helper.make_graph([mean], "mean", ports[:1], ports[1:])
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 13)], ir_version=8)
    onnx.save(model, tmp_path / "mean.onnx")
    words = [exported[1], "--data", photos, "--out", tmp_path / "out", "--codecs", "jpeg", "--limit", 2, "--json"]
    told = json.loads(run(capsys, *words, "--classifier", tmp_path / "mean.onnx", "--metrics", "psnr"))
    assert {row["codec"] for row in told["rows"]} == {"varitok", "JPEG"} and told["rows"][0]["images"] == 2
    assert all(row["accuracy"] == 1 for row in told["rows"] if row["codec"] == "JPEG")


def test_mistakes_are_one_line(exported, photos, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(pictures, "find_spec", lambda name: None)
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad" / "a.png").write_bytes(b"no picture")
    (tmp_path / "no.onnx").write_bytes(b"no graph")
    folder, out = exported[1], ["--out", tmp_path / "out"]
    for words, message in [
        (["--data", tmp_path / "gone"], "no such file or folder"),
        (["--data", tmp_path / "no.onnx"], "--data has no images"),
        (["--data", photos, "--codecs", "jpg"], "--codecs jpg: not known; did you mean jpeg?"),
        (["--data", photos, "--codecs", "jpeg,jpegxl"], "--codecs JPEG XL: needs the package pillow-jxl-plugin; leave"),
        (["--data", photos, "--metrics", "nice"], "nice"),
        (["--data", photos, "--asr", tmp_path], "--asr: word errors are measured on sounds"),
        (["--data", photos, "--classes", photos / "red"], "give a folder for each class"),
        (["--data", photos, "--classifier", tmp_path / "no.onnx"], "ONNX Runtime can't read it"),
        (["--data", photos, "--limit", 0], "--limit"),
        (["--data", tmp_path / "bad"], "no image could be read; the first that failed"),
    ]:
        with pytest.raises(SystemExit) as left:
            main([*map(str, ["compare", folder, *words, *out])])
        told = capsys.readouterr().err
        assert left.value.code == 2 and told.count("\n") == 1 and message in told, told
