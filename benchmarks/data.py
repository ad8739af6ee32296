"""Data loading speed: our folders and shards, torchvision's ImageFolder and WebDataset, in turn.

    pip install webdataset==1.0.2
    python benchmarks/data.py --images PHOTOS --sounds SOUNDS --videos CLIPS --out benchmarks/results/data

Three tables: `readers.csv` (samples per second), `shares.csv` (breakdown of an image's time) and `padding.csv` (share
of padding in batches of whole recordings). The shards are packed by `varitok shards` into a temporary folder.

    python benchmarks/data.py --members 1300000 --simulated 100000000 --out benchmarks/results/data

The start of a run on large datasets, `startup.csv`. The members are packed; those of the simulated dataset exist in its
index alone, whose shards are sparse files with one header each.
"""

import argparse
import contextlib
import json
import os
import shlex
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, TypeAlias

_checkout = Path(__file__).resolve().parents[1] / ".pkg"
if __name__ == "__main__" and _checkout.is_dir():
    # A checkout needs no install (ARCHITECTURE.md, "Where the package is").
    sys.path[0] = str(_checkout)

import numpy as np  # noqa: E402
import PIL  # noqa: E402
import torch  # noqa: E402
import torchvision  # noqa: E402
from PIL import Image  # noqa: E402
from torch import Tensor  # noqa: E402
from torch.utils.data import DataLoader  # noqa: E402
from torchvision.datasets import ImageFolder  # noqa: E402
from torchvision.transforms.v2 import InterpolationMode, functional  # noqa: E402

from varitok import UserError, __version__  # noqa: E402
from varitok.codecs.evaluation.table import write_rows  # noqa: E402
from varitok.data.batch import Sample, Splits, collate  # noqa: E402
from varitok.data.cli.shards import main as pack  # noqa: E402
from varitok.data.datamodule import DataModule  # noqa: E402
from varitok.data.datasets.audio import audio_folder  # noqa: E402
from varitok.data.datasets.images import image_folder  # noqa: E402
from varitok.data.datasets.video import video_folder  # noqa: E402
from varitok.data.storage.file_index import FORMAT, FileIndex, write_index  # noqa: E402
from varitok.data.storage.members import Member  # noqa: E402
from varitok.data.storage.shard_reader import WHOLE  # noqa: E402
from varitok.data.storage.shard_writer import ShardWriter  # noqa: E402
from varitok.data.storage.tar import BLOCK, header_of  # noqa: E402

__all__ = ["main"]

Row: TypeAlias = dict[str, object]
Make: TypeAlias = Callable[[int], Iterable[Any]]
"""A function that builds a loader with the given number of workers."""

SIDE, LEAST_SCALE = 64, 0.8
SOUND = {"sample_rate": 16000, "crop_tokens": 50, "downsample": 320}  # crops of 1 s
BUCKET, BUDGET, MOST, FIXED = 0.05, 1408000, 64, 8
PROTOCOL = (
    f"images: random square of {LEAST_SCALE} to 1 of the shorter side, antialiased bicubic to {SIDE} x {SIDE}, mirrored"
    " by chance, uint8; peers: Pillow, torchvision.transforms.v2.functional;"
    " WebDataset reads our shards by shuffle(100) and decode('pilrgb'); ours alone decodes a JPEG at 1/2, 1/4 or"
    f" 1/8 where that leaves twice the wanted size, here of images from about {4 * SIDE} pixels on; sounds: 1 s at"
    " 16 kHz; clips: 17 frames of 64 x 64"
)

