"""Data sets of shards: the same signals as from the folder that was packed, from any location."""

import json
import threading
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pytest
import soundfile
import torch

from varitok import UserError
from varitok.data.cli.shards import main
from varitok.data.datamodule import DataModule
from varitok.data.datasets.audio import audio_folder, audio_mix
from varitok.data.datasets.images import image_folder
from varitok.data.datasets.video import video_folder
from varitok.data.storage import members
from varitok.export.cli.main import main as varitok

from ..clips import frames, write
from ..pictures import BROKEN, fill

SOUNDS: dict[str, Any] = {"sample_rate": 8000, "crop_tokens": 4, "downsample": 100}


def sounds(folder: Path, count: int = 12) -> Path:
    folder.mkdir(parents=True)
    for number in range(count):
        noise = np.random.default_rng(number).uniform(-0.5, 0.5, (500 + 90 * number, 1))
        soundfile.write(folder / f"{number:02}.{('wav', 'flac', 'ogg')[number % 3]}", noise, (8000, 11025)[number % 2])
    return folder


def clips(folder: Path, count: int = 4) -> Path:
    folder.mkdir(parents=True)
    for number in range(count):
        write(folder / f"{number}.mp4", frames(12 + number))
    fill(folder, 1)
    return folder


MADE = {
    "images": (lambda folder: fill(folder, 9), partial(image_folder, image_size=8, val_share=0.3)),
    "sounds": (sounds, partial(audio_folder, val_share=0.3, **SOUNDS)),
    "clips": (clips, partial(video_folder, image_size=16, crop_tokens=2, frame_rate=8.0, val_share=0.3)),
}


@pytest.mark.parametrize("kind", MADE)
@pytest.mark.parametrize("parted", [False, True])
def test_shards_give_what_their_folder_gives(tmp_path: Path, kind: str, parted: bool) -> None:
    fill_folder, make = MADE[kind]
    for part in ("train", "val") if parted else ("",):
        fill_folder(tmp_path / "folder" / part)
    main([str(tmp_path / "folder"), "--out", str(tmp_path / "shards"), "--size", "4kB"])
    assert len(list((tmp_path / "shards").rglob("*.tar"))) > 1
    loose, packed = make(str(tmp_path / "folder")), make(str(tmp_path / "shards"))
    for one, two in ((loose.train, packed.train), (loose.val, packed.val)):
        assert len(one) == len(two) > 0  # type: ignore[arg-type]
        assert all(torch.equal(one[3, index], two[3, index]) for index in range(len(one)))  # type: ignore[arg-type]
        if hasattr(one, "sizes"):
            assert (one.sizes() == two.sizes()).all()  # type: ignore[attr-defined]


def test_sizes_need_no_file(tmp_path: Path) -> None:
    for kind in ("sounds", "clips"):
        fill_folder, make = MADE[kind]
        main([str(fill_folder(tmp_path / kind)), "--out", str(tmp_path / f"{kind}.shards")])
        data = make(str(tmp_path / f"{kind}.shards")).train
        known = data.sizes()  # type: ignore[attr-defined]
        (tmp_path / f"{kind}.shards" / "000000.tar").unlink()
        assert (data.sizes() == known).all()  # type: ignore[attr-defined]
        assert all(known)
    data.shapes = [(3, 8, 16), (9, 16, 8)]
    assert len(data.bucket_ids()) == len(known)


def test_a_mix_takes_folders_and_shards(tmp_path: Path) -> None:
    main([str(sounds(tmp_path / "a")), "--out", str(tmp_path / "a.shards")])
    forms = [{"a": str(tmp_path / name), "b": str(tmp_path / "a")} for name in ("a", "a.shards")]
    loose, packed = (audio_mix(roots, **SOUNDS).train for roots in forms)
    assert all(torch.equal(loose[0, index], packed[0, index]) for index in range(len(loose)))  # type: ignore[arg-type]


