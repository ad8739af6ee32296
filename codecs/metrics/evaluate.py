"""Quality for each number of kept tokens: one loop for the training callback and for the command `varitok-evaluate`."""

import argparse
import math
import shlex
import sys
from collections.abc import Iterable, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Protocol

import torch
import torch.distributed as dist
import torchmetrics
from omegaconf import DictConfig
from torch import Tensor

import varitok
from varitok import UserError
from varitok.data.batch import Batch, Splits, normalise, to_uint8
from varitok.data.module import validation_loader

from ..build import build, load_run
from ..lengths import ladder
from . import frechet, image, rate
from .robustness import available_features, evaluation_mode, robustness
from .table import Row, Table

__all__ = ["Evaluable", "available", "evaluate", "main"]


ROUNDING = {"rounding": "both sides are compared as 8-bit values; decoded ones are clamped and rounded to the nearest"}


class _Books(Protocol):
    @property
    def book_sizes(self) -> tuple[int, ...]: ...


class Evaluable(Protocol):
    """What a codec needs to be evaluated; `varitok.codecs.codec.Codec` has it, and so can anything else."""

    @property
    def tokens(self) -> int:
        """The most tokens that a signal has, N."""

    @property
    def bottleneck(self) -> _Books:
        """Has `book_sizes`."""

    def bits(self, tokens: int) -> float:
        """Count the payload bits of a signal's first `tokens` tokens."""

    def encode(self, signal: Tensor) -> Tensor:
        """Turn signals `(b, c, h, w)` in [-1, 1] into codes, int64 `(b, books, N)`."""

    def decode(self, codes: Tensor) -> Tensor:
        """Turn codes `(b, books, k)` into signals."""


def available() -> tuple[str, ...]:
    """List the metrics that can be computed on this machine: the basic ones and those whose weights are found."""
    return image.available() + (("rfid",) if frechet.available() else ())


@torch.inference_mode()
def evaluate(
    codec: Evaluable,
    batches: Iterable[Batch],
    keeps: Sequence[int] | None = None,
    metrics: Sequence[str] = image.BASIC,
    header: Mapping[str, str] | None = None,
) -> Table:
    """Measure what comes back from the first k codes of each image, and what these codes cost.

    Each batch is encoded once and decoded for every k; both sides are compared as 8-bit values. Where
    torch.distributed is running, every process must call this with its own share of the images, and all get the table
    of the whole.

    Args:
        codec: Evaluated on its own device, in evaluation mode; its modes are restored.
        batches: Images `(b, 3, h, w)`, all of the size that the codec decodes to; empty batches are passed over.
        keeps: The numbers of tokens, 1, 2, 4, ... N where None; any others are sorted.
        metrics: Names out of `image.DEFINITIONS`, and "rfid".
        header: What goes above the table, before what the numbers mean.

    Raises:
        UserError: A k is out of range, a metric unknown or without weights, the images too small or of another size
            than the codec's, or none could be read.
    """
    rungs = _rungs(keeps, codec.tokens)
    with evaluation_mode(codec) as device:
        tally = _Tally(rungs, codec.bottleneck.book_sizes, metrics, device)
        for batch in batches:
            tally.add(codec, batch)
    tally.gather()
    return Table(tally.rows(codec), dict(header or {}) | ROUNDING | tally.definitions() | _versions())


