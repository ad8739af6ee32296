"""Published weights as a run; the subcommand `import`."""

import argparse
import math
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from ..importers.importer import import_weights, write_run
from ..importers.registry import FAMILIES

__all__ = ["main"]


def main(words: Sequence[str]) -> None:
    """Run `varitok import`."""
    parser = argparse.ArgumentParser(
        "varitok import",
        description="Make a run of published weights, to evaluate, export or fine-tune. Nothing is downloaded.",
        epilog="for example: varitok import encodec_24khz-d7cc33bc.th --out runs/encodec",
    )
    parser.add_argument(
        "path", type=Path, metavar="FILE_OR_FOLDER", help="a file of weights, or a folder of transformers or diffusers"
    )
    parser.add_argument("--as", dest="name", metavar="NAME", help=f"one of {', '.join(FAMILIES)}; guessed by default")
    parser.add_argument("--out", type=Path, required=True, metavar="RUN", help="the run's folder")
    parser.add_argument("--data", default="data", metavar="FOLDER", help="the run's data: trained, evaluated and shown")
    parser.add_argument("--weights", metavar="SET", help="which of several sets of weights in a file, such as ema")
    options = parser.parse_args(words)
    found = import_weights(options.path, options.name, data=options.data, weights=options.weights)
    write_run(found, options.out)
    millions = sum(weight.numel() for weight in found.codec.parameters()) / 1e6
    bottleneck = found.codec.bottleneck
    bits = sum(math.log2(size) for size in bottleneck.codebook_sizes)
    rate = f"{found.codec.num_codebooks} codebooks, {bits:.0f} bits a token" if bits else f"{bottleneck.dim} channels"
    console = Console()
    for line in (
        f"{found.family.title}, saved by {found.layout.name}: {millions:.1f} M parameters, {rate}",
        *found.notes,
        f"written to {options.out}; train it further by train.py --config-dir {options.out} --config-name config"
        f" init_from={options.out} data.root=FOLDER",
    ):
        console.print(line, highlight=False, soft_wrap=True)
