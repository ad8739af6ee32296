"""A run over ten thousand files, one in twenty of them broken: it comes to its end, and reports each of them once."""

import os
import re
import struct
import subprocess
import sys
import tarfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import soundfile
from PIL import Image

from varitok.data.cli.shards import main as pack

from ...data.decoding.test_audio import BROKEN as BROKEN_SOUNDS
from ...data.pictures import BROKEN, picture
from ..examples import TINY_SOUND

ROOT = Path(__file__).parents[3]
GOOD, BAD = 9500, 500
# Runs a command and prints the MiB that the largest of its processes had: a process that tests start themselves would
# begin with what pytest has by then.
MEASURED = """
import resource, subprocess, sys
status = subprocess.run(sys.argv[1:]).returncode
print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1024)
sys.exit(status)
"""
MOST = 1500  # MiB that the largest process may need; torch and the codec alone need about half
COMMON = [
    *("loader.batch_size=100", "loader.workers=2", "loader.max_bad_share=0.1", f"updates={(GOOD + BAD) // 100}"),
    *("callbacks.samples=null", "callbacks.evaluation=null", "export=none"),
    *("trainer.enable_progress_bar=false", "trainer.accelerator=cpu"),
]
RUNS = {
    "photos": [
        *("experiment=image/one_d_piece_64", "data=image_folder", "data.image_size=16"),
        *("codec.encoder.tokens=4", "codec.encoder.width=16", "codec.encoder.depth=1", *COMMON),
    ],
    "sounds": [
        *(word for word in TINY_SOUND if not word.startswith(("data.", "callbacks.", "loader.", "updates="))),
        *("data=audio_folder", "data.crop_tokens=2", *COMMON),
    ],
}


def good_photo(path: Path, number: int) -> None:
    picture(20, 20, number).save(path)


def broken_photos(folder: Path) -> dict[str, bytes]:
    good_sound(folder / "sound.wav", 0)
    sound = (folder / "sound.wav").read_bytes()
    return {**BROKEN, "bomb.gif": BROKEN["bomb.png"], "sound.jpg": sound, "zeros.webp": bytes(5000)}


def good_sound(path: Path, number: int) -> None:
    noise = np.random.default_rng(number).uniform(-0.5, 0.5, 800)
    soundfile.write(path, noise, (8000, 16000)[number % 2], format="WAV")


def broken_sounds(folder: Path) -> dict[str, bytes]:
    """Make files: empty, cut, of another kind, of a wrong rate, full of NaN, or with headers that promise too much."""
    made = {}
    for name in BROKEN_SOUNDS.keys() - {"folder.wav", "missing.wav"}:
        BROKEN_SOUNDS[name][0](folder / name)
        made[name] = (folder / name).read_bytes()
    for rate in (1, 1_000_000):
        soundfile.write(folder / f"{rate}.wav", np.zeros(100), rate)
        made[f"rate_{rate}.wav"] = (folder / f"{rate}.wav").read_bytes()
    soundfile.write(folder / "nan.wav", np.full(500, np.nan, np.float32), 16000, "FLOAT")
    soundfile.write(folder / "a.flac", np.random.default_rng(0).uniform(-0.5, 0.5, 800), 16000)
    flac = (folder / "a.flac").read_bytes()
    (word,) = struct.unpack(">Q", flac[18:26])  # its low 36 bits are the number of samples
    made["bomb.flac"] = flac[:18] + struct.pack(">Q", word | (1 << 36) - 1) + flac[26:]
    return made | {
        "nan.wav": (folder / "nan.wav").read_bytes(),
        "cut.flac": flac[:60],
        "picture.mp3": BROKEN["bomb.png"],
    }


MAKERS: dict[str, tuple[str, Callable[[Path, int], None], Callable[[Path], dict[str, bytes]]]] = {
    "photos": (".png", good_photo, broken_photos),
    "sounds": (".wav", good_sound, broken_sounds),
}


def files(folder: Path, kind: str) -> Path:
    """Make the folder out of few files, linked many times."""
    suffix, make, make_broken = MAKERS[kind]
    (folder / "beside").mkdir(parents=True)
    kinds = sorted(make_broken(folder / "beside").items())
    for part, good, bad in (("train", GOOD, BAD), ("val", 20, 5)):
        (folder / kind / part).mkdir(parents=True)
        for number in range(good):
            path = folder / kind / part / f"{number:05}{suffix}"
            if number < 10:
                make(path, number)
            else:
                os.link(path.with_stem(f"{number % 10:05}"), path)
        for number in range(bad):
            name, content = kinds[number % len(kinds)]
            # Spread among the good ones, and small, so that each can be a file of its own.
            (folder / kind / part / f"{number * 19:05}_broken_{name}").write_bytes(content)
    return folder / kind


@pytest.mark.slow
@pytest.mark.parametrize("kind", MAKERS)
@pytest.mark.parametrize("sharded", [False, True])
def test_a_run_over_broken_files_comes_to_its_end(tmp_path: Path, kind: str, sharded: bool) -> None:
    root = files(tmp_path, kind)
    lost = 0
    if sharded:
        pack([str(root), "--out", str(tmp_path / "shards"), "--size", "200kB"])
        root = tmp_path / "shards"
        shard = sorted((root / "train").glob("*.tar"))[3]
        with tarfile.open(shard) as archive:
            lost = sum("broken" not in info.name for info in archive.getmembers()[-20:])
            os.truncate(shard, archive.getmembers()[-20].offset)
    words = [*RUNS[kind], f"data.root={root}", f"hydra.run.dir={tmp_path / 'run'}"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT / ".pkg")}
    command = [sys.executable, "-c", MEASURED, sys.executable, str(ROOT / "train.py"), *words]
    run = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert run.returncode == 0, run.stderr[-3000:]
    log = (tmp_path / "run" / "run.log").read_text()
    named = re.findall(r"^skipped (\S+): \S.*$", log, re.MULTILINE)
    assert len(named) == len(set(named)) == BAD + lost
    assert sum("_broken_" in Path(name).name for name in named) == BAD
    assert f"{BAD + lost} unreadable files were skipped" in log
    assert float(run.stdout.splitlines()[-1]) < MOST


def test_links_are_packed_as_files(tmp_path: Path) -> None:
    """But for a second link to a file that is packed already."""
    elsewhere = tmp_path / "elsewhere.png"
    Image.new("RGB", (9, 9)).save(elsewhere)
    (tmp_path / "photos").mkdir()
    Image.new("RGB", (9, 9)).save(tmp_path / "photos/a.png")
    os.link(tmp_path / "photos/a.png", tmp_path / "photos/b.png")
    (tmp_path / "photos/c.png").symlink_to(elsewhere)
    (tmp_path / "photos/d.png").symlink_to(tmp_path / "photos/a.png")
    pack([str(tmp_path / "photos"), "--out", str(tmp_path / "shards")])
    with tarfile.open(tmp_path / "shards" / "000000.tar") as archive:
        assert {info.name: info.isreg() and info.size > 0 for info in archive} == dict.fromkeys(
            ("a.png", "b.png", "c.png"), True
        )
