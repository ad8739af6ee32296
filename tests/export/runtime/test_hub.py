"""Bundles on the hub, by a stand-in that is a folder: what goes there, what comes from there, and what doesn't."""

import fnmatch
import json
import shutil
from types import SimpleNamespace

import numpy as np
import pytest

import varitok
from varitok import UserError
from varitok.export.cli.main import main
from varitok.export.runtime import hub

from ...codecs.examples import SIZE


class RepositoryNotFoundError(Exception):
    pass


class LocalTokenNotFoundError(Exception):
    pass


@pytest.fixture
def shelf(tmp_path, monkeypatch):
    """A hub whose repositories are folders."""
    root = tmp_path / "hub"
    (root / "cache").mkdir(parents=True)

    def copied(source, target, patterns):
        for path in source.rglob("*"):
            name = path.relative_to(source).as_posix()
            if path.is_file() and any(fnmatch.fnmatch(name, pattern) for pattern in patterns):
                (target / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(path, target / name)

    class Api:
        def create_repo(self, name, private, exist_ok):
            if name.startswith("nobody/"):
                raise LocalTokenNotFoundError("token is required\nand more lines")
            (root / name).mkdir(parents=True, exist_ok=exist_ok)
            (root / name / "private").write_text(str(private))

        def upload_folder(self, repo_id, folder_path, allow_patterns, commit_message):
            from pathlib import Path

            copied(Path(folder_path), root / repo_id, allow_patterns)
            return f"hub/{repo_id}"

    def snapshot_download(name, revision, allow_patterns, local_dir):
        from pathlib import Path

        if not (root / name).is_dir() or revision == "gone":
            raise RepositoryNotFoundError("404")
        target = Path(local_dir) if local_dir else root / "cache" / name.replace("/", "--")
        copied(root / name, target, allow_patterns)
        return str(target)

    stand_in = SimpleNamespace(HfApi=Api, snapshot_download=snapshot_download)
    monkeypatch.setattr(hub, "_hub", lambda: stand_in)
    return root


def refused(capsys, *words):
    with pytest.raises(SystemExit) as left:
        main([*map(str, words)])
    told = capsys.readouterr().err
    assert left.value.code == 2 and told.count("\n") == 1
    return told


def test_a_bundle_goes_there_and_comes_back(exported, shelf, tmp_path, capsys):
    folder = shutil.copytree(exported[1], tmp_path / "bundle")
    (folder / "notes.txt").write_text("mine alone")
    main(["push", str(folder), "me/tokenizer", "--private"])
    assert "hub/me/tokenizer" in capsys.readouterr().out and (shelf / "me/tokenizer/private").read_text() == "True"
    there = shelf / "me" / "tokenizer"
    assert (there / "codec.ts").is_file() and not (there / "notes.txt").exists()
    (there / "extra.py").write_text("print('not mine')")
    main(["pull", "me/tokenizer", "--out", str(tmp_path / "back")])
    assert not (tmp_path / "back" / "extra.py").exists() and not (tmp_path / "back" / "codec.ts").exists()
    pixels = np.random.default_rng(0).integers(0, 256, (SIZE, SIZE, 3), dtype=np.uint8)
    wanted = varitok.load(exported[1]).encode(pixels)
    for place in (tmp_path / "back", "hf://me/tokenizer", "hf://me/tokenizer@v1"):
        assert np.array_equal(varitok.load(place).encode(pixels), wanted)
    main(["pull", "me/tokenizer", "--out", str(tmp_path / "trusted"), "--trust"])
    assert (tmp_path / "trusted" / "codec.ts").is_file()


def test_what_can_not_be_is_told_in_one_line(exported, shelf, tmp_path, capsys):
    main(["push", str(exported[1]), "me/tokenizer"])
    (shelf / "me" / "other").mkdir()
    capsys.readouterr()
    assert "there is no such repository" in refused(capsys, "pull", "me/gone", "--out", tmp_path / "a")
    assert "there is no such repository" in refused(capsys, "pull", "me/tokenizer@gone", "--out", tmp_path / "b")
    assert "has no bundle of varitok" in refused(capsys, "pull", "me/other", "--out", tmp_path / "c")
    (tmp_path / "there").mkdir()
    (tmp_path / "there" / "file").write_text("x")
    assert "already exists" in refused(capsys, "pull", "me/tokenizer", "--out", tmp_path / "there")
    assert "you are not logged in" in refused(capsys, "push", exported[1], "nobody/tokenizer")
    assert "is " in refused(capsys, "push", tmp_path, "me/tokenizer")
    altered = shelf / "me" / "tokenizer" / "onnx" / "decoder_model.onnx"
    altered.write_bytes(altered.read_bytes()[:-1])
    assert "differs from its checksum" in refused(capsys, "pull", "me/tokenizer", "--out", tmp_path / "d")
    with pytest.raises(UserError, match="differs from its checksum"):
        varitok.load("hf://me/tokenizer")


def test_names_that_lead_elsewhere_are_not_followed(exported, shelf, tmp_path):
    main(["push", str(exported[1]), "me/tokenizer"])
    path = shelf / "me" / "tokenizer" / "export.json"
    told = json.loads(path.read_text())
    told["files"]["../../outside"] = {"sha256": "0" * 64, "bytes": 1}
    path.write_text(json.dumps(told))
    (shelf / "outside").write_text("never read")
    hub.download("me/tokenizer", tmp_path / "back")


def test_without_the_package_it_is_named(monkeypatch, capsys):
    import sys

    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    assert "pip install 'varitok[hub]'" in refused(capsys, "pull", "me/tokenizer", "--out", "nowhere")
