"""Workers: their memory, and the message when one dies."""

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import psutil
import pytest
import torch
from PIL import Image

from varitok import UserError
from varitok.data.cli.shards import main as pack
from varitok.data.datamodule import DataModule
from varitok.data.datasets.images import ImageFiles, image_folder
from varitok.data.storage.shard_writer import ShardWriter
from varitok.data.synthetic.images import dead_leaves
from varitok.data.workers import start_method, start_worker

from .pictures import fill


def module(root: Path, **options) -> DataModule:
    return DataModule(
        image_folder(str(root), image_size=8), **({"batch_size": 4, "workers": 2, "updates": 40} | options)
    )


def test_a_worker_that_crashes_is_told_with_what_it_read(tmp_path) -> None:
    data = module(fill(tmp_path / "photos", 12))
    files, read, main = data.splits.train.files, ImageFiles._read, os.getpid()

    def crash(self, index, side):
        if index == 5 and os.getpid() != main:
            signal.signal(signal.SIGSEGV, signal.SIG_DFL)
            os.kill(os.getpid(), signal.SIGSEGV)
        return read(self, index, side)

    data.splits.train.read = crash.__get__(data.splits.train)
    told = r"^a worker \(process \d+\) ended by SIGSEGV while it read \S+good_\S+; remove that file: .* crashed$"
    with pytest.raises(UserError, match=told) as caught:
        list(data.train_dataloader())
    assert f"read {files[5]};" in str(caught.value)


@pytest.mark.slow
def test_a_killed_worker_disturbs_nothing_but_the_next_batches(tmp_path) -> None:
    batches = iter(module(fill(tmp_path / "photos", 60)).train_dataloader())  # more than workers read ahead
    next(batches)
    victim = psutil.Process().children()[-1]
    victim.kill()
    threading.Event().wait(0.3)  # torch itself raises here, wherever the main process just is
    told = rf"^a worker \(process {victim.pid}\) ended by SIGKILL.*; out of memory\? set fewer workers"
    with pytest.raises(UserError, match=told):
        list(batches)


def test_only_workers_decode(tmp_path) -> None:
    data = module(fill(tmp_path / "photos", 12), updates=3)
    main, read, here = os.getpid(), ImageFiles._read, []

    def watched(self, index, side):
        here.append(index)  # of the main process's memory, where a worker's copy doesn't come
        return read(self, index, side)

    data.splits.train.read = watched.__get__(data.splits.train)
    assert sum(len(batch.signal) for batch in data.train_dataloader()) == 12
    assert os.getpid() == main and not here
    data.workers = 0
    assert sum(len(batch.signal) for batch in data.train_dataloader()) == 12
    assert len(here) == 12


HOLDS = """
import resource, sys
from varitok.data.storage.shard_reader import open_shards

def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024

members = open_shards(sys.argv[1])
before = peak()
for member in members:
    with member.open() as file:
        while file.read(1 << 16):
            pass
print(len(members), peak() - before)
"""


def test_reading_shards_holds_little_of_them(tmp_path) -> None:
    """A worker reads 192 MiB, a member of 64 MiB among them, and needs some MiB."""
    with ShardWriter(tmp_path / "shards", 64 << 20) as shards:
        shards.write("large.bin", bytes(64 << 20))
        for number in range(64):
            shards.write(f"{number}.bin", bytes(2 << 20))
    done = subprocess.run(
        [sys.executable, "-c", HOLDS, str(tmp_path / "shards")],
        capture_output=True,
        text=True,
        check=True,
        env=os.environ,
    )
    count, grown = done.stdout.split()
    assert int(count) == 65
    assert float(grown) < 16  # MiB


def test_members_are_packed(tmp_path) -> None:
    with ShardWriter(tmp_path / "shards") as shards:
        for number in range(2000):
            shards.write(f"{number:06}.jpg", b"", {"width": 256, "height": 256})
    packed = image_folder(tmp_path / "shards").train.files
    assert len(packed) == 1900
    assert sum(part.nbytes for part in packed.file_index.arrays.values()) / len(packed) < 110  # bytes
    assert packed.chosen.bits.nbytes + packed.chosen.starts.nbytes < 400


