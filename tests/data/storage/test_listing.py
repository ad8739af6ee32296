"""Folders as data sets: training files, held-out files, and the message if there are none."""

from pathlib import Path
from urllib.error import URLError

import pytest

from varitok import UserError
from varitok.data.datasets.base import download_or_raise
from varitok.data.storage.listing import list_files

SUFFIXES = (".wav", ".flac")


def _fill(root: Path, *names: str) -> None:
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(b"x")


def _names(root: Path, split: str, val_share: float = 0.25) -> list[str]:
    return [path.relative_to(root).as_posix() for path in list_files(root, split, val_share, SUFFIXES, "sound")]


def test_files_of_a_wanted_suffix_are_found_at_any_depth_in_order(tmp_path):
    _fill(tmp_path, "b.wav", "a/c/D.FLAC", "a.txt", "wav", "train.md")
    (tmp_path / "folder.wav").mkdir()
    assert sorted(_names(tmp_path, "train") + _names(tmp_path, "val")) == ["a/c/D.FLAC", "b.wav"]
    assert _names(tmp_path, "train") == sorted(_names(tmp_path, "train"))


@pytest.mark.parametrize(("share", "held"), [(0.25, 10), (0.1, 4), (0.0, 1), (1.0, 39)])
def test_a_share_is_held_out_and_neither_split_is_empty(tmp_path, share, held):
    _fill(tmp_path, *(f"{index}.wav" for index in range(40)))
    train, val = _names(tmp_path, "train", share), _names(tmp_path, "val", share)
    assert len(val) == held
    assert not set(train) & set(val)
    assert len(train) + len(val) == 40


def test_what_is_held_out_hangs_on_names_below_the_folder_alone(tmp_path):
    names = [f"{index % 3}/{index}.wav" for index in range(20)]
    _fill(tmp_path / "here", *names)
    _fill(tmp_path / "there", *reversed(names))
    assert _names(tmp_path / "here", "val") == _names(tmp_path / "there", "val")
    assert _names(tmp_path / "here", "val") != sorted(names)[:5]  # not merely the first


def test_subfolders_train_and_val_are_the_splits(tmp_path):
    _fill(tmp_path, "train/a.wav", "train/b.wav", "val/x/c.wav", "test/d.wav")
    assert _names(tmp_path, "train") == ["train/a.wav", "train/b.wav"]
    assert _names(tmp_path, "val") == ["val/x/c.wav"]


def test_a_subfolder_train_alone_is_a_folder_like_any_other(tmp_path):
    _fill(tmp_path, *(f"train/{index}.wav" for index in range(8)))
    assert len(_names(tmp_path, "val")) == 2


def test_one_file_is_both_splits(tmp_path):
    _fill(tmp_path, "a.wav")
    assert _names(tmp_path, "train") == _names(tmp_path, "val") == ["a.wav"]


def test_a_folder_without_a_sound_is_told(tmp_path):
    _fill(tmp_path, "train/a.wav", "val/a.txt")
    with pytest.raises(UserError, match=r"data\.root=.*val: no sound in this folder \(looked for \.wav \.flac\)"):
        _names(tmp_path, "val")
    with pytest.raises(UserError, match=r"data\.root=.*nowhere: no such folder"):
        list_files(tmp_path / "nowhere", "train", 0.1, SUFFIXES, "sound")


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
