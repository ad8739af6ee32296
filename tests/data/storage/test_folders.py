"""The files of a folder, whatever else is in it: links, loops, hidden names, pipes, folders named as files."""

import os
import tempfile
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from varitok.data.storage.folders import describe_skipped, find_files, printable

SUFFIXES = (".png", ".jpg")
NAMES = st.sampled_from(["a", "b", ".hidden", "x.png", "y.PNG", "._x.png", "n.txt"])
PATHS = st.lists(NAMES, min_size=1, max_size=4).map("/".join)
PLACES = st.tuples(st.sampled_from(["root", "other"]), PATHS).map("/".join)
TARGETS = PLACES | st.sampled_from([".", "root", "other", "nowhere"])
ENTRIES = st.tuples(st.sampled_from(["file", "file", "folder", "pipe"]), PLACES, st.none())
LINKS = st.tuples(st.just("link"), PLACES, TARGETS)
TREES = st.lists(ENTRIES, max_size=15).flatmap(
    lambda entries: st.lists(LINKS, max_size=6).map(lambda links: entries + links)
)


def make(top: Path, entries: list[tuple[str, str, str | None]]) -> Path:
    """Write a tree, without the entries that contradict earlier ones; return its `root`."""
    (top / "root").mkdir()
    (top / "other").mkdir()
    for kind, name, target in entries:
        path = top / name
        with suppress(OSError):
            path.parent.mkdir(parents=True, exist_ok=True)
            if kind == "file":
                path.touch()
            elif kind == "folder":
                path.mkdir()
            elif kind == "pipe":
                os.mkfifo(path)
            else:
                path.symlink_to(top / str(target))
    return top / "root"


def walk(folder: Path, root: Path, searched: set[Path]) -> Iterator[Path]:
    """Yield the real paths of the regular files that a search should reach."""
    if folder in searched:
        return
    searched.add(folder)
    for path in folder.iterdir():
        with suppress(OSError, RuntimeError):  # a link to itself
            real = path.resolve(strict=True)
            if path.name.startswith("."):
                continue
            if path.is_dir():
                if not (path.is_symlink() and any(inside.is_relative_to(real) for inside in (folder, root))):
                    yield from walk(real, root, searched)
            elif path.is_file() and path.suffix.lower() in SUFFIXES:
                yield real


@settings(deadline=None, max_examples=25)
@given(entries=TREES)
def test_each_regular_file_that_can_be_seen_is_found_once(entries):
    with tempfile.TemporaryDirectory() as top:
        root = make(Path(top).resolve(), entries)
        files, skipped, linked, searched = find_files(root, SUFFIXES)
        assert files == sorted(files)
        assert {str(path.parent) for path in files} <= searched.keys() and str(root) in searched
        found = [path.resolve() for path in files]
        assert sorted(found) == sorted({*walk(root, root, set())})
        assert linked == {path: str(path.resolve()) for path in files if path != path.resolve()}
        assert all(path.is_file() for path in files)
        assert not any(part.startswith(".") for path in files for part in path.relative_to(root).parts)
        unlinked = [Path(at, name) for at, _, names in os.walk(root) for name in names]
        assert {path for path in unlinked if path in files and not path.is_symlink()} == {
            path
            for path in unlinked
            if path.suffix.lower() in SUFFIXES
            and path.is_file()
            and not path.is_symlink()
            and not any(part.startswith(".") for part in path.relative_to(root).parts)
        }, "files below no link keep their own paths"
        assert not skipped or describe_skipped(skipped).startswith("; skipped ")


def test_entries_are_counted_by_the_reason_why_they_are_skipped(tmp_path):
    entries = [
        *[("file", f"root/{name}", None) for name in ("x.jpg", "._x.jpg", ".thumbs/a.jpg", "Z.TXT", "z.txt", "README")],
        ("folder", "root/folder.jpg", None),
        ("file", "root/folder.jpg/in.jpg", None),
        ("pipe", "root/pipe.jpg", None),
        ("file", "other/linked.jpg", None),
        *[("link", f"root/{name}", "other") for name in ("one", "two")],
        *[("link", f"root/{name}", target) for name, target in (("up", "."), ("self", "root/self"), ("off", "gone"))],
        ("link", "root/y.jpg", "other/linked.jpg"),
        ("file", "elsewhere.jpg", None),
        *[("link", f"root/{name}.jpg", "elsewhere.jpg") for name in ("z", "zz")],
    ]
    root = make(tmp_path, entries)
    files, skipped, linked = find_files(root, SUFFIXES)[:3]
    names = ["folder.jpg/in.jpg", "one/linked.jpg", "x.jpg", "z.jpg"]
    assert linked == {
        root / "one/linked.jpg": str(tmp_path / "other/linked.jpg"),
        root / "z.jpg": str(tmp_path / "elsewhere.jpg"),
    }
    assert [path.relative_to(root).as_posix() for path in files] == names
    assert skipped == {".txt": 2, "hidden": 2, "linked again": 4, "without a suffix": 3, "special": 1}


def test_a_folder_whose_own_name_is_hidden_or_linked_is_searched(tmp_path):
    make(tmp_path, [("file", "root/.cache/x.png", None), ("link", "other/.link", "root/.cache")])
    for folder in (tmp_path / "root" / ".cache", tmp_path / "other" / ".link"):
        assert find_files(folder, SUFFIXES).files == [folder / "x.png"]


def test_relative_folders_give_relative_paths(tmp_path, monkeypatch):
    make(tmp_path, [("file", "root/a/x.png", None)])
    monkeypatch.chdir(tmp_path / "root")
    assert find_files(Path(), SUFFIXES).files == [Path("a/x.png")]


def test_a_folder_that_can_not_be_read_is_counted(tmp_path, monkeypatch):
    root, scan = make(tmp_path, [("file", "root/a/x.png", None), ("file", "root/b/x.png", None)]), os.scandir

    def refuse(path):
        if Path(path).name == "a":
            raise PermissionError
        return scan(path)

    monkeypatch.setattr(os, "scandir", refuse)
    assert find_files(root, SUFFIXES)[:3] == ([root / "b" / "x.png"], {"unreadable": 1}, {})


@pytest.mark.parametrize(
    ("skipped", "told"),
    [
        ({}, ""),
        ({".txt": 1200, "hidden": 3}, "; skipped 1,200 .txt, 3 hidden"),
        ({f".{letter}": 2 for letter in "hgfedcba"}, "; skipped 2 .a, 2 .b, 2 .c, 2 .d, 2 .e, 2 .f, 4 others"),
    ],
)
def test_what_was_skipped_is_a_part_of_a_sentence(skipped, told):
    assert describe_skipped(skipped) == told


def test_a_name_is_printable_whatever_its_bytes():
    name = os.fsdecode("Ä\nö\t東".encode() + b"\xff")
    assert printable(name) == "Ä\\nö\\t東\\udcff"