class _Tally:
    """Sums over images from which the table follows; all of them add up over processes."""

    def __init__(
        self, keeps: list[int], book_sizes: tuple[int, ...], metrics: Sequence[str], device: torch.device
    ) -> None:
        self.keeps = keeps
        self.book_sizes = book_sizes
        self.device = device
        self.names = [name for name in metrics if name != "rfid"]
        self.comparisons = [image.comparison(name, device) for name in self.names]
        self.sums = torch.zeros(len(keeps), len(self.names), dtype=torch.float64)
        self.seen = torch.zeros(4, dtype=torch.int64)  # images, their pixels, unreadable files, sum of shorter sides
        self.first_bad = ""
        # For each rung, the codes that it adds to the rung below; none where the codec is continuous.
        self.counts = [rate.CodeCounts(book_sizes, device) for _ in keeps] if book_sizes else []
        self.features = frechet.inception(device) if "rfid" in metrics else None
        moments = len(keeps) + 1 if self.features else 0  # of each rung, and of the originals
        self.moments = [frechet.Moments(frechet.WIDTH) for _ in range(moments)]

    def add(self, codec: Evaluable, batch: Batch) -> None:
        """Take in a batch."""
        self.seen[2] += len(batch.bad)
        self.first_bad = self.first_bad or next(iter(batch.bad), "")
        if not len(batch.signal):
            return
        signal = normalise(batch.signal.to(self.device))
        real = to_uint8(signal)
        b, _, h, w = real.shape
        self.seen += torch.tensor([b, b * h * w, 0, b * min(h, w)])
        codes = codec.encode(signal)
        if self.features:
            self.moments[-1].add(self.features(real))
        for rung, (start, k) in enumerate(pairwise([0, *self.keeps])):
            if self.counts:
                self.counts[rung].add(codes[..., start:k].to(self.device))
            fake = to_uint8(codec.decode(codes[..., :k]))
            if fake.shape != real.shape:
                sizes = f"{w} x {h} pixels, and the codec gives back {fake.shape[-1]} x {fake.shape[-2]}"
                raise UserError(f"images of {sizes}: evaluate at the size that it was trained at")
            for column, compare in enumerate(self.comparisons):
                self.sums[rung, column] += compare(fake, real).double().sum().cpu()
            if self.features:
                self.moments[rung].add(self.features(fake))

    def gather(self) -> None:
        """Add up over processes.

        Raises:
            UserError: There is not one image.
        """
        if dist.is_available() and dist.is_initialized():
            moments = [sums for moment in self.moments for sums in (moment.count, moment.sum, moment.outer)]
            for values in [self.sums, self.seen, *moments]:
                shared = values.to(self.device, copy=True)  # NCCL wants it on the device
                dist.all_reduce(shared)
                values.copy_(shared)
            for counts in self.counts:
                counts.gather()
        if not self.seen[0]:
            raise UserError(
                f"no image to evaluate{f'; the first that failed: {self.first_bad}' if self.first_bad else ''}"
            )

    def rows(self, codec: Evaluable) -> list[Row]:
        """Give a row for each number of kept tokens."""
        images, pixels = int(self.seen[0]), int(self.seen[1])
        used = rate.CodeCounts(self.book_sizes, self.device)
        rows: list[Row] = []
        for rung, k in enumerate(self.keeps):
            bits = float(codec.bits(k))
            row: Row = {
                "k": k,
                "bits": bits,
                "bytes": rate.packed_bytes(self.book_sizes, k) if self.book_sizes else math.ceil(bits / 8),
                "bpp": bits * images / pixels,
            }
            row |= dict(zip(self.names, (self.sums[rung] / images).tolist(), strict=True))
            if self.features:
                row["rfid"] = frechet.frechet_distance(self.moments[rung], self.moments[-1])
            if self.counts:
                used.include(self.counts[rung].rows())
                row |= _use(used)
            rows.append(row | {"images": images})
        return rows

    def definitions(self) -> dict[str, str]:
        """Say what the columns mean, and how many files could not be read."""
        side = int(self.seen[3]) // int(self.seen[0])
        meanings = {name: text for name, text in rate.DEFINITIONS.items() if self.counts or name not in rate.USE}
        meanings |= {name: image.DEFINITIONS[name] for name in self.names}
        if "ms_ssim" in self.names:
            meanings["ms_ssim"] = meanings["ms_ssim"].format(scales=image.scales(side, side))
        if self.features:
            meanings["rfid"] = frechet.DEFINITION
        notes = {"unreadable files left out": str(int(self.seen[2]))} if self.seen[2] else {}
        return notes | {f"column {name}": meaning for name, meaning in meanings.items()}


def _use(counts: rate.CodeCounts) -> Row:
    """Give the books' use: means, and each book's own where there are several."""
    books = list(zip(counts.books(), counts.book_sizes, strict=True))
    measures = {
        "usage": [rate.usage(book, size) for book, size in books],
        "entropy": [rate.entropy(book) for book, _ in books],
        "perplexity": [rate.perplexity(book) for book, _ in books],
    }
    row: Row = {}
    for name, values in measures.items():
        row[name] = sum(values) / len(values)
        if len(values) > 1:
            row |= {f"{name}_{book}": value for book, value in enumerate(values)}
    return row


def _rungs(keeps: Sequence[int] | None, tokens: int) -> list[int]:
    rungs = sorted(set(ladder(tokens) if keeps is None else keeps))
    if not rungs or rungs[0] < 1 or rungs[-1] > tokens:
        wrong = next((k for k in rungs if not 1 <= k <= tokens), "no")
        raise UserError(f"{wrong} tokens to keep: this codec keeps from 1 to {tokens}")
    return rungs


