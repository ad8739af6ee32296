"""Shards: whatever was written is read back, by any name and of any size, and nothing else."""

import io
import json
import os
import pickle
import tarfile
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from varitok import UserError
from varitok.data.storage.members import Member
from varitok.data.storage.shard_index import index_of, index_shard
from varitok.data.storage.shard_reader import open_shards
from varitok.data.storage.shard_writer import ShardWriter
from varitok.data.storage.tar import BLOCK, MOST_ABOUT, header_of, scan

NAMES = st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]), min_size=1, max_size=300)
MEMBERS = st.dictionaries(NAMES.filter(lambda name: not name.endswith("/")), st.binary(max_size=1500), max_size=6)
FORMATS = st.sampled_from([tarfile.PAX_FORMAT, tarfile.GNU_FORMAT])
many = settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=60, deadline=None)


def packed(path: Path, members: dict[str, bytes], form: int = tarfile.PAX_FORMAT) -> Path:
    """Write a tar file as others do."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w", format=form) as archive:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return path


def contents(folder: Path) -> dict[str, bytes]:
    return {member.name: member.read() for member in open_shards(folder)}


def fresh(folder: Path, name: str = "shards") -> Path:
    """Return a new folder: hypothesis uses one temporary folder for all its examples."""
    return folder / f"{name}_{len(list(folder.iterdir()))}"


@many
@given(members=MEMBERS, form=FORMATS)
def test_shards_of_others_are_read(tmp_path: Path, members: dict[str, bytes], form: int) -> None:
    folder = fresh(tmp_path)
    packed(folder / "a.tar", members, form)
    with tarfile.open(folder / "a.tar") as archive:
        truth = {info.name: archive.extractfile(info).read() for info in archive}  # type: ignore[union-attr]
    assert contents(folder) == truth


@many
@given(members=MEMBERS, size=st.integers(1, 5000))
def test_what_is_written_is_read_by_us_and_by_others(tmp_path: Path, members: dict[str, bytes], size: int) -> None:
    folder = fresh(tmp_path)
    with ShardWriter(folder, size) as shards:
        for number, (name, content) in enumerate(members.items()):
            shards.write(name, content, {"number": number})
    found = open_shards(folder)
    assert {one.name: one.read() for one in found} == members
    assert sorted(one.facts["number"] for one in found) == list(range(len(members)))
    read: dict[str, bytes] = {}
    for path in sorted(folder.glob("*.tar")):
        with tarfile.open(path) as archive:
            names = archive.getnames()
            assert len(names) == 1 or sum(info.size for info in archive) <= size
            read |= {info.name: archive.extractfile(info).read() for info in archive}  # type: ignore[union-attr]
            entries = json.loads(Path(index_of(str(path))).read_text().splitlines()[0])
            assert entries["members"] == len(names)
    assert read == members


@given(data=st.binary(max_size=4 * BLOCK), at=st.integers(0, 3), size=st.integers(0, 1 << 40))
def test_any_bytes_are_scanned_without_a_crash(data: bytes, at: int, size: int) -> None:
    header = bytearray(header_of("a", 5))
    header[124:136] = f"{size:011o}\0".encode()[:12]
    noise = data[: at * BLOCK] + bytes(header) + data[at * BLOCK :]
    for _, offset, count in scan(io.BytesIO(noise), len(noise)):
        assert offset > 0
        assert count >= 0


def test_an_absurd_header_allocates_nothing() -> None:
    asked = []

    class Watched(io.BytesIO):
        def read(self, size: int | None = -1, /) -> bytes:
            asked.append(size)
            return super().read(size)

    info = tarfile.TarInfo("././@LongLink")
    info.type, info.size = tarfile.GNUTYPE_LONGNAME, 1 << 40
    huge = tarfile.TarInfo("huge")
    huge.size = 1 << 50
    content = (
        info.tobuf(tarfile.GNU_FORMAT) + huge.tobuf(tarfile.GNU_FORMAT) + header_of("a", 3) + b"abc".ljust(BLOCK, b"\0")
    )
    assert [name for name, _, _ in scan(Watched(content), len(content))] == ["a"]
    assert all(size is not None and 0 <= size <= MOST_ABOUT for size in asked)


def test_behind_a_damaged_header_the_next_is_found(tmp_path: Path) -> None:
    path = packed(tmp_path / "a.tar", {"a": b"1" * 700, "b": b"2" * 700, "c": b"3"})
    content = bytearray(path.read_bytes())
    content[3 * BLOCK + 130] ^= 7  # in the size of b
    path.write_bytes(content)
    assert contents(tmp_path) == {"a": b"1" * 700, "c": b"3"}


@pytest.mark.parametrize("indexed", [True, False])
def test_of_a_shard_that_was_cut_off_the_whole_members_are_read(tmp_path: Path, indexed: bool, caplog: Any) -> None:
    path = packed(tmp_path / "a.tar", {name: name.encode() * 2000 for name in "abc"})
    if indexed:
        index_shard(str(path))
    os.truncate(path, 4000)  # within b
    with caplog.at_level("WARNING"):
        members = open_shards(tmp_path)
    assert str(path) in caplog.text
    assert [one.name for one in members] == (["a", "b", "c"] if indexed else ["a", "b"])
    assert members[0].read() == b"a" * 2000
    for lost in members[1:]:
        with pytest.raises(OSError, match="its shard ends before the last of its 2000 bytes"):
            lost.read()


def test_an_index_is_made_once_and_made_anew_when_it_is_stale(tmp_path: Path) -> None:
    path = packed(tmp_path / "a.tar", {"a": b"1", "b": b"2"})
    index = Path(index_of(str(path)))
    assert contents(tmp_path) == {"a": b"1", "b": b"2"}
    made = index.read_bytes()
    open_shards(tmp_path)
    assert index.read_bytes() == made
    for members in ({"a": b"12", "c": b"345"}, {"a": b"12", "d": b"345"}):  # of the same size as a whole
        packed(path, members)
        assert contents(tmp_path) == members
    index.write_text("nonsense")
    assert contents(tmp_path) == members
    index.write_text('{"format": 1, "bytes": 1e9, "members": 1}\n{"name": "x"}\n')
    assert contents(tmp_path) == members


def test_names_never_become_paths(tmp_path: Path) -> None:
    names = ["../../evil.png", "/etc/evil.png", "a/../../b.png", "c\n\x1b[31m: \udcff.png"]
    packed(tmp_path / "shards" / "a.tar", {name: b"x" for name in names})
    members = open_shards(tmp_path / "shards")
    assert sorted(one.name for one in members) == sorted(names)
    assert all(one.read() == b"x" for one in members)
    assert all(str(one).isprintable() and str(one).isascii() for one in members)
    assert sorted(path.name for path in tmp_path.rglob("*") if path.is_file()) == ["a.index.jsonl", "a.tar"]


class Evil:
    def __reduce__(self) -> Any:
        return os.mkdir, ("executed",)


def test_nothing_is_executed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    evil = pickle.dumps(Evil())
    packed(tmp_path / "a.tar", {f"1.{kind}": evil for kind in ("pyd", "pickle", "pth", "npy", "png")})
    assert all(one.read() == evil for one in open_shards(tmp_path))
    from varitok.data.datasets.images import image_folder
    from varitok.data.decoding.errors import BadSample

    with pytest.raises(BadSample, match="cannot identify image file 'file'"):
        image_folder(tmp_path).train[0, 0]
    assert not Path("executed").exists()


@many
@given(
    content=st.binary(max_size=400),
    moves=st.lists(st.tuples(st.integers(0, 2), st.integers(-50, 450), st.integers(-1, 99))),
)
def test_a_member_is_sought_and_read_like_a_file(
    tmp_path: Path, content: bytes, moves: list[tuple[int, int, int]]
) -> None:
    folder = fresh(tmp_path)
    packed(folder / "a.tar", {"before": b"#" * 99, "it": content, "later": b"#" * 99})
    (member,) = [one for one in open_shards(folder) if one.name == "it"]
    with member.open() as mine, io.BytesIO(content) as truth:
        for whence, offset, count in moves:
            if whence or offset >= 0:
                base = {0: 0, 1: truth.tell(), 2: len(content)}[whence]
                target = max(0, base + offset)
                assert mine.seek(target) == truth.seek(target)
            assert mine.read(count) == truth.read(count)


def test_the_same_members_give_the_same_bytes(tmp_path: Path) -> None:
    for name in ("one", "two"):
        with ShardWriter(tmp_path / name, 2100) as shards:  # two members each
            for number in range(5):
                shards.write(f"{number}.bin", bytes(500), {"number": number})
    one, two = ({path.name: path.read_bytes() for path in (tmp_path / name).iterdir()} for name in ("one", "two"))
    assert one == two
    assert len(one) == 2 * 3


def test_a_writer_that_fails_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError), ShardWriter(tmp_path / "out") as shards:
        shards.write("a", b"1")
        raise ZeroDivisionError
    assert not list(tmp_path.iterdir())
    (tmp_path / "out").mkdir()
    with ShardWriter(tmp_path / "out") as shards:
        shards.write("a", b"1", part="train")
        shards.write("b", b"1", part="val")
    assert sorted(path.relative_to(tmp_path / "out").as_posix() for path in (tmp_path / "out").rglob("*.tar")) == [
        "train/000000.tar",
        "val/000000.tar",
    ]
    with pytest.raises(UserError, match=r"out: is not empty; name a new folder"):
        ShardWriter(tmp_path / "out")


def test_members_can_be_cut_and_pickled(tmp_path: Path) -> None:
    packed(tmp_path / "a.tar", {name: name.encode() for name in "abcd"})
    members = open_shards(tmp_path)
    assert [one.name for one in members[1:3]] == ["b", "c"]
    again = pickle.loads(pickle.dumps(members))
    assert [one.read() for one in again] == [b"a", b"b", b"c", b"d"]
    assert members[-1] == Member(str(tmp_path / "a.tar"), "d", members[-1].offset, 1, {})
    with pytest.raises(IndexError):
        members[4]
