"""Training by two processes against one: equality of loss curves, and scaling efficiency.

    python benchmarks/reliability/processes.py curves --out benchmarks/results/reliability/curves.csv
    python benchmarks/reliability/processes.py efficiency --out benchmarks/results/reliability/efficiency.csv

`curves` trains the demo codec for 100 updates with each bottleneck, kept tokens and codebooks sampled per sample. It is
trained by one process and by two with half of each batch, on the CPU (gloo), at the default learning rate and at the
demo's, which is 30 times as high. A row has the largest difference of the logged loss, and the first update at which it
exceeds 1e-4. A control has the same for one process with one thread against two threads, which differ in rounding only.
All runs are repeated in double precision, where rounding errors are 5e8 times smaller, but a real difference is not.

`efficiency` times updates on random images with one thread per process, by one process and by two with a whole batch
each. It compares our strategy with a static graph per reducer, the same with a search for unused parameters, fsdp2, and
Lightning's DDP, without and with `find_unused_parameters`, which a discriminator needs. All run in turn on the same two
cores. Efficiency is samples per second divided by twice those of one process, by medians of the rounds. The last column
is the memory of codec parameters, EMA and optimizer states on one process.
"""

import argparse
import csv
import os
import shlex
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

_checkout = Path(__file__).resolve().parents[2]
if __name__ == "__main__":
    # A checkout needs no install (ARCHITECTURE.md, "Where the package is").
    sys.path[0] = str(_checkout / ".pkg")

import hydra  # noqa: E402
import pytorch_lightning as pl  # noqa: E402
import torch  # noqa: E402
from pytorch_lightning.strategies import DDPStrategy  # noqa: E402

from varitok import __version__  # noqa: E402
from varitok.codecs.distributed import local_tensor  # noqa: E402
from varitok.codecs.evaluation.table import write_rows  # noqa: E402
from varitok.codecs.training.distributed import strategy as parallel  # noqa: E402
from varitok.codecs.training.run import build_run  # noqa: E402
from varitok.data.batch import Splits  # noqa: E402
from varitok.data.datasets.images import ImageDataset  # noqa: E402

__all__ = ["BOTTLENECKS", "compare", "main"]

