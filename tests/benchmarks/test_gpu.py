"""The measurement on a GPU, tried on the CPU: each section runs, and what ends one loses nothing and ends no other."""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


def run(folder, *words):
    """Run the command on the CPU; return its status and results."""
    command = [sys.executable, "-m", "benchmarks.gpu", "--out", str(folder), "--device", "cpu", "--tiny", *words]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert "Traceback" not in done.stderr, done.stderr
    return done.returncode, json.loads((folder / "results.json").read_text())["sections"]


@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_every_section_measures(tmp_path):
    status, sections = run(tmp_path, "--minutes", "20")
    log = (tmp_path / "log.txt").read_text()
    assert status == 0 and {section["status"] for section in sections.values()} == {"ok"}, log
    assert len(sections) == 10 and all(section["rows"] for section in sections.values())
    rows = {name: section["rows"] for name, section in sections.items()}
    assert {row["outcome"] for name in ("parity", "waits", "processes") for row in rows[name]} == {"passed"}
    assert rows["parity"][0]["measured"]["frozen, equal codes"] == 1
    assert rows["quantizers"][0]["peer / ours"] > 0 and rows["training"][0]["TFLOP an update"] > 0
    table = (tmp_path / "table.md").read_text()
    assert all(f"## {name} (ok, " in table for name in sections)


@pytest.mark.slow
def test_a_section_is_stopped_at_its_limit_and_the_next_one_runs(tmp_path):
    status, sections = run(tmp_path, "--only", "attention", "quantizers", "--minutes", "0.02")
    assert status == 1
    assert [section["status"] for section in sections.values()] == ["stopped at its limit of 1 s"] * 2


def test_an_error_is_a_row_and_every_process_adds_to_the_same_files(tmp_path):
    spec = importlib.util.spec_from_file_location("gpu_report", ROOT / "benchmarks/gpu/report.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    report = module.Report(tmp_path / "out")
    report.begin({"command": "python"})
    with report.case("speed", "large", batch=64) as row:
        row["ms"] = 12.0
        raise RuntimeError("out\nof memory")
    assert report.errors == 1
    with module.Report(tmp_path / "out").case("speed", "small") as row:
        row["measured"] = {"a|b": 0.123456}
    report.section("speed", asks="How fast?", status="ok", seconds=1.5)
    lines = (tmp_path / "out/table.md").read_text().splitlines()
    assert lines[0] == "- command: python" and "## speed (ok, 2 s)" in lines
    assert lines[-2:] == ["| large | 64 | 12 | RuntimeError: out of memory |  |", "| small |  |  |  | a/b 0.1235 |"]
    saved = json.loads((tmp_path / "out/results.json").read_text())["sections"]["speed"]
    assert [row["case"] for row in saved["rows"]] == ["large", "small"] and saved["asks"] == "How fast?"
