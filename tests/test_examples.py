"""The examples in docstrings of codecs, data, training and exporters run, and return what they show."""

import doctest
from importlib import import_module
from pathlib import Path

import pytest
import torch

import varitok
from varitok.codecs.build import build_codec

from .composing import composed

ROOT = Path(varitok.__file__).parent
FOLDERS = ("codecs", "data", "export/exporters")
MODULES = sorted(
    ".".join(("varitok", *path.relative_to(ROOT).with_suffix("").parts))
    for folder in FOLDERS
    for path in (ROOT / folder).rglob("*.py")
    if ">>> " in path.read_text(encoding="utf-8")
)


@pytest.mark.parametrize("name", MODULES)
def test_examples_return_what_they_show(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    names = {"torch": torch, "codec": build_codec(composed("experiment=image/demo")).eval()}
    result = doctest.testmod(import_module(name), extraglobs=names)
    assert result.attempted and not result.failed
