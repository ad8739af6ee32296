"""Folders as data sets: training files, held-out files, and the message if there are none."""

import hashlib
import logging
import os
import shutil
import tarfile
import tempfile
from pathlib import Path
from urllib.error import URLError

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from varitok import UserError
from varitok.data.cli.shards import main as shards
from varitok.data.datasets.base import download_or_raise
from varitok.data.storage.listing import list_splits, name_in

SUFFIXES = (".wav", ".flac")


def _fill(root: Path, *names: str) -> None:
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(b"x")


def _splits(root: Path, val_share: float = 0.25) -> tuple[list[str], list[str]]:
    train, val = list_splits(root, val_share, SUFFIXES, "sound")
    return [name_in(root, file) for file in train], [name_in(root, file) for file in val]


def test_files_of_a_wanted_suffix_are_found_at_any_depth_in_order(tmp_path):
    _fill(tmp_path, "b.wav", "a/c/D.FLAC", "a.txt", "wav", "train.md")
    (tmp_path / "folder.wav").mkdir()
    train, val = _splits(tmp_path)
    assert sorted(train + val) == ["a/c/D.FLAC", "b.wav"]
    assert train == sorted(train)


ORDINARY = st.from_regex(r"([a-c][a-c.\-]{0,2}[a-c]/){0,3}[a-d]{1,2}(\.[a-d])?\.(wav|FLAC|txt)", fullmatch=True)


@settings(deadline=None, max_examples=5)
@given(names=st.sets(ORDINARY, min_size=2, max_size=25), share=st.floats(0, 0.99))
def test_an_ordinary_folder_has_the_files_it_always_had(names, share):
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        _fill(root, "a.wav", "b.wav", *names)
        files = sorted(path for path in root.rglob("*") if path.suffix.lower() in SUFFIXES and path.is_file())
        known = [path.relative_to(root).as_posix() for path in files]
        ranked = sorted(known, key=lambda name: hashlib.sha256(name.encode()).hexdigest())
        held = ranked[: min(len(known) - 1, max(1, round(share * len(known))))]
        expected = [name for name in known if name not in held], [name for name in known if name in held]
        assert _splits(root, share) == expected
        shards([folder, "--out", f"{folder}/../{root.name}.shards"])
        packed = root.with_name(f"{root.name}.shards")
        assert _splits(packed, share) == expected, "shards have the splits of their folder"
        shards([str(packed)])
        assert _splits(packed, share) == expected, "an index that is built again has them too"
        shutil.rmtree(packed)


@pytest.mark.parametrize(("share", "held"), [(0.25, 10), (0.1, 4), (0.0, 1), (0.99, 39)])
def test_a_share_is_held_out_and_neither_split_is_empty(tmp_path, share, held):
    _fill(tmp_path, *(f"{index}.wav" for index in range(40)))
    train, val = _splits(tmp_path, share)
    assert len(val) == held
    assert not set(train) & set(val)
    assert len(train) + len(val) == 40


def test_a_test_set_is_in_both_splits(tmp_path):
    _fill(tmp_path, *(f"{index}.wav" for index in range(40)))
    train, val = _splits(tmp_path, 1.0)
    assert len(val) == 40 and train == val


def test_what_is_held_out_hangs_on_names_below_the_folder_alone(tmp_path):
    names = [f"{index % 3}/{index}.wav" for index in range(20)]
    _fill(tmp_path / "here", *names)
    _fill(tmp_path / "there", *reversed(names))
    assert _splits(tmp_path / "here") == _splits(tmp_path / "there")
    assert _splits(tmp_path / "here")[1] != sorted(names)[:5]  # not merely the first


HELD_OUT = ("val", "Val", "valid", "VALIDATION", "dev", "eval", "test", "Testing")


@pytest.mark.parametrize("held", HELD_OUT)
@pytest.mark.parametrize("train", ["train", "Training"])
@pytest.mark.parametrize("packed", [False, True])
def test_subfolders_of_many_names_are_the_splits(tmp_path, train, held, packed):
    _fill(tmp_path / "sounds", f"{train}/a.wav", f"{train}/b.b.wav", f"{held}/x/c.wav", "labels/d.wav")
    root = tmp_path / "sounds"
    if packed:
        root = tmp_path / "shards"
        shards([str(tmp_path / "sounds"), "--out", str(root)])
    found = list_splits(root, 0.25, SUFFIXES, "sound")
    names = [[name_in(root / part, file) for file in files] for part, files in zip((train, held), found, strict=True)]
    assert names == [["a.wav", "b.b.wav"], ["x/c.wav"]]


def test_a_test_set_beside_a_validation_set_is_left_alone(tmp_path):
    _fill(tmp_path, "train/a.wav", "train/b.wav", "val/x/c.wav", "test/d.wav")
    assert _splits(tmp_path) == (["train/a.wav", "train/b.wav"], ["val/x/c.wav"])


