"""Gaussian bounds: reverse water-filling's closed forms, and the table of small folders."""

import importlib.util
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from varitok.codecs.evaluation.table import read_rows

ROOT = Path(__file__).resolve().parents[2]
EMBEDDED = ROOT / "data" / "embedded"


@pytest.fixture(scope="module")
def script():
    spec = importlib.util.spec_from_file_location("benchmark_bounds", ROOT / "benchmarks" / "bounds.py")
    module = sys.modules["benchmark_bounds"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def run(script, capsys, *words):
    with pytest.raises(SystemExit) as left:
        script.main([*map(str, words)])
    told = capsys.readouterr().err
    assert left.value.code == 2 and told.count("\n") == 1, told
    return told


@given(st.lists(st.floats(1e-6, 1e6), min_size=1, max_size=40), st.floats(0.01, 500))
def test_bits_are_spent_down_to_one_level(script, variances, bits):
    variances = np.array([*variances, 0.0])
    rates = script.allot(variances, bits)
    left = variances * 2 ** (-2 * rates)
    level = left.max()
    assert rates.sum() == pytest.approx(bits) and rates.min() == 0
    np.testing.assert_allclose(left, np.minimum(variances, level), rtol=1e-6)


def test_white_noise_and_colors_have_their_closed_forms(script):
    random = np.random.default_rng(0)
    white = random.normal(0, 3, (4000, 1, 4, 4))
    for error, bits in zip(script.bound(white, white, (16, 64)), (16, 64), strict=True):
        assert error == pytest.approx(9 * 2 ** (-2 * bits / 16), rel=0.02)
    # One color in three copies needs the bits of one, in which every bit halves the error three times as fast.
    gray = np.repeat(white, 3, 1)
    assert script.bound(gray, gray, (64,))[0] == pytest.approx(script.bound(white, white, (64,))[0], rel=1e-6)


def test_a_smooth_signal_is_cheaper_and_a_strange_one_dearer(script):
    random = np.random.default_rng(1)
    smooth = random.normal(0, 1, (500, 2, 8)).cumsum(2)
    smooth /= smooth.std()
    noise = random.normal(0, 1, (500, 2, 8))
    alike, other = script.bound(smooth, smooth, (8,))[0], script.bound(noise, noise, (8,))[0]
    assert alike < 0.7 * other < script.bound(smooth, noise, (8,))[0]


def test_mistakes_are_one_line(script, tmp_path, capsys):
    assert "give --photos, --speech, --clips" in run(script, capsys)
    assert str(tmp_path) in run(script, capsys, "--photos", tmp_path, tmp_path)


@pytest.mark.slow
def test_the_table_has_rows_of_each_kind(script, tmp_path):
    folders = [word for name in ("photos", "speech", "clips") for word in (f"--{name}", *[str(EMBEDDED / name)] * 2)]
    script.main([*folders, "--out", str(tmp_path / "bounds.csv")])
    header, rows = read_rows(tmp_path / "bounds.csv")
    assert header["command"].startswith("python benchmarks/bounds.py --photos")
    assert [row["signals"] for row in rows] == [name for name, kind in script.KINDS.items() for _ in kind.bits]
    for name, kind in script.KINDS.items():
        values = [float(row[kind.column]) for row in rows if row["signals"] == name]
        assert values == sorted(values, reverse=kind.column == "spectral_error") and len(set(values)) == len(values)