@pytest.fixture(params=MADE)
def served(tmp_path: Path, request):
    """Serve the shards of a folder, by ranges; gives what it is made into, the address, and the bytes asked for."""

    class Handler(SimpleHTTPRequestHandler):
        def do_GET(self) -> None:
            wanted = self.headers.get("Range")
            path = Path(self.translate_path(self.path))
            if not wanted or not path.is_file():
                return super().do_GET()
            first, last = (int(number) for number in wanted.removeprefix("bytes=").split("-"))
            content = path.read_bytes()
            asked.append(last - first + 1)
            self.send_response(206)
            self.send_header("Content-Range", f"bytes {first}-{last}/{len(content)}")
            self.send_header("Content-Length", str(len(content[first : last + 1])))
            self.end_headers()
            self.wfile.write(content[first : last + 1])

        def log_message(self, *words: Any) -> None:
            pass

    asked: list[int] = []
    fill_folder, make = MADE[request.param]
    fill_folder(tmp_path / "folder")
    main([str(tmp_path / "folder"), "--out", str(tmp_path / "shards"), "--size", "8kB"])
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Handler, directory=str(tmp_path)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield make, f"http://127.0.0.1:{server.server_port}/shards", asked
    server.shutdown()
    server.server_close()


def test_shards_are_read_over_http_by_ranges(tmp_path: Path, served) -> None:
    make, url, asked = served
    loose, far = make(str(tmp_path / "folder")), make(url)
    assert len(loose.train) == len(far.train)  # type: ignore[arg-type]
    asked.clear()
    assert torch.equal(loose.train[0, 1], far.train[0, 1])
    assert sum(asked) == loose.train.files[1].stat().st_size, "each byte once"  # type: ignore[attr-defined]
    data = DataModule(far, batch_size=2, workers=1, updates=2)
    assert [len(batch.signal) for batch in data.train_dataloader()] == [2, 2]  # type: ignore[attr-defined]
    (tmp_path / "shards" / "000000.index.jsonl").unlink()
    with pytest.raises(UserError, match=r"^http.*000000\.tar: has no index; run `varitok shards FOLDER`"):
        make(url)


def test_shards_are_read_from_what_fsspec_knows(tmp_path: Path) -> None:
    fill(tmp_path / "folder", 9)
    main([str(tmp_path / "folder"), "--out", str(tmp_path / "shards")])
    memory = fsspec.filesystem("memory")
    for part in ("", "/train", "/val"):
        memory.put(str(tmp_path / "shards"), f"/varitok{part}", recursive=True)
    _, make = MADE["images"]
    loose = make(str(tmp_path / "folder"))
    parted, plain = make("memory://varitok"), make("memory://varitok/train")
    assert len(parted.train) == len(parted.val) == 9  # type: ignore[arg-type]
    assert all(torch.equal(plain.train[0, index], loose.train[0, index]) for index in range(len(loose.train)))  # type: ignore[arg-type]
    memory.rm("/varitok", recursive=True)
    with pytest.raises(UserError, match=r"data\.root=memory://nowhere: no image in this folder"):
        make("memory://nowhere")
    with pytest.raises(UserError, match=r"data\.root=nonsense://x: can't be read \(Protocol not known: nonsense"):
        make("nonsense://x")


def test_blocks_of_shards_are_read_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fill(tmp_path / "folder", 40)
    main([str(tmp_path / "folder"), "--out", str(tmp_path / "shards"), "--size", "20kB"])
    reads, pread = [], members._pread

    def counted(*place: Any) -> bytes:
        reads.append(place[2])
        return pread(*place)

    monkeypatch.setattr(members, "_pread", counted)
    splits, form = image_folder(str(tmp_path / "shards"), image_size=8), {"batch_size": 8, "workers": 0, "updates": 4}
    counts, seen = [], []
    for block in (1, 4):
        reads.clear()
        batches = list(DataModule(splits, block=block, **form).train_dataloader())  # type: ignore[arg-type]
        counts.append(len(reads))
        seen.append({at for batch in batches for at in batch.sample_indices.tolist()})  # type: ignore[attr-defined]
        for batch in batches:
            own = [splits.train[0, at] for at in batch.sample_indices.tolist()]  # type: ignore[attr-defined]
            assert torch.equal(batch.signal, torch.stack(own))  # type: ignore[attr-defined]
    assert len(seen[0]) == len(seen[1]) == 32 and seen[0] != seen[1] and counts[1] < counts[0] / 2
    with pytest.raises(UserError, match=r"loader\.block=3: must divide loader\.batch_size=8"):
        DataModule(splits, block=3, **form)  # type: ignore[arg-type]
    with pytest.raises(UserError, match=r"^loader\.block: only shards are read in blocks; pack the files \(varitok sh"):
        DataModule(image_folder(str(tmp_path / "folder")), block=4, **form)  # type: ignore[arg-type]
    sized = audio_folder(str(pack_sounds(tmp_path)), **SOUNDS)
    with pytest.raises(UserError, match=r"^loader\.block: batches of similar signals are read from all over; set"):
        DataModule(sized, block=4, bucket=0.05, **form)  # type: ignore[arg-type]