@pytest.mark.parametrize(
    ("names", "told"),
    [
        (("train/a", "val/b", "dev/c"), "has train/ beside dev/ beside val/; keep one folder for training and one"),
        (("train/a", "Train/b", "test/c"), "has Train/ beside train/ beside test/; keep one"),
        (("train2017/a", "val2017/b"), "has train2017/ beside val2017/, which look like splits; give a folder"),
        (("x/train-clean-100/1/a", "x/dev-clean/1/b"), "has x/train-clean-100/ beside x/dev-clean/, which look like"),
        (("a/b/train/a", "a/b/test/b", "c"), "has a/b/train/ beside a/b/test/, which look like splits"),
        (("a", "test/b"), "has test/, but no train/; move the training files to train/, or rename test/"),
        (("cats/a", "Eval/b"), "has Eval/, but no train/; move"),
    ],
)
def test_folders_of_which_one_may_be_held_out_are_refused(tmp_path, names, told):
    _fill(tmp_path, *(f"{name}.wav" for name in names))
    for call in (lambda: _splits(tmp_path), lambda: shards([str(tmp_path), "--out", str(tmp_path / "shards")])):
        with pytest.raises(UserError) as error:
            call()
        assert f"data.root={tmp_path}: {told}" in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("name", ["train", "test", "cats"])
def test_a_subfolder_alone_is_a_folder_like_any_other(tmp_path, name):
    _fill(tmp_path, *(f"{name}/{index}.wav" for index in range(8)))
    assert len(_splits(tmp_path)[1]) == 2


@pytest.mark.parametrize(
    ("link", "target", "told"),
    [
        ("train/a/b.wav", "test/x.wav", "train/a/b.wav and test/x.wav"),
        ("train/a/b", "test", "train/a/b/x.wav and test/x.wav"),
        ("test/z.wav", "train/y.wav", "train/y.wav and test/z.wav"),
    ],
)
def test_a_link_from_one_split_into_the_other_is_refused(tmp_path, link, target, told):
    _fill(tmp_path, "train/y.wav", "train/a/c.wav", "test/x.wav", "elsewhere/d.wav")
    (tmp_path / "train/d.wav").symlink_to(tmp_path / "elsewhere/d.wav")
    assert _splits(tmp_path) == (["train/a/c.wav", "train/d.wav", "train/y.wav"], ["test/x.wav"])
    (tmp_path / link).symlink_to(tmp_path / target)
    with pytest.raises(UserError, match=f"^[^\n]*: {told} are one file; remove the link, [^\n]*$"):
        _splits(tmp_path)


def test_one_file_is_both_splits(tmp_path):
    _fill(tmp_path, "a.wav")
    assert _splits(tmp_path) == (["a.wav"], ["a.wav"])


def test_a_folder_without_a_sound_is_told(tmp_path):
    _fill(tmp_path, "train/a.wav", "val/a.txt", "val/._a.wav")
    told = r"data\.root=.*val: no sound in this folder \(looked for \.wav \.flac\); skipped 1 \.txt, 1 hidden$"
    with pytest.raises(UserError, match=told):
        _splits(tmp_path)
    with pytest.raises(UserError, match=r"data\.root=.*nowhere: no such folder"):
        _splits(tmp_path / "nowhere")


def test_a_start_logs_one_line_of_what_was_found(tmp_path, caplog):
    caplog.set_level(
        logging.INFO, "varitok.data.storage.listing"
    )  # a run's other ranks turn it up, in this process too
    _fill(tmp_path, "train/a.wav", "train/b\n.wav", "train/.b.wav", "test/c.wav", "test/c.txt", "dev.txt")
    os.mkfifo(tmp_path / "train" / "pipe.wav")
    _splits(tmp_path)
    line = f"data.root={tmp_path}: 2 for training in train/ (a.wav ... b\\n.wav), 1 for validation in test/"
    assert caplog.messages == [f"{line} (c.wav ... c.wav); skipped 1 .txt, 1 hidden, 1 special"]


def test_hidden_shards_and_members_are_skipped(tmp_path):
    for name in ("a.tar", "._a.tar"):
        with tarfile.open(tmp_path / name, "w") as archive:
            for member in ("./b.wav", "./._b.wav", "./.c/d.wav", "./a.wav"):
                archive.addfile(tarfile.TarInfo(member))
    train, val = _splits(tmp_path, 0.0)
    assert sorted(train + val) == ["./a.wav", "./b.wav"]


def test_fetching_makes_the_folder_and_gives_what_was_made(tmp_path):
    root = tmp_path / "a" / "b"
    assert download_or_raise(root.is_dir, str(root), "a.tgz") is True


@pytest.mark.parametrize("error", [URLError("no route"), RuntimeError("hash\nmismatch"), PermissionError("no")])
def test_what_cannot_be_fetched_is_told_by_name(tmp_path, error):
    def fail() -> None:
        raise error

    with pytest.raises(UserError, match=r"data\.root=.*: a\.tgz is not there and could not be fetched") as told:
        download_or_raise(fail, str(tmp_path), "a.tgz")
    assert "\n" not in str(told.value)


def test_other_errors_pass(tmp_path):
    with pytest.raises(KeyError):
        download_or_raise(lambda: {}["a"], str(tmp_path), "a.tgz")
