"""Kill a run at random moments, resume it each time, and compare all logged values with an uninterrupted run.

    python benchmarks/reliability/kill_resume.py --out benchmarks/results/reliability/kill_resume.csv

Three runs are trained by one process and by two (gloo), with every update logged at full precision: an image codec with
a discriminator; an audio codec (RVQ, quantizer dropout) with a discriminator and a loss balancer; a video codec. All
processes get SIGKILL up to half a second after a random update was logged: in a step, a save or an evaluation. A row of
the table has the number of kills, of repeated updates, of most repeated updates after one kill, and of logged values
that differ from the uninterrupted run in any bit. A value logged twice because of a kill is compared twice.
"""

import argparse
import csv
import os
import random
import shlex
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

_checkout = Path(__file__).resolve().parents[2]
if __name__ == "__main__":
    # A checkout needs no install (ARCHITECTURE.md, "Where the package is").
    sys.path[0] = str(_checkout / ".pkg")

import torch  # noqa: E402

from varitok import __version__  # noqa: E402
from varitok.codecs.evaluation.table import write_rows  # noqa: E402

__all__ = ["main"]

ADVERSARIAL = "objective.adversarial."
RUNS = {
    "image, adversarial": [
        "experiment=image/demo", "data=dead_leaves", "objective=adversarial", f"{ADVERSARIAL}start=20",
        f"{ADVERSARIAL}head_start=10", f"{ADVERSARIAL}discriminator.width=16", "callbacks.evaluation.every=50",
    ],
    "sound, residual, adversarial": [
        "experiment=audio/demo", "data=voices", "length=quantizer_dropout", "objective=encodec",
        f"{ADVERSARIAL}discriminator.width=4", "loader.batch_size=4", "callbacks.evaluation.every=50",
    ],
    "clip": [
        "experiment=video/cosmos_small", "data=scenes", "data.image_size=32", "loader.batch_size=4",
        "callbacks.evaluation.every=50",
    ],
}  # fmt: skip
COMMON = [
    "training.log_every=1", "trainer.enable_progress_bar=false", "trainer.accelerator=cpu", "export=none",
    "callbacks.samples=null", "loader.workers=1",
]  # fmt: skip
TWO = ["trainer.devices=2"]
CLOCKS = ("checkpoint/", "speed/")  # logged timings
PATIENCE = 600.0  # seconds without a new line in the log

Row = tuple[int, str, str]


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line; the exit status is 1 if a value differs."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--kills", type=int, default=20, help="kills per run; default: %(default)s")
    parser.add_argument("--updates", type=int, default=120, help="updates per run; default: %(default)s")
    parser.add_argument("--every", type=int, default=7, help="updates between checkpoints; default: %(default)s")
    parser.add_argument("--processes", type=int, nargs="+", default=[1, 2], choices=[1, 2])
    parser.add_argument("--runs", nargs="+", default=list(RUNS), choices=list(RUNS), metavar="NAME")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, required=True, metavar="CSV")
    options = parser.parse_args(arguments)
    words = sys.argv[1:] if arguments is None else arguments
    header = {
        "command": shlex.join(["python", "benchmarks/reliability/kill_resume.py", *words]),
        "versions": f"varitok {__version__}, torch {torch.__version__}",
        "checkpoints": f"every {options.every} updates",
    }
    rows = []
    for name in options.runs:
        for processes in options.processes:
            rows.append(_torment(name, processes, options))
            print(*(f"{key} {value}" for key, value in rows[-1].items()), sep=", ", flush=True)
            write_rows(options.out, header, rows)
    sys.exit(any(row["values that differ"] for row in rows))


def _torment(name: str, processes: int, options: argparse.Namespace) -> dict[str, object]:
    """Train uninterrupted and with kills, and compare the logs."""
    chance = random.Random(f"{options.seed} {name} {processes}")
    numbers = [f"updates={options.updates}", f"checkpoint.every={options.every}"]
    command = [*RUNS[name], *COMMON, *numbers, *(TWO if processes == 2 else [])]
    moments = sorted(chance.sample(range(2, options.updates), options.kills))
    with tempfile.TemporaryDirectory() as place:
        whole, part = Path(place) / "whole", Path(place) / "part"
        _live(command, whole)
        wanted = _logged(whole)
        seen, again = list[Row](), list[int]()
        for moment in moments:
            _live(command, part, moment, chance.uniform(0, 0.5))
            reached = _logged(part)
            seen += reached
            last = part / "checkpoints" / "last.ckpt"
            saved = int(torch.load(last, weights_only=True)["state_dict"]["updates"]) if last.is_file() else 0
            again.append(max([update for update, _, _ in reached], default=0) - saved)
        _live(command, part)
        final = _logged(part)
    expected = {(update, key): value for update, key, value in wanted}
    twice = len(final) - len({(update, key) for update, key, _ in final})
    differing = sum(expected.get((update, key)) != value for update, key, value in [*seen, *final])
    return {
        "run": name,
        "processes": processes,
        "kills": len(moments),
        "updates": options.updates,
        "taken again": sum(again),
        "most after a kill": max(again),
        "values": len(wanted),
        "values compared": len(seen) + len(final),
        "values that differ": differing + twice + len(wanted) - len(final) + (final != wanted),
    }


def _live(command: Sequence[str], folder: Path, moment: int | None = None, delay: float = 0.0) -> None:
    """Train to the end, or kill all processes `delay` seconds after update `moment` was logged."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "WANDB_MODE": "offline"}
    with tempfile.TemporaryFile() as told:
        process = subprocess.Popen(
            [sys.executable, str(_checkout / "train.py"), *command, f"hydra.run.dir={folder}"],
            env=environment,
            stdout=told,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        size, moved = -1, time.monotonic()
        while process.poll() is None:
            rows = _logged(folder)
            if len(rows) != size:
                size, moved = len(rows), time.monotonic()
            if moment is not None and rows and rows[-1][0] >= moment:
                time.sleep(delay)
                break
            if time.monotonic() - moved > PATIENCE:
                break
            time.sleep(0.01)
        ended = process.poll()
        try:
            os.killpg(process.pid, signal.SIGKILL)
        except ProcessLookupError:
            pass
        process.wait()
        if (ended != 0) if moment is None else ended not in (None, 0):
            told.seek(0)
            raise SystemExit(f"the run ended with status {ended}:\n{told.read().decode(errors='replace')[-3000:]}")


def _logged(folder: Path) -> list[Row]:
    """Read the logged rows, except timings, which always differ."""
    path = folder / "metrics.csv"
    if not path.is_file():
        return []
    with path.open(newline="") as file:
        rows = [row for row in csv.reader(file) if len(row) == 3][1:]
    return [
        (int(update), name, value) for update, name, value in rows if not name.startswith(("checkpoint/", "speed/"))
    ]


if __name__ == "__main__":
    main()