EACH = 10_000  # members of a simulated shard
START = """
import itertools, json, os, pickle, sys, time
import numpy as np
from varitok.data.datamodule import DataModule
from varitok.data.datasets.images import image_folder
from varitok.data.sampler import UpdateBatchSampler

def memory(kind):
    with open("/proc/self/status") as file:
        return int(next(line.split()[1] for line in file if line.startswith(kind))) / 1024

anonymous, begin, spent = memory("RssAnon"), time.perf_counter(), time.process_time()
splits = image_folder(sys.argv[1], image_size=64)
listed = time.perf_counter() - begin
loader = DataModule(splits, batch_size=64, workers=0, updates=10**6).train_dataloader()
next(iter(loader.batch_sampler))
first, files = time.perf_counter() - begin, splits.train.files
spent = time.process_time() - spent
places = np.random.default_rng(0).integers(0, len(files), 2000).tolist()
looked = time.process_time()
for place in places:
    files[place]
looked = time.process_time() - looked
grown, mapped = memory("RssAnon") - anonymous, memory("RssFile")
count = len(files)
sampler = UpdateBatchSampler(count, 100, batches=10**9, seed=1)
order, seen = sampler.order(0), np.zeros(count, bool)
for at in range(0, count, 1 << 16):
    seen[order(np.arange(at, min(at + (1 << 16), count)))] = True
whole = UpdateBatchSampler(count, 100, batches=10**9, seed=1, start=123)
resumed = UpdateBatchSampler(count, 100, batches=10**9, seed=1, start=323)
same = list(itertools.islice(whole, 200, 260)) == list(itertools.islice(resumed, 60))
print(json.dumps({
    "seconds_to_files": listed, "seconds_to_first_batch": first, "processor_seconds": spent,
    "own_mb": grown, "mapped_mb": mapped,
    "pickled_kb": len(pickle.dumps(splits.train)) / 1000, "us_per_file": looked / 2000 * 1e6,
    "order_has_each_once": bool(seen.all()), "resume_is_exact": same,
}))
"""


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line; a user's mistake ends in one line and exit status 2."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--images", type=Path, metavar="FOLDER")
    what.add_argument("--members", type=int, metavar="N", help="of packed shards, for startup.csv")
    parser.add_argument(
        "--simulated", type=int, nargs="+", default=[], metavar="N", help="of simulated datasets, for startup.csv"
    )
    parser.add_argument("--sounds", type=Path, metavar="FOLDER")
    parser.add_argument("--videos", type=Path, metavar="FOLDER")
    parser.add_argument("--rounds", type=int, default=12, help="default: %(default)s")
    parser.add_argument("--batches", type=int, default=8, help="batches per reader and round; default: %(default)s")
    parser.add_argument("--batch-size", type=int, default=32, help="batch size for images; default: %(default)s")
    parser.add_argument("--out", type=Path, required=True, metavar="FOLDER")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    words = sys.argv[1:] if arguments is None else arguments
    try:
        with tempfile.TemporaryDirectory() as temporary:
            measure = _measure if options.images else _measure_start
            measure(options, Path(temporary), shlex.join(["python", "benchmarks/data.py", *words]))
    except UserError as error:
        print(f"data: {error}", file=sys.stderr)
        sys.exit(2)


