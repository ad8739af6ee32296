"""The index of a dataset: one file for all processes, which gives the files that a listing gives, and no others."""

import errno
import hashlib
import logging
import os
import pickle
import shutil
import tempfile
import threading
import time
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import soundfile
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file

from varitok import UserError
from varitok.data.datasets import file_lengths
from varitok.data.datasets.audio import audio_folder
from varitok.data.storage import file_index, index_cache, listing
from varitok.data.storage.file_index import Entry, Files, build_index, map_index, write_index
from varitok.data.storage.folders import skip_reason
from varitok.data.storage.index_cache import share_index
from varitok.data.storage.listing import list_splits, names_in
from varitok.data.storage.shard_reader import open_shards
from varitok.data.storage.shard_writer import ShardWriter

PART = st.text(st.characters(exclude_characters="\0/", exclude_categories=["Cs"]), min_size=1, max_size=6)
NAMES = st.builds("/".join, st.lists(PART, min_size=1, max_size=3)) | st.from_regex(
    r"[a-c]{1,2}\.(jpg|PNG)", fullmatch=True
)


@pytest.fixture
def kept(tmp_path, monkeypatch):
    """Have even the index of a few files kept, in a cache of its own; return that."""
    monkeypatch.setattr(index_cache, "MANY", 4)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "varitok" / "index"


def fill(root, *names):
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(name.encode())
    for folder in {root, *(path for path in root.rglob("*") if path.is_dir())}:
        os.utime(folder, (1, 1))  # whatever is younger than two seconds may change within the clock's tick
    return root


@settings(max_examples=8)
@given(names=st.lists(NAMES, min_size=1, max_size=20), data=st.data())
def test_files_are_sorted_chosen_and_held_out_by_their_names(names, data):
    with tempfile.TemporaryDirectory() as folder, mock.patch.object(file_index, "CHUNK", 8):
        index = build_index("root", (Entry(name, 0, os.fsencode(name)) for name in names), mine=1)
        write_index(index, Path(folder, "index"))
        mapped = map_index(Path(folder, "index"), "root")
        arrays = load_file(Path(folder, "index"))
        assert {name: part.tolist() for name, part in arrays.items()} == {
            name: part.tolist() for name, part in index.arrays.items()
        }
        ordered = sorted(names, key=lambda name: name.split("/"))
        for files in (Files(index), Files(mapped), pickle.loads(pickle.dumps(Files(mapped)))):
            assert list(files.sources()) == ordered and files.file_index.header["mine"] == 1
            assert files[-1] == Path("root", ordered[-1]) and files[::2] == [Path("root", one) for one in ordered[::2]]
            wanted, skipped = files.of_kinds((".jpg", ".png"))
            chosen = [name for name in ordered if skip_reason(name, (".jpg", ".png")) == ""]
            assert list(wanted.sources()) == chosen and skipped.total() == len(names) - len(chosen)
            assert [ordered[files.find(name)] for name in names] == names and files.find("no such") == -1
            for some, own in ((files, ordered), (wanted, chosen)):
                if len(own) < 2:
                    continue
                count = data.draw(st.integers(1, len(own) - 1))
                ranks = [hashlib.sha256(name.encode()).hexdigest() for name in own]
                held = set(sorted(range(len(own)), key=ranks.__getitem__)[:count])
                train, val = some.hold_out(count)
                assert list(train.sources()) == [name for at, name in enumerate(own) if at not in held]
                assert list(val.sources()) == [name for at, name in enumerate(own) if at in held]
                assert train.identity != val.identity


def test_a_large_choice_is_found_again_and_small_to_pickle():
    random = np.random.default_rng(0)
    mask = random.random(30_000) < 0.3
    bitmap = file_index._Bitmap(len(mask), lambda part: mask[part], [0])
    truth = np.flatnonzero(mask)
    assert len(bitmap) == len(truth) and [bitmap[at] for at in range(0, len(truth), 7)] == truth[::7].tolist()
    assert len(pickle.dumps(bitmap)) < 30_000 / 8 + 1500


NAMED = [*(f"a/{n}.wav" for n in range(7)), "b/c.wav", "b/.d.wav", "b/x.txt"]


def test_a_folder_is_listed_once(tmp_path, kept, monkeypatch, caplog):
    root = fill(tmp_path / "root", *NAMED)
    with monkeypatch.context() as patched:
        patched.setattr(index_cache, "MANY", 10_000)
        small = list_splits(root, 0.3, (".wav",), "sound")
        assert not kept.exists()
    caplog.set_level(logging.INFO, listing.__name__)  # a run's other ranks turn it up, in this process too
    first = list_splits(root, 0.3, (".wav",), "sound")
    assert len(list(kept.iterdir())) == 1 and not list(tmp_path.glob("*.lock"))
    with monkeypatch.context() as patched:
        patched.setattr(listing, "find_files", None)
        again = list_splits(root, 0.3, (".wav",), "sound")
    for split, one, other in zip(small, first, again, strict=True):
        assert list(one) == list(other) == split and isinstance(other, Files) and other.file_index.path
        assert list(names_in(root, other)) == list(names_in(root, split))
        assert len(pickle.dumps(other)) < 2000 and list(pickle.loads(pickle.dumps(other))) == split
    assert caplog.messages[0] == caplog.messages[1] and caplog.messages[0].endswith("; skipped 1 .txt, 1 hidden")
    os.utime(fill(root, "a/new.wav") / "a", (2, 2))
    assert sum(map(len, list_splits(root, 0.3, (".wav",), "sound"))) == sum(map(len, first)) + 1
    with pytest.raises(UserError, match="the index was written anew while it was in use; start again"):
        pickle.loads(pickle.dumps(first.train))


