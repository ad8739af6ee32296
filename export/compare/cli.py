"""The subcommand `compare`."""

import argparse
import difflib
import json
import shlex
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated

from rich.table import Table
from torch import Tensor
from torch.utils.data import Dataset

from varitok import UserError, progress
from varitok.codecs.conversion import RANGES, convert
from varitok.codecs.evaluation.cli import add_recognizer, recognizing
from varitok.codecs.evaluation.evaluate import versions
from varitok.codecs.evaluation.figure import draw_curves
from varitok.codecs.evaluation.table import json_rows, wide_console, write_rows
from varitok.codecs.modalities.base import Modality
from varitok.codecs.modalities.registry import modality_of

from ..adapters.codec import as_codec
from ..adapters.dataset import dataset_of, files_of, noun_of
from ..bitstream.entropy_coding import CODINGS
from ..runtime.bundle import Bundle
from ..runtime.load import load
from . import audio, images, video
from .classic import ClassicalCodec
from .classifier import Classifier, classes_of, read_classifier, readable, train_classifier
from .measure import ACCOUNTS, Item, Row, compare, curves_of, savings

__all__ = ["main"]

CLASSICAL = {"image": images, "audio": audio, "video": video}  # by modality


def main(words: Sequence[str]) -> None:
    """Run `varitok compare`.

    Raises:
        UserError: An option is invalid, or no file can be read.
    """
    _run(_parser().parse_args(words), shlex.join(["varitok", "compare", *words]))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        "varitok compare",
        description="Measure rate-distortion curves of a bundle and of classical codecs (JPEG, WebP, AVIF, JPEG 2000,"
        " JPEG XL; Opus, MP3, codec2; H.264, H.265, AV1, VP9) on the same files.",
        epilog="for example: varitok compare tokenizer --data PHOTOS --out comparison",
    )
    parser.add_argument("bundle", type=Path, metavar="BUNDLE", help="the bundle's folder")
    parser.add_argument("--data", type=Path, nargs="+", required=True, metavar="PATH", help="files, or folders of them")
    parser.add_argument("--out", type=Path, default=Path("comparison"), metavar="DIR", help="default: %(default)s")
    parser.add_argument("--codecs", metavar="NAMES", help="classical codecs, such as jpeg,webp; by default all")
    parser.add_argument("--metrics", metavar="NAMES", help="such as psnr,ssim; by default all that are available")
    add_recognizer(parser)
    parser.add_argument("--limit", type=int, metavar="N", help="largest number of files, evenly chosen")
    parser.add_argument("--seconds", type=float, metavar="S", help="duration of each file; by default all, 4 of a clip")
    parser.add_argument(
        "--side", type=int, default=128, metavar="PIXELS", help="size of clips and grid images; default: %(default)s"
    )
    parser.add_argument("--coding", choices=CODINGS, help="coding of the codes; by default that of varitok encode")
    known = parser.add_mutually_exclusive_group()
    known.add_argument("--classifier", type=Path, metavar="ONNX", help="also measure its accuracy on reconstructions")
    known.add_argument(
        "--classes",
        type=Path,
        metavar="FOLDER",
        help="train a classifier on these images; a class is a folder, or a file name's first word",
    )
    parser.add_argument("--json", action="store_true", help="for scripts: one JSON object")
    return parser


