"""The report of `varitok doctor`, also on a machine that can't train."""

import json
import os
import subprocess
import sys
from collections import namedtuple

import pytest

from varitok.export.cli import doctor
from varitok.export.cli.main import main


def found(capsys, *words):
    try:
        main(["doctor", *words, "--json"])
        status = 0
    except SystemExit as ended:
        status = ended.code
    return json.loads(capsys.readouterr().out), status


@pytest.fixture
def apart(monkeypatch):
    """No processes are started."""
    monkeypatch.setattr(
        doctor, "_meeting", lambda backend: doctor.Finding(backend, "two processes form a process group")
    )


@pytest.mark.slow  # two processes meet
def test_this_machine_can_train(tmp_path, capsys):
    told, status = found(capsys, "--runs", str(tmp_path / "runs"))
    assert status == 0, told
    assert told["gloo"] == {"value": "two processes form a process group", "state": "good"}
    assert {"versions", "clips", "wandb", "runs", "gpus"} <= told.keys()
    assert "torch 2." in told["versions"]["value"] and "MB/s" in told["runs"]["value"]
    assert not (tmp_path / "runs").exists()


def test_what_is_told_of_a_machine(tmp_path, capsys, apart):
    told, status = found(capsys, "--runs", str(tmp_path / "runs"))
    assert status == 0 and {"versions", "clips", "wandb", "runs", "gpus"} <= told.keys()


def test_lines_are_marked(tmp_path, capsys, apart, monkeypatch):
    monkeypatch.setattr(doctor, "mistakes", lambda versions: ["omegaconf 9: too new"])
    with pytest.raises(SystemExit, match="2"):
        main(["doctor", "--runs", str(tmp_path)])
    assert "! version" in capsys.readouterr().out


@pytest.mark.parametrize("where", ["environment", "netrc", "nowhere"])
def test_a_key_is_found_and_not_shown(tmp_path, capsys, apart, monkeypatch, where):
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    if where == "environment":
        monkeypatch.setenv("WANDB_API_KEY", "secret")
    if where == "netrc":
        (tmp_path / ".netrc").write_text("machine api.wandb.ai login user password secret\n")
        (tmp_path / ".netrc").chmod(0o600)
    told, status = found(capsys, "--runs", str(tmp_path))
    assert ("with a key" in told["wandb"]["value"]) is (where != "nowhere")
    assert "secret" not in json.dumps(told) and status == 0


def test_a_full_disk_stops_a_run(tmp_path, capsys, apart, monkeypatch):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(doctor.shutil, "disk_usage", lambda path: usage(10**9, 10**9, 5))
    told, status = found(capsys, "--runs", str(tmp_path))
    assert status == 2 and told["runs"]["value"].endswith("; make room")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_that_can_not_be_written_stops_a_run(tmp_path, capsys, apart):
    tmp_path.chmod(0o500)
    told, status = found(capsys, "--runs", str(tmp_path))
    assert status == 2 and "can't be written" in told["runs"]["value"]


@pytest.mark.slow
def test_processes_that_do_not_meet_are_told(monkeypatch):
    assert "can't form a process group" in doctor._meeting("no_such_backend").value
    monkeypatch.setattr(doctor, "PATIENCE", 0.0)
    assert doctor._meeting("gloo") == doctor.Finding("gloo", "two processes formed no process group in 0 s", "bad")


def test_without_torch_it_tells_what_to_install(tmp_path):
    program = (
        "import sys; from varitok.export.cli import doctor; doctor.installed_versions = lambda: {};"
        f"doctor.main(['--runs', {str(tmp_path)!r}])"
    )
    shown = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert shown.returncode == 2 and "pip install 'varitok[train]'" in shown.stdout