def test_large_folders_are_checked_as_small_ones_are(tmp_path, kept):
    root = fill(tmp_path / "root", *(f"{part}/{n}.wav" for part in ("x/train-a", "x/dev/deep") for n in range(5)))
    for _ in range(2):
        with pytest.raises(UserError, match="has x/train-a/ beside x/dev/, which look like splits"):
            list_splits(root, 0.3, (".wav",), "sound")
    root = fill(tmp_path / "other", *(f"{part}/{n}.wav" for part in ("train", "val") for n in range(5)))
    (root / "val" / "z.wav").symlink_to(root / "train" / "3.wav")
    for _ in range(2):
        os.utime(root / "val", (1, 1))
        with pytest.raises(UserError, match=r"train/3\.wav and val/z\.wav are one file; remove the link"):
            list_splits(root, 0.3, (".wav",), "sound")


def pack(folder, members):
    with ShardWriter(folder, 2100) as shards:  # two members each
        for number, name in enumerate(members):
            shards.write(name, name.encode() * 9, {"number": number})
    return folder


def test_shards_have_an_index_that_is_current_or_made_anew(tmp_path, kept, monkeypatch):
    names = [f"{n}.wav" for n in range(9)]
    folder = pack(tmp_path / "shards", names)
    (whole,) = folder.glob(".*")
    made = whole.read_bytes()
    shutil.copytree(folder, tmp_path / "copy")
    for path in folder.glob("*.jsonl"):
        path.unlink()  # the index of all suffices
    members = open_shards(folder)
    assert [one.facts["number"] for one in members] == list(range(9)) and members.file_index.path == str(whole)
    assert [one.read() for one in pickle.loads(pickle.dumps(members))] == [name.encode() * 9 for name in names]
    assert open_shards(tmp_path / "copy")[0].shard == str(tmp_path / "copy" / "000000.tar")
    # Another shard of the same size, written later: its members' names differ.
    pack(tmp_path / "others", [f"{n}.mp3" for n in range(9)])
    shutil.copy(tmp_path / "others" / "000001.tar", folder)
    assert [one.name for one in open_shards(folder)] == ["0.wav", "1.wav", "2.mp3", "3.mp3", *names[4:]]
    assert whole.read_bytes() != made
    for damage in (made[:50], made[:-9], b"", b"{}" * 99):
        whole.write_bytes(damage)
        assert len(open_shards(folder)) == 9


def test_a_shard_that_was_cut_off_is_told_at_each_start(tmp_path, kept, caplog):
    folder = pack(tmp_path / "shards", [f"{n}.wav" for n in range(8)])
    os.truncate(folder / "000001.tar", 1100)
    for _ in range(2):
        caplog.clear()
        assert len(open_shards(folder)) == 8
        assert caplog.messages == [f"{folder / '000001.tar'} is truncated: 1 of its 2 members are lost"]


def test_a_disk_that_takes_nothing_has_its_index_in_the_cache(tmp_path, kept, monkeypatch, caplog):
    folder = pack(tmp_path / "shards", [f"{n}.wav" for n in range(8)])
    (folder / ".index.safetensors").unlink()
    write, closed = write_index, [folder]

    def refuse(index, path):
        if any(path.is_relative_to(one) for one in closed):
            raise OSError(errno.EROFS, os.strerror(errno.EROFS))
        write(index, path)

    monkeypatch.setattr(index_cache, "write_index", refuse)
    members = open_shards(folder)
    assert Path(members.file_index.path).parent == kept and not caplog.messages
    closed.append(tmp_path)
    shutil.rmtree(kept)
    assert list(open_shards(folder)) == list(members) and open_shards(folder).file_index.path is None
    told = f"{folder}: its index can't be kept (Read-only file system); every start lists all files"
    assert caplog.messages == [told] * 2


def test_one_process_makes_the_index_and_the_others_wait(tmp_path, kept):
    built, found = [], []

    def build():
        built.append(1)
        time.sleep(0.1)
        return build_index("root", [Entry(str(n), 0, b"x") for n in range(5)])

    def ask():
        found.append(share_index("root", beside=None, about="", is_current=lambda index: True, build=build))

    threads = [threading.Thread(target=ask) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(built) == 1 and len({index.path for index in found}) == 1 and len(found) == 3


def test_lengths_are_measured_once_by_several_processes(tmp_path, kept, monkeypatch):
    root, form = tmp_path / "sounds", {"crop_tokens": None, "downsample": 10, "val_share": 0.1}
    root.mkdir()
    for number in range(7):
        soundfile.write(root / f"{number}.wav", np.zeros(100 + number), 8000)
    (root / "7.wav").write_bytes(b"no sound")
    os.utime(root, (1, 1))
    data = audio_folder(str(root), sample_rate=8000, **form).train
    names = [int(file.stem) for file in data.files]
    wanted = [0 if name == 7 else 100 + name for name in names]
    assert data.sizes().tolist() == wanted
    with monkeypatch.context() as patched:
        patched.setattr(file_lengths, "_measure", None)
        again = audio_folder(str(root), sample_rate=8000, **form | {"crop_tokens": 10}).train
        assert again.sizes().tolist() == [min(size, 100) for size in wanted]
    other = audio_folder(str(root), sample_rate=4000, **form).train
    assert other.unit != data.unit, "at another rate they are other numbers"
