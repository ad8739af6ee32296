"""Train twins, codecs that differ in one mechanism, for as many core-seconds each, and judge the mechanism's claim.

    python benchmarks/twins.py --list
    python benchmarks/twins.py [NAME ...] --data ../shared/data [--seeds 1 2] [--jobs 2] [--folder runs/twins]
    python benchmarks/twins.py --judge

`twins.yaml` has the claims and the overrides of each arm. An arm trains on one thread. Its number of updates is the
twin's CPU seconds divided by those of one of its updates, the difference of two short runs: wall time would count what
else the machine does. Validation data are evaluated as at the end of every run.

A run that was killed is resumed, one that was evaluated isn't trained again, and each result is written as it comes:
a row of `results/twins.csv` for each twin, arm, seed and metric. `--judge` makes `twins.md` of these rows, as does the
end of every call.

A claim is "shown" if the first arm is ahead of the other with every seed by more than either arm's range over seeds,
"against" if the other is so, and "not shown" else. Two seeds at least.
"""

import argparse
import csv
import os
import shutil
import statistics
import subprocess
import sys
import threading
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / ".pkg"))

import yaml

from varitok.codecs.evaluation.table import read_csv

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
COLUMNS = ["twin", "arm", "seed", "updates", "core_seconds", "bits", "metric", "value"]
KEY = ["twin", "arm", "seed", "metric"]
PAIRS = (2, 8), (10, 40)  # updates of the two runs that measure an update, first for slow ones
Row = dict[str, str]


@dataclass(frozen=True)
class Twin:
    """A claim and the arms that test it; see `twins.yaml`."""

    claim: str
    seconds: float
    data: str | None
    metrics: Sequence[str]
    common: Sequence[str]
    arms: Mapping[str, Sequence[str]]
    lower: bool = False

    def overrides(self, arm: str, data: Path, seed: int) -> list[str]:
        """Return the overrides of `train.py` for an arm, without its number of updates."""
        fixed = ["export=none", "trainer.enable_progress_bar=false", "callbacks.samples=null", "loader.workers=0"]
        root = [] if self.data is None else [f"data.root={data / self.data}"]
        return [*self.common, *self.arms[arm], *root, f"seed={seed}", *fixed]


def read_twins(path: Path) -> dict[str, Twin]:
    """Return the twins of a table such as `twins.yaml`, by name."""
    return {name: Twin(**entry) for name, entry in yaml.safe_load(path.read_text(encoding="utf-8")).items()}


def train(words: Sequence[str], updates: int, run: Path) -> float:
    """Train or resume a run on one thread, and return its CPU seconds.

    Raises:
        RuntimeError: The run failed; its log is beside its folder.
    """
    run.mkdir(parents=True, exist_ok=True)
    words = [*words, f"updates={updates}", f"checkpoint.every={max(1, updates // 4)}", f"hydra.run.dir={run}"]
    command = [sys.executable, "train.py", *words]
    with run.with_suffix(".log").open("a") as log:
        process = subprocess.Popen(
            command, cwd=ROOT, stdout=log, stderr=log, env={**os.environ, "OMP_NUM_THREADS": "1"}
        )
        _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise RuntimeError(f"{' '.join(command)}: status {process.returncode}; see {run.with_suffix('.log')}")
    return usage.ru_utime + usage.ru_stime


def updates_of(twin: Twin, arm: str, data: Path, folder: Path) -> int:
    """Return the number of updates that an arm makes in the twin's CPU seconds, measured once."""
    measured = folder / arm / "updates.txt"
    if not measured.is_file():
        words = [*twin.overrides(arm, data, 0), "callbacks.evaluation=null"]
        for counts in PAIRS:
            spent = []
            for count in counts:
                shutil.rmtree(folder / arm / f"first_{count}", ignore_errors=True)  # resumed, it would have taken less
                spent.append(train(words, count, folder / arm / f"first_{count}"))
            each = (spent[1] - spent[0]) / (counts[1] - counts[0])
            if each > twin.seconds / 100:
                break
        measured.write_text(f"{max(1, round(twin.seconds / each))}\n")
    return int(measured.read_text())


def run_arm(name: str, twin: Twin, arm: str, seed: int, data: Path, folder: Path) -> list[Row]:
    """Train and evaluate an arm with a seed, and return its rows."""
    updates = updates_of(twin, arm, data, folder / name)
    run = folder / name / arm / f"seed_{seed}"
    table, spent = run / "evaluation" / "evaluation.csv", run / "core_seconds.txt"
    if not table.is_file():
        resumed = run.is_dir()
        seconds = train([*twin.overrides(arm, data, seed), f"callbacks.evaluation.every={updates}"], updates, run)
        if not resumed:
            spent.write_text(f"{seconds:.0f}")
    last = read_csv(table).rows[-1]
    shared = {"twin": name, "arm": arm, "seed": str(seed), "updates": str(updates), "bits": f"{last['bits']:.6g}"}
    shared["core_seconds"] = spent.read_text() if spent.is_file() else ""
    return [{**shared, "metric": one, "value": f"{last[one]:.6g}"} for one in twin.metrics if one in last]


def read_results(path: Path) -> list[Row]:
    """Return the rows of a table of results; none if there is no such file."""
    if not path.is_file():
        return []
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(line for line in file if not line.startswith("#")))


