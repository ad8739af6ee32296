"""Export a run's codec as a bundle; the subcommand `export`."""

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf
from rich.console import Console
from rich.table import Table

from varitok.codecs.build import load_run

from ..exporters.bundle import FORMATS, INT8, architecture, export_bundle
from ..exporters.parity import ParityError
from ..exporters.weights import WEIGHTS

__all__ = ["main"]


def main(words: Sequence[str]) -> None:
    """Run `varitok export`; a failed parity check prints one line and exits with status 1."""
    parser = argparse.ArgumentParser(
        "varitok export",
        description="Export a run's codec for use without varitok.",
        epilog="for example: varitok export runs/demo --out tokenizer",
    )
    parser.add_argument("run", type=Path, metavar="RUN_OR_CKPT", help="a run's folder or a checkpoint")
    parser.add_argument("--out", type=Path, metavar="DIR", help="the bundle's folder; the run's bundle/ by default")
    parser.add_argument("--no-streaming", action="store_true", help="leave out the streaming graphs")
    parser.add_argument(
        "--formats",
        default=",".join(FORMATS),
        metavar="NAMES",
        help=f"default: %(default)s; {INT8} adds a decoder with 8-bit weights",
    )
    parser.add_argument(
        "--weights",
        default="float32",
        choices=WEIGHTS,
        help="round the weights first, for a smaller bundle; default: %(default)s",
    )
    parser.add_argument("--json", action="store_true", help="for scripts: the content of export.json")
    options = parser.parse_args(words)
    run = options.run if options.run.is_dir() else options.run.absolute().parent.parent
    folder = options.out or run / "bundle"
    codec, config = load_run(options.run)
    about = {"architecture": architecture(config), "image_size": OmegaConf.select(config, "data.image_size")}
    formats, streaming = options.formats.split(","), not options.no_streaming
    try:
        report = export_bundle(codec, folder, **about, formats=formats, streaming=streaming, weights=options.weights)
    except ParityError as error:
        print(f"varitok export: {error}", file=sys.stderr)
        sys.exit(1)
    if options.json:
        print(json.dumps(report, indent=2))
    else:
        _print(report, folder)


def _print(report: Mapping[str, Any], folder: Path) -> None:
    """Print the files' sizes and their parity with the trained codec."""
    table = Table("file", "KiB", box=None)
    table.columns[1].justify = "right"
    for name, file in report["files"].items():
        table.add_row(name, f"{file['bytes'] / 1024:.1f}")
    console = Console()
    console.print(table)
    for name, parity in report["parity"].items():
        figures = f"{parity['codes_equal']:.2%} of {parity['tokens']} codes equal"
        console.print(f"{name}: {figures}, signals within {parity['signal_error']:.1e} of the peak", highlight=False)
    console.print(f"parity holds; written to {folder}", highlight=False, soft_wrap=True)
