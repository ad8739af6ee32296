"""The driver of twins: equal core-seconds, resumed runs, and verdicts that follow from the results."""

import subprocess
import sys
from importlib import util
from pathlib import Path
from types import ModuleType

import pytest
import yaml

from ..codecs.examples import TINY_RUN
from ..composing import composed

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "benchmarks" / "twins.py"


@pytest.fixture(scope="module")
def twins() -> ModuleType:
    spec = util.spec_from_file_location("benchmark_twins", SCRIPT)
    assert spec and spec.loader
    module = util.module_from_spec(spec)
    sys.modules["benchmark_twins"] = module
    spec.loader.exec_module(module)
    return module


def results(**values: list[float]) -> list[dict[str, str]]:
    """Return rows of a twin called "pair", a value for each seed of each arm."""
    row = {"twin": "pair", "updates": "10", "core_seconds": "", "bits": "96", "metric": "psnr"}
    return [
        row | {"arm": arm, "seed": str(seed), "value": str(value)}
        for arm, seen in values.items()
        for seed, value in enumerate(seen)
    ]


@pytest.mark.parametrize(
    ("first", "other", "lower", "expected"),
    [
        ([20.3, 20.4], [20.0, 20.1], False, "shown"),
        ([20.3, 20.4], [20.0, 20.1], True, "against"),
        ([20.0, 20.1], [20.3, 20.4], True, "shown"),
        ([20.3, 20.4], [20.2, 20.25], False, "not shown"),  # apart by less than a seed changes
        ([20.3, 20.4], [20.35, 20.2], False, "not shown"),
        ([20.0, 20.1], [20.3, 20.4], False, "against"),
        ([20.9], [20.0, 20.1], False, "one seed"),
    ],
)
def test_a_difference_counts_beyond_what_seeds_change(twins, first, other, lower, expected):
    assert twins.verdict(first, other, lower) == expected


def test_the_page_says_what_each_arm_is_and_refuses_unequal_bits(twins):
    twin = twins.Twin("A is ahead", 60, "images", ["psnr", "ssim"], ["experiment=x"], {"a": [], "b": ["bottleneck=vq"]})
    rows = results(a=[20.3, 20.4], b=[20.0, 20.1])
    lines = twins.page({"pair": twin, "untried": twin}, rows).splitlines()
    assert "A is ahead. 96 bits, 60 core-seconds; all arms: `experiment=x`." in lines
    assert lines[-2:] == ["| a | none | 10 | 20.35 ± 0.05 |  |", "| b | `bottleneck=vq` | 10 | 20.05 ± 0.05 | shown |"]
    rows[0]["bits"] = "97"
    with pytest.raises(ValueError, match="pair: arms of 96, 97 bits"):
        twins.page({"pair": twin}, rows)


def test_the_page_is_that_of_the_results(twins):
    made = twins.page(
        twins.read_twins(SCRIPT.with_suffix(".yaml")), twins.read_results(ROOT / "benchmarks/results/twins.csv")
    )
    assert (ROOT / "benchmarks/twins.md").read_text(encoding="utf-8") == made, "run benchmarks/twins.py --judge"


@pytest.mark.slow
def test_every_arm_composes(twins):
    for twin in twins.read_twins(SCRIPT.with_suffix(".yaml")).values():
        for arm in twin.arms:
            assert composed(*twin.overrides(arm, Path("data"), 3)).seed == 3


@pytest.mark.slow
def test_an_arm_is_trained_once_and_for_its_seconds(twins, tmp_path):
    common = [word for word in TINY_RUN if word.startswith(("experiment", "data", "codec"))]
    entry = {"claim": "None", "seconds": 4, "data": None, "metrics": ["psnr", "ssim"], "common": common}
    entry["arms"] = {"vq": ["bottleneck=vq"], "fsq": []}
    (tmp_path / "table.yaml").write_text(yaml.safe_dump({"pair": entry}))
    command = [sys.executable, str(SCRIPT), "--folder", str(tmp_path / "runs"), "--seeds", "1"]
    for option, file in (("--table", "table.yaml"), ("--out", "out.csv"), ("--page", "page.md")):
        command += [option, str(tmp_path / file)]

    def run(*words: str) -> list[dict[str, str]]:
        subprocess.run([*command, *words], check=True, capture_output=True, text=True)
        rows: list[dict[str, str]] = twins.read_results(tmp_path / "out.csv")
        return rows

    first = run("--arms", "vq")
    assert {row["metric"] for row in first} == {"psnr", "ssim"} and float(first[0]["core_seconds"]) > 4
    trained = tmp_path / "runs/pair/vq/seed_1/metrics.csv"
    before = trained.read_bytes()
    rows = run()
    assert rows[:2] == first and trained.read_bytes() == before
    assert [row["arm"] for row in rows] == ["vq", "vq", "fsq", "fsq"] and len({row["bits"] for row in rows}) == 1
    assert "one seed" in (tmp_path / "page.md").read_text()