def write_results(path: Path, rows: Iterable[Row]) -> None:
    """Write a table of results."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="", encoding="utf-8") as file:
        file.write(
            "# python benchmarks/twins.py --data DATA; core_seconds: of the whole process, empty if it was resumed\n"
        )
        writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


def values_of(rows: Iterable[Row], metric: str) -> dict[str, list[float]]:
    """Return one metric's values of all seeds, by arm."""
    found: dict[str, list[float]] = {}
    for row in rows:
        if row["metric"] == metric:
            found.setdefault(row["arm"], []).append(float(row["value"]))
    return found


def interval(values: Sequence[float]) -> str:
    """Return the mean of an arm's values, and half their range if there are several; empty if there are none."""
    if not values:
        return ""
    half = f" ± {(max(values) - min(values)) / 2:.2g}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.4g}{half}"


def verdict(first: Sequence[float], other: Sequence[float], lower: bool = False) -> str:
    """Judge the claim that the first arm's values are above the other's, or below if `lower`; see the module."""
    if min(len(first), len(other)) < 2:
        return "one seed"
    if lower:
        first, other = other, first
    spread = max(max(first) - min(first), max(other) - min(other))
    if min(first) - max(other) > spread:
        return "shown"
    return "against" if min(other) - max(first) > spread else "not shown"


def section(name: str, twin: Twin, rows: Sequence[Row]) -> list[str]:
    """Return a twin's part of the page, as lines of Markdown.

    Args:
        name: Its name.
        twin: The twin.
        rows: Its results; one at least.

    Raises:
        ValueError: Arms have different bits.
    """
    bits = {row["bits"] for row in rows}
    if len(bits) > 1:
        raise ValueError(f"{name}: arms of {', '.join(sorted(bits))} bits")
    metrics = [metric for metric in twin.metrics if values_of(rows, metric)]
    lines = [f"## {name}", "", f"{twin.claim}. {bits.pop()} bits, {twin.seconds} core-seconds; all arms: "]
    lines[-1] += " ".join(f"`{word}`" for word in twin.common) + "."
    lines += [
        "",
        f"| arm | overrides | updates | {' | '.join(metrics)} | claim |",
        "|---|---|" + "---:|" * (1 + len(metrics)) + "---|",
    ]
    decisive = values_of(rows, twin.metrics[0])
    claimed, *_ = twin.arms
    for arm, words in twin.arms.items():
        if arm not in decisive:
            continue
        updates = {row["updates"] for row in rows if row["arm"] == arm}
        cells = [arm, " ".join(f"`{word}`" for word in words) or "none", "/".join(sorted(updates))]
        cells += [interval(values_of(rows, metric).get(arm, [])) for metric in metrics]
        cells += ["" if arm == claimed else verdict(decisive.get(claimed, []), decisive[arm], twin.lower)]
        lines.append(f"| {' | '.join(cells)} |")
    return [*lines, ""]


def page(twins: Mapping[str, Twin], rows: Sequence[Row]) -> str:
    """Return the page of all twins that have results, as Markdown."""
    lines = [
        "# Twins",
        "",
        "Made by `python benchmarks/twins.py --judge` of `results/twins.csv`; the script says how arms are made",
    ]
    lines += ["equal and claims judged. Values are means over seeds, with half their range.", ""]
    for name, twin in twins.items():
        own = [row for row in rows if row["twin"] == name]
        lines += section(name, twin, own) if own else []
    return "\n".join(lines).rstrip() + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME", help="twins to train; all if none is named")
    parser.add_argument("--list", action="store_true", help="print the claims and end")
    parser.add_argument("--judge", action="store_true", help="make the page of the results and end")
    parser.add_argument("--data", type=Path, default=ROOT.parent / "shared" / "data")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--arms", nargs="+", help="train these arms alone")
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time, of one thread each")
    parser.add_argument("--folder", type=Path, default=ROOT / "runs" / "twins")
    parser.add_argument("--table", type=Path, default=HERE / "twins.yaml")
    parser.add_argument("--out", type=Path, default=HERE / "results" / "twins.csv")
    parser.add_argument("--page", type=Path, default=HERE / "twins.md")
    options = parser.parse_args()
    twins = read_twins(options.table)
    if unknown := set(options.names) - set(twins):
        parser.error(f"{', '.join(sorted(unknown))}: no such twins; there are {', '.join(twins)}")
    if options.list:
        print("\n".join(f"{name}: {twin.claim}" for name, twin in twins.items()))
        return
    lock = threading.Lock()

    def every_seed(name: str, arm: str) -> None:
        for seed in options.seeds:
            rows = run_arm(name, twins[name], arm, seed, options.data.resolve(), options.folder.resolve())
            with lock:
                results = {tuple(row[key] for key in KEY): row for row in [*read_results(options.out), *rows]}
                write_results(options.out, results.values())
            print(
                ", ".join([name, arm, f"seed {seed}", *(f"{row['metric']} {row['value']}" for row in rows)]), flush=True
            )

    if not options.judge:
        arms = [(name, arm) for name in options.names or twins for arm in twins[name].arms]
        with ThreadPoolExecutor(options.jobs) as pool:
            waiting = [pool.submit(every_seed, *each) for each in arms if not options.arms or each[1] in options.arms]
            for each in waiting:
                each.result()
    options.page.write_text(page(twins, read_results(options.out)), encoding="utf-8")


if __name__ == "__main__":
    main()