def _measure(options: argparse.Namespace, temporary: Path, command: str) -> None:
    try:
        import webdataset  # noqa: PLC0415
    except ImportError:
        raise UserError("webdataset is not installed; pip install webdataset==1.0.2") from None
    header = {
        "machine": "one of two cores of a virtual machine, on which other processes ran",
        "command": command,
        "versions": f"varitok {__version__}, torch {torch.__version__}, torchvision {torchvision.__version__},"
        f" pillow {PIL.__version__}, webdataset {webdataset.__version__}",
    }
    splits = _places(options.images, temporary, lambda root: image_folder(root, val_share=0, image_size=SIDE))
    makes = {name: partial(_ours, split, options.batch_size, options.batches) for name, split in splits.items()}
    makes["torchvision ImageFolder"] = partial(_image_folder, options.images, temporary, options.batch_size)
    makes["WebDataset"] = partial(_web_dataset, temporary / options.images.name / "shards", options.batch_size)
    rows = _race("images", makes, options.batch_size, options)
    shares = [_shares(name, split, options.batch_size) for name, split in splits.items()]
    if options.sounds:
        found = _places(options.sounds, temporary / "sounds", lambda root: audio_folder(root, val_share=0, **SOUND))
        ours = {name: partial(_ours, split, 8, options.batches) for name, split in found.items()}
        rows += _race("sounds", ours, 8, options)
    if options.videos:
        found = _places(options.videos, temporary / "videos", lambda root: video_folder(root, val_share=0))
        ours = {name: partial(_ours, split, 2, options.batches) for name, split in found.items()}
        rows += _race("clips", ours, 2, options)
    columns = (
        "items a second, medians of rounds: by processor time in the main process, by the clock with a worker;"
        " to_our_folder: as a share of the first reader's"
    )
    about = {"protocol": PROTOCOL, "columns": columns, "rounds": str(options.rounds)}
    write_rows(options.out / "readers.csv", {**about, **header}, rows)
    about = {
        "protocol": PROTOCOL,
        "columns": "shares of an image's processor time, main process; decoding: headers too",
    }
    write_rows(options.out / "shares.csv", {**about, **header}, shares)
    if options.sounds:
        about = {
            "protocol": "whole files at 16 kHz, all batches of 4 epochs; filled_up: share of samples behind the sounds;"
            " a sound longer than the budget is a batch of its own"
        }
        write_rows(options.out / "padding.csv", {**about, **header}, _padding(options.sounds))


def _measure_start(options: argparse.Namespace, temporary: Path, command: str) -> None:
    """Write the table of the start of a run on shards of many members."""
    rows: list[Row] = []
    folder = temporary / "packed"
    begin = time.perf_counter()
    with ShardWriter(folder, 64 << 20) as shards:
        for number in range(options.members):
            shards.write(f"{number // 1000:06}/{number % 1000:04}.jpg", b"", {"width": 256, "height": 256})
    packed = time.perf_counter() - begin
    (folder / WHOLE).unlink()
    begin = time.perf_counter()
    first = _start(folder)
    rows.append({"dataset": "packed", "members": options.members, "index": "made", **first})
    print(f"{packed:.0f} s of packing, {time.perf_counter() - begin:.0f} s of the first start", flush=True)
    rows += [{"dataset": "packed", "members": options.members, "index": "mapped", **_start(folder)} for _ in range(2)]
    for members in options.simulated:
        folder = temporary / f"simulated {members}"
        _simulate(folder, members)
        form = {"dataset": "simulated", "members": members, "index": "mapped"}
        rows += [{**form, **_start(folder)} for _ in range(2)]
    about = {
        "protocol": "a new process lists the shards, holds out 5% and makes the first batch of keys: index made, from"
        " the shards' own, or mapped",
        "columns": "processor_seconds: to the first batch;"
        " own_mb: growth of the process's own memory (RssAnon) since its imports, in MiB; mapped_mb: pages of"
        " files, libraries among them, which all processes of a machine share; pickled_kb: of the training data, as a"
        " worker gets it; us_per_file: access to one at random",
        "machine": "one of two cores of a virtual machine, on which other processes ran",
        "command": command,
        "versions": f"varitok {__version__}, torch {torch.__version__}, numpy {np.__version__}",
    }
    write_rows(options.out / "startup.csv", about, rows)