def _run(options: argparse.Namespace, command: str) -> None:
    """Run the comparison; write tables and figures, and print the Bjontegaard rates."""
    convert(options.limit, int | None, "--limit", RANGES)
    convert(options.seconds, Annotated[float | None, "[0.01, inf)"], "--seconds")
    convert(options.side, Annotated[int, "[8, inf)"], "--side")
    bundle = load(options.bundle)
    if not isinstance(bundle, Bundle) or bundle.modality not in CLASSICAL:
        raise UserError(f"{options.bundle}: there are no classical codecs for its signals")
    codec, noun = as_codec(bundle), noun_of(bundle)
    files = files_of(bundle, options.data, "--data")
    if options.limit and options.limit < len(files):
        files = [files[len(files) * index // options.limit] for index in range(options.limit)]
    classifier = _classifier(bundle, options)
    modality = recognizing(modality_of(codec), options.asr)
    metrics = _metrics(modality, options.metrics)
    classics, missing = _classics(bundle, options.codecs)
    data, protocol = dataset_of(bundle, files, options.seconds, options.side)
    bad: list[str] = []
    items = progress(_items(data, files, classifier, bad), len(files), "files")
    rows = compare(codec, items, classics, modality, metrics, options.coding, classifier.answer if classifier else None)
    if not rows:
        raise UserError(f"--data: no {noun} could be read; the first that failed: {bad[0]}")
    shown = [*metrics, *(["accuracy"] if classifier else [])]
    gains = savings(rows, metrics)
    for line in missing:
        print(f"left out, {line}", file=sys.stderr)
    about = CLASSICAL[bundle.modality].versions() + (f"; left out, {'; '.join(missing)}" if missing else "")
    header = _header(options, modality, metrics, classics, classifier, protocol, command, about)
    header |= {"dataset": f"{' '.join(map(str, options.data))}, {rows[0][modality.plural]} {noun}s"}
    header |= {"unreadable files left out": str(len(bad))} if bad else {}
    write_rows(options.out / "comparison.csv", header, rows)
    note = "mean difference in bytes at equal quality, % of the classical codec's; nan: no quality that both reach"
    write_rows(options.out / "bd_rate.csv", {"column percent": note, "command": command}, gains)
    drawn = [name for name in (*modality.shown, "accuracy") if name in shown] or shown[:2]
    for counted, column in ACCOUNTS.items():
        ours, *others = curves_of(rows, column, drawn)
        bytes_of = "whole files" if counted == "file" else counted
        title = f"Quality per byte of {bytes_of}, {rows[0][modality.plural]} {noun}s"
        draw_curves(options.out / f"{counted}.png", ours, others, title, f"bytes per {noun}")
    if options.json:
        print(json.dumps({"rows": json_rows(rows), "bd_rate": json_rows(gains)}, indent=2))
        return
    _print(gains, metrics)
    print(f"written to {options.out}")


def _classifier(bundle: Bundle, options: argparse.Namespace) -> Classifier | None:
    option = "--classifier" if options.classifier else "--classes" if options.classes else None
    if option is None:
        return None
    if bundle.modality != "image":
        raise UserError(f"{option}: classification accuracy is measured on images only")
    return read_classifier(options.classifier) if options.classifier else train_classifier(bundle, options.classes)


def _metrics(modality: Modality, asked: str | None) -> list[str]:
    """Return the names of the metrics, all of single signals."""
    names = asked.split(",") if asked else modality.available()
    of_all = [name for name in names if modality.metric(name).network]
    if asked and of_all:
        raise UserError(f"--metrics {of_all[0]}: needs all signals at once; name metrics of single signals")
    return [name for name in names if name not in of_all]


def _classics(bundle: Bundle, asked: str | None) -> tuple[list[ClassicalCodec], list[str]]:
    """Return the classical codecs, and of each that is left out its name and why."""
    codecs: Sequence[ClassicalCodec] = CLASSICAL[bundle.modality].CODECS
    names = [codec.name for codec in codecs]
    rate = bundle.sample_rate or bundle.frame_rate or 0
    wanted = [_match_name(word, names) for word in asked.split(",")] if asked else names
    chosen = [codec for codec in codecs if codec.name in wanted]
    obstacles = {codec.name: why for codec in chosen if (why := codec.obstacle(rate, bundle.channels))}
    missing = [f"{name}: {why}" for name, why in obstacles.items()]
    if asked and missing:
        raise UserError(f"--codecs {missing[0]}; leave it out")
    return [codec for codec in chosen if codec.name not in obstacles], missing


def _match_name(word: str, names: Sequence[str]) -> str:
    plain = {name.lower().replace(" ", "").replace(".", ""): name for name in names}
    key = word.strip().lower().replace(" ", "").replace(".", "")
    if key not in plain:
        near = difflib.get_close_matches(key, plain, 1)
        meant = f"did you mean {near[0]}?" if near else f"there are {', '.join(plain)}"
        raise UserError(f"--codecs {word}: not known; {meant}")
    return plain[key]


def _items(
    data: Dataset[Tensor], files: Sequence[Path], classifier: Classifier | None, bad: list[str]
) -> Iterator[Item]:
    """Yield the items that can be read; append the errors of others to `bad`."""
    labels: list[int | None] = [None] * len(files)
    if classifier and classifier.classes:
        names = classes_of(files)
        labels = [classifier.classes.index(name) if name in classifier.classes else -1 for name in names]
    for index, signal in readable(data, len(files), bad):
        yield Item(signal, labels[index])


def _header(
    options: argparse.Namespace,
    modality: Modality,
    metrics: Sequence[str],
    classics: Sequence[ClassicalCodec],
    classifier: Classifier | None,
    protocol: str,
    command: str,
    about: str,
) -> dict[str, str]:
    text = f"share of reconstructions in the right class: {classifier.about}" if classifier else ""
    rate = modality.rate
    return {
        "codec": str(options.bundle),
        "protocol": protocol,
        "rounding": modality.rounding,
        "column setting": "kept tokens or codebooks; for classical codecs the requested quality, kbit/s or CRF;"
        " of codec2 bit/s",
        "column bytes": f"mean payload of the {modality.plural}; file_bytes of whole files (.vtk with one signal)",
        f"column {rate.name}": f"of payloads: {rate.definition}; file_{rate.name} of whole files",
        **{f"column {name}": text for name, text in modality.definitions(metrics, options.side).items()},
        **({"column accuracy": text} if text else {}),
        **{f"settings {one.name}": one.about for one in classics},
        "command": command,
        "versions": f"{versions()['versions']}, {about}",
    }


def _print(gains: Sequence[Row], metrics: Sequence[str]) -> None:
    """Print the Bjontegaard rates."""
    table = Table("against", "counted", *metrics, box=None, title="difference in bytes at equal quality, %")
    cells: dict[tuple[str, str], list[str]] = {}
    for row in gains:
        word = f"{float(row['percent']):+.1f}".replace("+nan", "no overlap")
        cells.setdefault((str(row["against"]), str(row["counted"])), []).append(word)
    for pair, words in cells.items():
        table.add_row(*pair, *words)
    wide_console().print(table)