BOTTLENECKS = {
    "fsq": ["bottleneck=fsq"],
    "ema_vq": ["bottleneck=vq_ema", "bottleneck.dim=16", "bottleneck.codebook_size=256"],
    "lfq": ["bottleneck=lfq", "bottleneck.bits=10", "bottleneck.temperature=1"],
    "lfq, sharp": ["bottleneck=lfq", "bottleneck.bits=10", "bottleneck.temperature=0.01"],
    "rvq": [
        "bottleneck=rvq",
        "bottleneck.num_codebooks=4",
        "bottleneck.level.dim=16",
        "bottleneck.level.codebook_size=64",
    ],
}
COMMON = [
    "experiment=image/demo", "data=dead_leaves", "length=two_axes", "trainer.enable_progress_bar=false",
    "trainer.accelerator=cpu", "callbacks.samples=null", "callbacks.evaluation=null", "export=none",
    "training.log_every=1", "data.val_length=2",
]  # fmt: skip
GAN = ["objective=adversarial", "objective.adversarial.discriminator.width=16", "objective.adversarial.start=0"]
STRATEGIES = {
    "ours": {},
    "ours, unused looked for": {"ours": "ddp_find_unused_parameters_true"},
    "fsdp2": {"ours": "fsdp2"},
    "Lightning's DDP": {"theirs": {}},
    "Lightning's DDP, find_unused_parameters": {"theirs": {"find_unused_parameters": True}},
}
WARM_UP = 3  # untimed updates of each round
# A `sitecustomize`, which Python runs at each process's start; it replaces float32 by float64.
DOUBLE = """
import torch
torch.set_default_dtype(torch.float64)
torch.Tensor.float = torch.Tensor.double
torch.float32 = torch.float64
"""
ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1", "WANDB_MODE": "offline", "TORCH_CPP_LOG_LEVEL": "ERROR"}


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("what", choices=["curves", "efficiency", "worker"])
    parser.add_argument("--updates", type=int, help="curves: of each run, default 100; efficiency: timed, default 20")
    parser.add_argument("--batch", type=int, default=16, help="samples: curves, in all; efficiency, per process")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", type=Path, required=True, metavar="CSV")
    parser.add_argument("--strategy", choices=STRATEGIES, help=argparse.SUPPRESS)
    parser.add_argument("--gan", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    words = sys.argv[1:] if arguments is None else arguments
    if options.what == "worker":
        options.out.write_text(" ".join(map(str, _measured(options))))
        return
    header = {
        "command": shlex.join(["python", "benchmarks/reliability/processes.py", *words]),
        "versions": f"varitok {__version__}, torch {torch.__version__}",
        "batch": f"{options.batch} {'of all' if options.what == 'curves' else 'of each'}",
    }
    options.updates = options.updates or (100 if options.what == "curves" else 20)
    rows = []
    for row in _curves(options) if options.what == "curves" else _efficiency(options):
        rows.append(row)
        print(*(f"{key} {value}" for key, value in row.items()), sep=", ", flush=True)
        write_rows(options.out, header, rows)


def _curves(options: argparse.Namespace) -> Iterator[dict[str, object]]:
    for double in (False, True):
        for rate in (1e-4, 3e-3):
            for name, words in BOTTLENECKS.items():
                found = compare([*words, f"optim.codec.lr={rate}"], options.updates, options.batch, double)
                yield {"bottleneck": name, "learning rate": rate, "precision": "double" if double else "single"} | found


def compare(words: Sequence[str], updates: int, batch: int, double: bool = False) -> dict[str, object]:
    """Train by one process, by two, and by one with two threads; compare their logged losses."""
    one, two, threads = (_losses(words, updates, batch, double, *how) for how in ((1, 1), (2, 1), (1, 2)))
    found: dict[str, object] = {"updates": updates, "loss at first": one[0], "loss at last": one[-1]}
    for by, other in {"processes": two, "threads": threads}.items():
        away = [abs(mine - theirs) for mine, theirs in zip(one, other, strict=True)]
        found[f"largest difference by {by}"] = max(away)
        found[f"above 1e-4 by {by} from"] = next((update for update, far in enumerate(away, 1) if far > 1e-4), "never")
    return found


def _losses(words: Sequence[str], updates: int, batch: int, double: bool, processes: int, threads: int) -> list[float]:
    """Return the loss of each update."""
    shared = [f"loader.batch_size={batch // processes}", f"trainer.devices={processes}", f"updates={updates}"]
    with tempfile.TemporaryDirectory() as place:
        Path(place, "sitecustomize.py").write_text(DOUBLE if double else "")
        subprocess.run(
            [
                *(sys.executable, str(_checkout / "train.py"), *COMMON, *words, *shared),
                *(f"data.length={8 * batch}", f"hydra.run.dir={place}/run"),
            ],
            env=ENVIRONMENT | {"OMP_NUM_THREADS": str(threads), "PYTHONPATH": place},
            check=True,
            stdout=subprocess.DEVNULL,
        )
        with Path(place, "run", "metrics.csv").open(newline="") as file:
            return [float(row["value"]) for row in csv.DictReader(file) if row["name"] == "loss"]


def _efficiency(options: argparse.Namespace) -> Iterator[dict[str, object]]:
    for gan in (False, True):
        # Lightning's default fails with a discriminator.
        chosen = [name for name in STRATEGIES if not gan or name != "Lightning's DDP"]
        found: dict[str, list[list[float]]] = {name: [] for name in ("one process", *chosen)}
        for _ in range(options.rounds):
            for name, rounds in found.items():
                rounds.append(_worked(name, gan, options))
        medians = {
            name: [statistics.median(column) for column in zip(*rounds, strict=True)] for name, rounds in found.items()
        }
        alone = medians["one process"][0]
        for name, (each, kept) in medians.items():
            count = 1 if name == "one process" else 2
            yield {
                "discriminator": "yes" if gan else "no",
                "strategy": name,
                "processes": count,
                "samples a second": count * options.batch / each,
                "efficiency": alone / each,
                "megabytes kept": kept / 1e6,
            }


def _worked(name: str, gan: bool, options: argparse.Namespace) -> list[float]:
    """Train by one or two processes, started like by torchrun; return rank 0's seconds per update and bytes."""
    count = 1 if name == "one process" else 2
    with socket.socket() as free, tempfile.TemporaryDirectory() as place:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
        free.close()
        strategy = [] if count == 1 else ["--strategy", name]
        words = ["worker", "--updates", str(options.updates), "--batch", str(options.batch), *strategy]
        shared = {"WORLD_SIZE": str(count), "LOCAL_WORLD_SIZE": str(count), "GROUP_RANK": "0"}
        shared |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "TORCHELASTIC_RUN_ID": "efficiency"}
        started = [
            subprocess.Popen(
                [sys.executable, __file__, *words, *(["--gan"] if gan else []), "--out", f"{place}/{rank}"],
                env=ENVIRONMENT | shared | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
                stdout=subprocess.DEVNULL,
            )
            for rank in range(count)
        ]
        if any(process.wait() for process in started):
            raise SystemExit(f"{name}: a process failed")
        return [float(number) for number in Path(place, "0").read_text().split()]


class _Stopwatch(pl.Callback):
    def on_train_batch_end(self, trainer: pl.Trainer, pl_module, *_: object) -> None:
        if pl_module.update == WARM_UP:
            self.began = time.perf_counter()
        self.ended = time.perf_counter()


def _measured(options: argparse.Namespace) -> tuple[float, int]:
    """Train as one process; return the seconds per update, and the bytes of parameters, EMA and optimizer states."""
    torch.set_num_threads(1)
    chosen = STRATEGIES.get(options.strategy, {})
    name = chosen.get("ours", "ddp") if options.strategy else "auto"
    if "theirs" in chosen:
        parallel.STRATEGIES["ddp"] = lambda timeout: DDPStrategy(**chosen["theirs"])
    count = 2 if options.strategy else 1
    words = [*COMMON, *(GAN if options.gan else []), f"trainer.devices={count}", f"trainer.strategy={name}"]
    words += [f"updates={WARM_UP + options.updates}", f"loader.batch_size={options.batch}", "loader.workers=0"]
    with hydra.initialize_config_module("varitok.configs", version_base="1.3"):
        config = hydra.compose("train", [*words, "training.log_every=50"])
    images = torch.randint(0, 256, (64, 3, 32, 32), dtype=torch.uint8)  # in memory: only the step is timed
    resident = ImageDataset(lambda i, _: images[i], 64, image_size=32, train=False)
    with tempfile.TemporaryDirectory() as folder:
        run = build_run(config, Path(folder))
        run.data.splits = Splits(resident, resident)
        watch = _Stopwatch()
        run.trainer.callbacks = [watch]
        run.trainer.fit(run.module, run.data)
        states = [
            value
            for optimizer in run.trainer.optimizers
            for state in optimizer.state.values()
            for value in state.values()
        ]
        kept = [*run.module.codec.parameters(), *(run.module.average.parameters()), *states]
        size = sum(local_tensor(one).untyped_storage().nbytes() for one in kept)
    return (watch.ended - watch.began) / options.updates, size


if __name__ == "__main__":
    main()
