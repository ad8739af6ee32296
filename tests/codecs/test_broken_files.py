"""A run over ten thousand files, one in twenty of them broken: it comes to its end, and tells each of them once."""

import io
import os
import re
import subprocess
import sys
import tarfile
from pathlib import Path

import numpy as np
import pytest
import soundfile
from PIL import Image

from varitok.data.command import main as pack

from ..data.pictures import BROKEN, picture

ROOT = Path(__file__).parents[2]
GOOD, BAD = 9500, 500
MOST = 1500  # MiB that the largest process may need; torch and the codec alone need about half
RUN = [
    *("experiment=image/one_d_piece_64", "data=image_folder", "data.image_size=16", "codec.encoder.tokens=4"),
    *(
        "codec.encoder.width=16",
        "codec.encoder.depth=1",
        "trainer.enable_progress_bar=false",
        "trainer.accelerator=cpu",
    ),
    *("loader.batch_size=100", "loader.workers=2", "loader.max_bad_share=0.1", f"updates={(GOOD + BAD) // 100}"),
    *("export=none", "callbacks.samples=null", "callbacks.evaluation=null"),
]


def photos(folder: Path) -> Path:
    """Make the folder out of few files, linked many times."""
    kinds = [*BROKEN.items(), ("bomb.gif", BROKEN["bomb.png"]), ("sound.jpg", sound()), ("zeros.webp", bytes(5000))]
    for part, good, bad in (("train", GOOD, BAD), ("val", 20, 5)):
        (folder / part).mkdir(parents=True)
        for number in range(good):
            path = folder / part / f"{number:05}.png"
            if number < 10:
                picture(20, 20, number).save(path)
            else:
                os.link(folder / part / f"{number % 10:05}.png", path)
        for number in range(bad):
            name, content = kinds[number % len(kinds)]
            # Spread among the good ones, and small, so that each can be a file of its own.
            (folder / part / f"{number * 19:05}_broken_{name}").write_bytes(content)
    return folder


def sound() -> bytes:
    file = io.BytesIO()
    soundfile.write(file, np.zeros(100), 8000, "PCM_16", format="WAV")
    return file.getvalue()


@pytest.mark.slow
@pytest.mark.parametrize("sharded", [False, True])
def test_a_run_over_broken_files_comes_to_its_end(tmp_path: Path, sharded: bool) -> None:
    root = photos(tmp_path / "photos")
    lost = 0
    if sharded:
        pack([str(root), "--out", str(tmp_path / "shards"), "--size", "200kB"])
        root = tmp_path / "shards"
        shard = sorted((root / "train").glob("*.tar"))[3]
        with tarfile.open(shard) as archive:
            lost = sum("broken" not in info.name for info in archive.getmembers()[-20:])
            os.truncate(shard, archive.getmembers()[-20].offset)
    words = [*RUN, f"data.root={root}", f"hydra.run.dir={tmp_path / 'run'}"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT / ".pkg")}
    with (tmp_path / "out").open("w") as out:
        run = subprocess.Popen(
            [sys.executable, str(ROOT / "train.py"), *words], stdout=out, stderr=out, env=environment
        )
        _, status, used = os.wait4(run.pid, 0)
    assert status == 0, (tmp_path / "out").read_text()[-3000:]
    log = (tmp_path / "run" / "run.log").read_text()
    named = re.findall(r"^skipped (\S+): \S.*$", log, re.MULTILINE)
    assert len(named) == len(set(named)) == BAD + lost
    assert sum("_broken_" in Path(name).name for name in named) == BAD
    assert f"{BAD + lost} unreadable files were skipped" in log
    assert used.ru_maxrss / 1024 < MOST  # of this process and its workers, whichever is largest


def test_links_are_packed_as_files(tmp_path: Path) -> None:
    Image.new("RGB", (9, 9)).save(tmp_path / "a.png")
    os.link(tmp_path / "a.png", tmp_path / "b.png")
    (tmp_path / "c.png").symlink_to(tmp_path / "a.png")
    pack([str(tmp_path), "--out", str(tmp_path / "shards")])
    with tarfile.open(tmp_path / "shards" / "000000.tar") as archive:
        assert {info.name: info.isreg() and info.size > 0 for info in archive} == dict.fromkeys(
            ("a.png", "b.png", "c.png"), True
        )
