"""The command `varitok sweep`."""

import argparse
from collections.abc import Sequence
from pathlib import Path

from varitok import UserError

from ...conversion import RANGES, convert
from .figure import draw_parallel
from .results import read_results
from .search import Search
from .space import read_sweep

__all__ = ["main"]


def main(words: Sequence[str]) -> None:
    """Run `varitok sweep`.

    Raises:
        UserError: A mistake in the arguments, or too many failed trials.
    """
    options = _parser().parse_intermixed_args(words)
    if (options.file is None) == (options.summary is None):
        raise UserError("give a sweep's file, or --summary FOLDER")
    if options.summary:
        _summarise(options.summary, options)
        return
    convert(options.jobs, int, "--jobs", RANGES)
    given = dict(word.partition("=")[::2] for word in options.words)
    if wrong := [word for word in options.words if not word.partition("=")[2]]:
        raise UserError(f"{wrong[0]}: can't be read; give KEY=VALUE")
    sweep = read_sweep(options.file)
    convert(options.trials, int | None, "--trials", RANGES)
    trials = options.trials or sweep.trials or (len(sweep.grid()) if sweep.method == "grid" else None)
    if trials is None:
        raise UserError(f"{options.file}: has no run_cap; give --trials")
    folder = options.out or Path("runs", "sweep", options.file.stem)
    search = Search(sweep, folder, given, options.jobs)
    try:
        search.run(trials)
    finally:
        if search.finished:
            _summarise(folder, options)


def _summarise(folder: Path, options: argparse.Namespace) -> None:
    """Print the table of a sweep's runs; write it as CSV and plot it."""
    maximize = None if options.goal is None else options.goal == "maximize"
    results = read_results(folder, options.metric, maximize)
    results.print()
    results.write_csv(folder / "results.csv")
    draw_parallel(folder / "results.png", results)
    print(f"written to {folder / 'results.csv'} and .png")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        "varitok sweep",
        description="Search hyperparameters as described by a file for `wandb sweep`, but on this machine."
        " To resume an interrupted sweep, call the same command again.",
        epilog="for example: varitok sweep configs/sweep/image_rate.yaml data.root=PHOTOS --trials 20",
    )
    parser.add_argument("file", type=Path, nargs="?", metavar="FILE", help="in W&B's format; see configs/sweep")
    parser.add_argument("words", nargs="*", metavar="KEY=VALUE", help="for all trials; override the file's values")
    parser.add_argument("--trials", type=int, metavar="N", help="total number of trials; default: the file's run_cap")
    parser.add_argument("--jobs", type=int, default=1, metavar="N", help="parallel trials; default: %(default)s")
    parser.add_argument("--out", type=Path, metavar="FOLDER", help="folder of the runs; default: runs/sweep/FILE")
    parser.add_argument(
        "--summary",
        type=Path,
        metavar="FOLDER",
        help="only tabulate and plot the runs of a sweep, also of W&B or Hydra",
    )
    parser.add_argument("--metric", metavar="NAME", help="metric to rank the runs by, such as val/psnr@64")
    parser.add_argument("--goal", choices=["maximize", "minimize"], help="goal of that metric")
    return parser