def test_validation_keeps_its_workers(tmp_path) -> None:
    data = module(fill(tmp_path / "photos", 60), workers=1, batch_size=1)
    whole = [batch.sample_indices.tolist() for batch in data.val_dataloader()]
    before = {child.pid for child in psutil.Process().children()}
    iterator = iter(data.val_dataloader())
    assert next(iterator).sample_indices.tolist() == whole[0]
    del iterator  # before its end
    assert [batch.sample_indices.tolist() for batch in data.val_dataloader()] == whole == [[0], [1], [2]]
    assert {child.pid for child in psutil.Process().children()} == before


def test_a_gpu_has_its_workers_started_by_a_server(monkeypatch) -> None:
    assert start_method(module) is None
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert start_method(dead_leaves(8).train) == "forkserver"
    assert start_method(lambda: None) is None, "what can't be pickled is forked"


@pytest.mark.slow
@pytest.mark.parametrize("root", ["photos", "shards"])
def test_a_server_starts_workers_that_read_the_same(tmp_path, monkeypatch, root) -> None:
    fill(tmp_path / "photos", 60)
    pack([str(tmp_path / "photos"), "--out", str(tmp_path / "shards")])
    here = list(module(tmp_path / root, workers=0, updates=6).train_dataloader())
    monkeypatch.setattr("varitok.data.datamodule.start_method", lambda dataset: "forkserver")
    served = list(module(tmp_path / root, workers=2, updates=6).train_dataloader())
    assert len(here) == 6 and all(torch.equal(a.signal, b.signal) for a, b in zip(here, served, strict=True))


def test_a_decoded_image_is_bounded_whatever_its_file_says(tmp_path) -> None:
    Image.new("1", (8191, 8192)).save(tmp_path / "a.png")  # 8 kB that become 192 MiB: as large as may be
    assert (tmp_path / "a.png").stat().st_size < 20_000
    Image.new("1", (8192, 8193)).save(tmp_path / "b.png")
    good, bad = sorted(split.files[0] for split in image_folder(tmp_path, val_share=0.5)[:2])
    assert (good.name, bad.name) == ("a.png", "b.png")


STAYS = """
import sys
from varitok.data.datasets.images import image_folder
from varitok.data.datamodule import DataModule

data = DataModule(image_folder(sys.argv[1], image_size=8), batch_size=4, workers=1, updates=40)
batches = iter(data.train_dataloader())
next(batches)
print(batches.gi_frame is not None)  # held to the end of the process, and nobody has told its worker that this is it
"""


@pytest.mark.slow
def test_a_process_ends_though_its_batches_are_held(tmp_path) -> None:
    fill(tmp_path / "photos", 12)
    done = subprocess.run(
        [sys.executable, "-c", STAYS, str(tmp_path / "photos")],
        capture_output=True,
        text=True,
        timeout=900,
        check=False,
    )
    assert done.returncode == 0 and done.stdout == "True\n", done.stderr


@pytest.mark.parametrize("threaded", [False, True])
def test_signals_to_all_processes_are_for_the_main_one(tmp_path, monkeypatch, threaded) -> None:
    def begin(worker: int) -> None:
        if threaded:  # as a library may begin one, before
            threading.Thread(target=time.sleep, args=(60,), daemon=True).start()
        start_worker(worker)

    monkeypatch.setattr("varitok.data.datamodule.start_worker", begin)
    others = {child.pid for child in psutil.Process().children()}
    batches = iter(module(fill(tmp_path / "photos", 12), workers=1).train_dataloader())
    next(batches)
    (worker,) = (child for child in psutil.Process().children() if child.pid not in others)
    for name in ("TERM", "INT", "USR1"):  # as another process sends them
        subprocess.run(["kill", f"-{name}", str(worker.pid)], check=True)
    assert len(list(batches)) == 39