def _versions() -> dict[str, str]:
    return {
        "versions": f"varitok {varitok.__version__}, torch {torch.__version__}, torchmetrics {torchmetrics.__version__}"
    }


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command `varitok-evaluate`; a user's mistake ends in one line and exit code 2."""
    options = _parser().parse_args(arguments)
    command = shlex.join(["varitok-evaluate", *(sys.argv[1:] if arguments is None else arguments)])
    try:
        _run(options, command)
    except UserError as error:
        print(f"varitok-evaluate: {error}", file=sys.stderr)
        sys.exit(2)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser("varitok-evaluate", description="Measure a codec's quality per kept tokens.")
    parser.add_argument("run", type=Path, metavar="RUN_OR_CKPT", help="a run's folder or a checkpoint")
    parser.add_argument("--data", type=Path, metavar="FOLDER", help="images; its val/, or the share held out of it")
    parser.add_argument("--keep", metavar="1,4,16", help="numbers of tokens; 1, 2, 4, ... and all by default")
    names = ", ".join([*image.DEFINITIONS, "rfid"])
    parser.add_argument("--metrics", metavar="NAMES", help=f"out of {names}; by default those whose weights are here")
    parser.add_argument(
        "--robustness",
        metavar="0.1,0.5",
        help="also: quality with these shares of the tokens replaced, at the largest of the kept numbers",
    )
    parser.add_argument(
        "--out", type=Path, metavar="DIR", help="folder of the results; the run's evaluation/ by default"
    )
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="default: %(default)s")
    parser.add_argument("--batch-size", type=int, default=32, help="default: %(default)s")
    parser.add_argument("--workers", type=int, default=2, help="processes that read images; default: %(default)s")
    return parser


def _run(options: argparse.Namespace, command: str) -> None:
    """Evaluate as the command line says; write and print the table."""
    if options.batch_size < 1 or options.workers < 0:
        raise UserError("--batch-size must be at least 1, --workers at least 0")
    keeps = _numbers(options.keep) if options.keep else None
    rates = _shares(options.robustness) if options.robustness else []
    codec, config = load_run(options.run)
    try:
        codec.to(options.device)
    except (RuntimeError, AssertionError) as error:  # an unknown name, or a build of torch without that device
        raise UserError(f"--device {options.device}: this device is not there") from error
    splits = _validation(config, options.data)
    batches = validation_loader(splits.val, options.batch_size, options.workers)
    header = {"codec": str(options.run), **splits.about, "command": command}
    metrics = options.metrics.split(",") if options.metrics else available()
    table = evaluate(codec, batches, keeps, metrics, header)
    run = options.run if options.run.is_dir() else options.run.absolute().parent.parent
    folder = options.out or run / "evaluation"
    table.write_csv(folder / "evaluation.csv")
    table.print()
    if {"psnr", "ssim"} <= table.rows[0].keys():
        table.plot(folder / "evaluation.png")
    if rates:
        maps = available_features(torch.device(options.device))
        kept = max(keeps) if keeps else None
        found = robustness(codec, batches, rates, tokens=kept, features=maps, header=header | _versions())
        found.write_csv(folder / "robustness.csv")
        found.print()
    print(f"{table.rows[0]['images']} images; written to {folder}")


def _numbers(text: str) -> list[int]:
    try:
        return [int(word) for word in text.split(",")]
    except ValueError:
        raise UserError(f"--keep {text}: give whole numbers with commas between, such as 1,4,16") from None


def _shares(text: str) -> list[float]:
    try:
        rates = [float(word) for word in text.split(",")]
    except ValueError:
        rates = [math.nan]
    if not all(0 < rate <= 1 for rate in rates):
        raise UserError(f"--robustness {text}: give shares of the tokens above 0 and up to 1, such as 0.1,0.5")
    return rates


def _validation(config: DictConfig, folder: Path | None) -> Splits:
    """Find the images to evaluate on: the run's own, or those of a folder, made as the codec takes them."""
    if folder is None:
        splits: Splits = build(config.data)
        return splits
    if config.data.get("image_size") is None:
        raise UserError("--data: the run's configuration has no data.image_size to bring images to")
    from varitok.data.images import image_folder  # noqa: PLC0415 (torchvision is slow to import)

    return image_folder(str(folder), image_size=config.data.image_size)


if __name__ == "__main__":
    main()