def _start(folder: Path) -> Row:
    """Measure the start of a run in a new process."""
    paths = os.pathsep.join(filter(None, [str(_checkout), os.environ.get("PYTHONPATH", "")]))
    words = [sys.executable, "-c", START, str(folder)]
    done = subprocess.run(words, check=True, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": paths})
    row: Row = json.loads(done.stdout)
    print(row, flush=True)
    return row


def _simulate(folder: Path, members: int) -> None:
    """Write an index of members of 100 kB, and shards that are empty but for the last member's header."""
    shards, size, step = members // EACH, 100_000, 100_352 + BLOCK
    about, line = [], b'{"name":"%06d/%04d.jpg","offset":%10d,"size":100000,"width":256,"height":256}\n'
    folder.mkdir()
    width = len(line % (0, 0, 0))
    lines = np.memmap(folder / "lines", np.uint8, "w+", shape=(shards, EACH, width))
    own = np.frombuffer(b"".join(line % (0, at, at * step + BLOCK) for at in range(EACH)), np.uint8)
    for number in range(shards):
        lines[number] = own.reshape(EACH, width)
        lines[number, :, 9:15] = np.frombuffer(b"%06d" % number, np.uint8)
        last = {"name": f"{number:06}/{EACH - 1:04}.jpg", "offset": (EACH - 1) * step + BLOCK, "size": size}
        length = EACH * step + 2 * BLOCK
        about.append({"name": f"{number:06}.tar", "bytes": length, "members": EACH, "lost": 0, "last": last})
        with (folder / f"{number:06}.tar").open("wb") as file:
            file.seek((EACH - 1) * step)
            file.write(header_of(str(last["name"]), size))
            file.truncate(length)
    header = {
        **{"format": FORMAT, "digest": "simulated", "kinds": {".jpg": members}, "shards": about},
        "folders": {".jpg": [f"{number:06}" for number in range(shards)]},
    }
    arrays = {
        "lines": lines.reshape(-1),
        "ends": np.arange(members + 1, dtype=np.int64) * width,
        "hashes": np.random.default_rng(0).integers(0, 1 << 64, members, np.uint64),
        "kinds": np.zeros(members, np.uint16),
        "shards": np.repeat(np.arange(shards, dtype=np.uint32), EACH),
    }
    write_index(FileIndex(str(folder), header, arrays), folder / WHOLE)
    (folder / "lines").unlink()


def _places(root: Path, temporary: Path, make: Callable[[str], Splits]) -> dict[str, Splits]:
    """Build the datasets of a folder, and of shards packed from it."""
    shards = temporary / root.name / "shards"
    with contextlib.redirect_stdout(sys.stderr):
        pack([str(root), "--out", str(shards), "--size", "4MB"])
    return {"ours, folder": make(str(root)), "ours, shards": make(str(shards))}


def _ours(splits: Splits, batch_size: int, batches: int, workers: int) -> Iterable[Any]:
    return DataModule(splits, batch_size=batch_size, workers=workers, updates=batches + 1).train_dataloader()


def _transform(image: Image.Image) -> Tensor:
    """Apply our image augmentation by torchvision: random square crop, resize, horizontal flip."""
    scale = LEAST_SCALE + (1 - LEAST_SCALE) * float(torch.rand(()))
    side = round(scale * min(image.size))
    top, left = (int(torch.randint(whole - side + 1, ())) for whole in (image.height, image.width))
    square = functional.resized_crop(image, top, left, side, side, [SIDE, SIDE], InterpolationMode.BICUBIC)
    if torch.rand(()) < 0.5:
        square = functional.horizontal_flip(square)
    pixels: Tensor = functional.pil_to_tensor(square)
    return pixels


def _image_folder(root: Path, temporary: Path, batch_size: int, workers: int) -> Iterable[Any]:
    """Build a loader on torchvision's ImageFolder, which needs a folder for each class."""
    classes = temporary / "classes"
    if not classes.is_dir():
        classes.mkdir()
        (classes / "all").symlink_to(root.resolve())
    return DataLoader(ImageFolder(classes, _transform), batch_size, shuffle=True, num_workers=workers)


def _web_dataset(shards: Path, batch_size: int, workers: int) -> Iterable[Any]:
    import webdataset  # noqa: PLC0415

    data = webdataset.WebDataset([str(path) for path in sorted(shards.glob("*.tar"))], shardshuffle=100)
    images = data.shuffle(100).decode("pilrgb").to_tuple("jpg;jpeg;png;webp").map_tuple(_transform)
    return DataLoader(images, batch_size, num_workers=workers)


def _race(data: str, makes: dict[str, Make], batch_size: int, options: argparse.Namespace) -> list[Row]:
    """Time the readers in turn, in the main process and with one worker."""
    rows: list[Row] = []
    for workers in (0, 1):
        speeds: dict[str, list[float]] = {name: [] for name in makes}
        clock = time.perf_counter if workers else time.process_time
        for turn in range(options.rounds):
            order = list(makes)
            for name in order[turn % len(order) :] + order[: turn % len(order)]:
                batches = iter(makes[name](workers))
                next(batches)  # includes listing files and starting workers
                begin = clock()
                for _ in range(options.batches):
                    next(batches)
                speeds[name].append(options.batches * batch_size / (clock() - begin))
                del batches
        medians = {name: statistics.median(found) for name, found in speeds.items()}
        first = next(iter(medians.values()))
        for name, speed in medians.items():
            quarter, _, last = statistics.quantiles(speeds[name])
            rows.append(
                {
                    "data": data,
                    "where": "a worker" if workers else "main process",
                    "reader": name,
                    "items_per_second": speed,
                    "quartile_1": quarter,
                    "quartile_3": last,
                    "to_our_folder": speed / first,
                }
            )
            print(" | ".join(f"{v:.4g}" if isinstance(v, float) else str(v) for v in rows[-1].values()), flush=True)
    return rows


def _shares(reader: str, splits: Splits, batch_size: int) -> Row:
    """Measure the shares of reading, decoding, cropping and collating in the CPU time of images."""
    data: Any = splits.train
    spent = {"opening_and_bytes": 0.0, "decoding": 0.0, "crop_and_resize": 0.0, "collating": 0.0}
    decode, decoding = data.read, [0.0]

    def timed(index: int, side: int | None) -> Tensor:
        begin = time.process_time()
        image: Tensor = decode(index, side)
        decoding[0] += time.process_time() - begin
        return image

    data.read = timed
    for batch in range(20):
        keys = [(batch, index) for index in torch.randperm(len(data))[:batch_size].tolist()]
        begin = time.process_time()
        for _, index in keys:
            file = data.files[index]
            file.read() if isinstance(file, Member) else file.read_bytes()
        read = time.process_time()
        decoding[0] = 0.0
        samples = [Sample(data[key]) for key in keys]
        made = time.process_time()
        collate(samples)
        spent["opening_and_bytes"] += read - begin
        spent["decoding"] += decoding[0] - (read - begin)
        spent["crop_and_resize"] += made - read - decoding[0]
        spent["collating"] += time.process_time() - made
    data.read = decode
    whole = sum(spent.values())
    row: Row = {"reader": reader, **{name: time_spent / whole for name, time_spent in spent.items()}}
    print(row, flush=True)
    return row


def _padding(root: Path) -> list[Row]:
    """Measure the padding of batches of whole recordings, with and without length bucketing."""
    splits = audio_folder(str(root), val_share=0, **{**SOUND, "crop_tokens": None})
    data: Any = splits.train
    sizes = data.sizes()
    rows: list[Row] = []
    for bucket, budget, batch_size in ((BUCKET, BUDGET, MOST), (0.0, None, FIXED)):
        form: dict[str, Any] = {"bucket": bucket, "budget": budget, "batch_size": batch_size, "workers": 0}
        sampler: Any = DataModule(splits, updates=1, **form).train_dataloader().batch_sampler
        sampler.batches = 4 * (len(sampler.epoch(0)) if bucket else -(-len(sizes) // batch_size))
        lengths = [[sizes[index] for _, index in keys] for keys in sampler]
        wide = sum(max(batch) * len(batch) for batch in lengths)
        rows.append(
            {
                "loader.bucket": bucket,
                "loader.budget": "none" if budget is None else budget,
                "loader.batch_size": batch_size,
                "batches": len(lengths),
                "sounds_per_batch": sum(map(len, lengths)) / len(lengths),
                "largest_batch_seconds": max(max(batch) * len(batch) for batch in lengths) / SOUND["sample_rate"],
                "filled_up": 1 - sum(map(sum, lengths)) / wide,
            }
        )
        print(rows[-1], flush=True)
    return rows


if __name__ == "__main__":
    main()
