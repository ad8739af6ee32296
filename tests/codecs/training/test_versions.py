"""Versions that are known to be bad are reported in one line, before anything is loaded that may fail."""

import subprocess
import sys
from pathlib import Path

import pytest

from varitok.codecs.training.versions import installed_versions, mistakes

ROOT = Path(__file__).parents[3]
GOOD = {
    "pytorch-lightning": "2.6.6",
    "omegaconf": "2.3.1",
    "torch": "2.14.1",
    "torchvision": "0.29.1",
    "torchaudio": "2.11.0",
}


def test_what_is_installed_here_is_good():
    assert "torch" in installed_versions() and mistakes(installed_versions()) == []


@pytest.mark.parametrize("minor", [11, 12, 13, 14])
def test_matching_versions_are_good(minor):
    matching = {"torch": f"2.{minor}.0+cu126", "torchvision": f"0.{minor + 15}.0+cu126"}
    assert mistakes(GOOD | matching, (3, 12)) == []
    assert mistakes({}, (3, 10)) == []


@pytest.mark.parametrize(
    ("bad", "told"),
    [
        ({"pytorch-lightning": "2.6.2"}, "pytorch-lightning 2.6.2 is a malicious upload"),
        ({"lightning": "2.6.3"}, "lightning 2.6.3 is a malicious upload"),
        ({"omegaconf": "2.4.0"}, "pip install 'omegaconf<2.4'"),
        ({"torch": "2.15.0"}, "torch 2.15.0: varitok runs on 2.11 to 2.14"),
        ({"torch": "2.10.1"}, "torch 2.10.1: varitok runs on 2.11 to 2.14"),
        (
            {"torchvision": "0.28.0"},
            "torchvision 0.28.0 is not made for torch 2.14.1; pip install 'torchvision==0.29.*'",
        ),
        ({"torchaudio": "2.10.0"}, "torchaudio 2.10.0 is not made for torch 2.14.1; pip install 'torchaudio==2.11.*'"),
        (
            {"torch": "2.14.1+cpu", "torchaudio": "2.11.0+cpu"},
            "torchvision 0.29.1 does not load beside torch 2.14.1+cpu",
        ),
    ],
)
def test_a_bad_version_is_named(bad, told):
    (line,) = mistakes(GOOD | bad, (3, 12))
    assert told in line and "\n" not in line


def test_a_python_that_hydra_does_not_know_is_named():
    assert "Python 3.14" in mistakes(GOOD, (3, 14))[0]


def test_train_tells_before_hydra_is_loaded(tmp_path):
    """Beside omegaconf 2.4 Hydra fails in its own way; here nothing of it can be imported at all."""
    about = tmp_path / "omegaconf-2.4.0.dist-info"
    about.mkdir()
    (about / "METADATA").write_text("Metadata-Version: 2.1\nName: omegaconf\nVersion: 2.4.0\n")
    for name in ("hydra", "omegaconf", "torch"):
        (tmp_path / f"{name}.py").write_text("raise ImportError('loaded')\n")
    program = (
        "import sys, runpy; sys.path.insert(0, sys.argv[1]); runpy.run_path(sys.argv[2], run_name='varitok.train')"
    )
    command = [sys.executable, "-c", program, str(tmp_path), str(ROOT / "train.py")]
    shown = subprocess.run(command, capture_output=True, text=True, check=False)
    assert shown.returncode == 2
    assert shown.stderr == "error: omegaconf 2.4.0: Hydra 1.3 does not work with it; pip install 'omegaconf<2.4'\n"