def pack_sounds(folder: Path) -> Path:
    main([str(sounds(folder / "sounds")), "--out", str(folder / "sounds.shards")])
    return folder / "sounds.shards"


def test_the_command_tells_what_it_did(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = fill(tmp_path / "folder", 3, {"text.png": BROKEN["text.png"]})
    sounds(folder / "b", 2)
    (folder / "b" / "notes.txt").write_text("not packed")
    (folder / "b" / "notes.tmp").touch()
    varitok(["shards", str(folder), "--out", str(tmp_path / "one"), "--json"])
    about = json.loads(capsys.readouterr().out)
    assert {name: about[name] for name in ("shards", "images", "sounds", "clips", "others")} == {
        **{"shards": 1, "images": 3, "sounds": 2, "clips": 0, "others": 0},
    }
    assert about["skipped"] == {".tmp": 1}
    assert about["bad"] == [f"{folder / 'text.png'}: cannot identify image file 'file'"]
    varitok(["shards", str(folder), "--out", str(tmp_path / "two"), "--drop-bad"])
    shown = capsys.readouterr().out
    assert "can't be read" in shown and "MB in all; skipped 1 .tmp" in shown
    counts = [len((tmp_path / name / "000000.index.jsonl").read_text().splitlines()) - 1 for name in ("one", "two")]
    assert counts == [6, 5]
    made = (tmp_path / "one" / "000000.index.jsonl").read_text().splitlines()
    (tmp_path / "one" / "000000.index.jsonl").unlink()
    varitok(["shards", str(tmp_path / "one")])
    assert (tmp_path / "one" / "000000.index.jsonl").read_text().splitlines()[1:] == made[1:]


def test_members_have_keys_of_their_own(tmp_path: Path) -> None:
    names = ["a.jpg", "a.png", "b/a.png", "c.1.png", "c.2.png", "c_1.png"]
    for name in names:
        (tmp_path / "folder" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "folder" / name).write_bytes(name.encode())
    main([str(tmp_path / "folder"), "--out", str(tmp_path / "shards")])
    lines = [json.loads(line) for line in (tmp_path / "shards" / "000000.index.jsonl").read_text().splitlines()[1:]]
    keys = [line["name"].partition(".")[0] for line in lines]
    assert len(set(keys)) == len(names)
    assert [line["name"] for line in lines] == ["a.jpg", "a_2.png", "b/a.png", "c_1.png", "c_2.png", "c_1_2.png"]


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["nowhere", "--out", "x"], "nowhere: no such folder"),
        (["empty", "--out", "x"], "empty: no image, audio or video file in this folder"),
        (["empty"], r"empty: no shards \(\*\.tar\) in this folder; give --out SHARDS to pack its files"),
        (["full", "--out", "x", "--size", "many"], "--size many: give a number of bytes, such as 256MB"),
        (["full", "--out", "full"], "full: is not empty; name a new folder for the shards"),
    ],
)
def test_mistakes_are_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, words: list[str], told: str) -> None:
    monkeypatch.chdir(tmp_path)
    Path("empty").mkdir()
    fill(Path("full"), 1)
    with pytest.raises(UserError, match=f"^{told}$"):
        main(words)
    assert not Path("x").exists()
