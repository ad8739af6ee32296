"""The subcommand `report`."""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

from varitok import UserError, progress
from varitok.codecs.conversion import RANGES, convert

from .classics import read_classics
from .live.page import write_live
from .page import TITLE, write_page
from .subject import Source, open_subject

__all__ = ["main"]


def main(words: Sequence[str]) -> None:
    """Run `varitok report`: write the report or the live page."""
    options = _parser().parse_args(words)
    if options.live:
        _live(options)
        return
    convert(options.count, int, "--count", RANGES)
    convert(options.seconds, Annotated[float, "[0.1, inf)"], "--seconds")
    source = Source(options.data, options.files, options.count, options.seconds)
    classics = [read_classics(path) for path in options.classic]
    subjects = [open_subject(path, source) for path in progress(options.subjects, len(options.subjects), "shown")]
    write_page(options.out, subjects, classics, options.title)
    print(f"{options.out}: {options.out.stat().st_size / 1e6:.1f} MB, {len(subjects)} sections; open it in a browser")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        "varitok report",
        description="Write one HTML page with reconstructions and rate-distortion curves of runs and bundles.",
        epilog="varitok report runs/one_d_piece_64/photos --out report.html"
        " | varitok report tokenizer --files PHOTOS | varitok report RUN1 RUN2 --classic comparison/comparison.csv",
    )
    parser.add_argument(
        "subjects", type=Path, nargs="+", metavar="RUN_OR_BUNDLE", help="run's folder or checkpoint, or bundle's folder"
    )
    parser.add_argument(
        "--files", type=Path, nargs="+", default=[], metavar="PATH", help="files and folders to encode with bundles"
    )
    parser.add_argument(
        "--data", type=Path, metavar="FOLDER", help="other data for runs: its val/ beside train/, or all"
    )
    parser.add_argument(
        "--classic", type=Path, nargs="+", default=[], metavar="CSV",
        help="tables of classical codecs (varitok compare); those in a run's evaluation/ are included",
    )  # fmt: skip
    parser.add_argument(
        "--live", action="store_true", help="instead, write a page that runs one bundle on files dropped there"
    )
    parser.add_argument(
        "--onnxruntime-web", type=Path, metavar="FILE", help="for --live; by default from the cache, or by npm"
    )
    parser.add_argument("--count", type=int, default=6, help="number of samples of each; default: %(default)s")
    parser.add_argument("--seconds", type=float, default=4.0, help="duration of audio and clips; default: %(default)s")
    parser.add_argument("--title", default=TITLE, help="title of the page; default: %(default)s")
    parser.add_argument("--out", type=Path, default=Path("report.html"), help="path of the page; default: %(default)s")
    return parser


def _live(options: argparse.Namespace) -> None:
    """Write the live page."""
    if len(options.subjects) > 1:
        raise UserError("--live shows one bundle; name only one")
    write_live(options.out, options.subjects[0], options.onnxruntime_web)
    print(f"{options.out}: {options.out.stat().st_size / 1e6:.1f} MB; open it in a browser, and drop a file there")
