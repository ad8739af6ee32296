"""The subcommand `evaluate`."""

import argparse
import json
import math
import shlex
from collections.abc import Mapping, Sequence
from itertools import count
from pathlib import Path
from typing import Annotated

import torch
from omegaconf import DictConfig, OmegaConf

from varitok import UserError, progress
from varitok.data.batch import Splits
from varitok.data.datamodule import validation_loader

from ..build import build, load_run
from ..codec import Codec
from ..conversion import RANGES, convert
from ..implicit.codec import ImplicitCodec
from ..metrics.transcription import word_error_rate
from ..modalities.base import Modality
from ..modalities.registry import MODALITIES, modality_of
from .evaluate import evaluate, versions
from .robustness import available_features, robustness
from .table import json_rows, read_rows

__all__ = ["add_recognizer", "main", "recognizing", "validation_splits"]


def main(words: Sequence[str]) -> None:
    """Run `varitok evaluate`.

    Raises:
        UserError: An option, the run or its data is invalid.
    """
    _run(_parser().parse_args(words), shlex.join(["varitok", "evaluate", *words]))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        "varitok evaluate",
        description="Measure quality at each length of a codec's codes.",
        epilog="for example: varitok evaluate runs/demo --data PHOTOS --keep 1,4,16",
    )
    parser.add_argument("run", type=Path, metavar="RUN_OR_CKPT", help="a run's folder or a checkpoint")
    parser.add_argument("--data", type=Path, metavar="FOLDER", help="other files: its val/ beside train/, or all")
    parser.add_argument(
        "--keep",
        metavar="1,4,16",
        help="numbers of tokens, or of codebooks for tokens on a grid; 1, 2, 4, ... and all by default",
    )
    metrics = (f"of {kind.kind}s {', '.join(metric.name for metric in kind.metrics)}" for kind in MODALITIES.values())
    names = "; ".join(metrics)
    parser.add_argument(
        "--size",
        metavar="64,128",
        help="sides of images or frames, if tokens are on a grid; each is measured",
    )
    parser.add_argument("--metrics", metavar="NAMES", help=f"out of {names}; by default all that can be had here")
    add_recognizer(parser)
    parser.add_argument(
        "--robustness",
        metavar="0.1,0.5",
        help="also measure quality with these shares of the tokens replaced, at the largest kept number",
    )
    parser.add_argument(
        "--out",
        type=Path,
        metavar="DIR",
        help="folder of the results; by default the run's evaluation/, with --data evaluation/FOLDER/",
    )
    parser.add_argument("--json", action="store_true", help="for scripts: one JSON object")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="default: %(default)s")
    parser.add_argument("--batch-size", type=int, default=32, help="default: %(default)s")
    parser.add_argument("--workers", type=int, default=2, help="processes that read files; default: %(default)s")
    return parser


def add_recognizer(parser: argparse.ArgumentParser) -> None:
    """Add the option `--asr`."""
    parser.add_argument(
        "--asr",
        metavar="FOLDER",
        help="also measure wer, the word error rate, by a Whisper of transformers in this folder",
    )


def recognizing(modality: Modality, folder: str | None) -> Modality:
    """Return a modality that measures the word error rate by the recognizer of `--asr`, if there is one.

    Raises:
        UserError: The signals aren't sounds.
    """
    if folder is None:
        return modality
    if modality.name != "audio":
        raise UserError(f"--asr: word errors are measured on sounds, and this codec's signals are {modality.plural}")
    return modality.with_metric(word_error_rate(folder))


def _run(options: argparse.Namespace, command: str) -> None:
    """Evaluate a run at one or several sizes, and write and print the results."""
    convert(options.batch_size, int, "--batch-size", RANGES)
    convert(options.workers, Annotated[int, "[0, 1000]", "0 reads in the main process"], "--workers")
    sizes: list[int | None] = [*_numbers("--size", options.size, "64,128")] if options.size else [None]
    rates = _shares(options.robustness) if options.robustness else []
    codec, config = load_run(options.run)
    try:
        codec.to(options.device)
    except (RuntimeError, AssertionError) as error:  # an unknown name, or a build of torch without that device
        raise UserError(f"--device {options.device}: this device isn't available") from error
    modality = recognizing(modality_of(codec), options.asr)
    if rates and modality.name != "image":
        raise UserError(f"--robustness is measured on images, and this codec's signals are {modality.plural}")
    if options.data and isinstance(codec, ImplicitCodec):
        raise UserError("--data: this codec is of one clip alone; leave the option out")
    one_size = isinstance(codec, ImplicitCodec) or codec.layout.ordered or "image_size" not in config.data
    if options.size and one_size:
        raise UserError(f"--size: this codec's {modality.plural} have no other size; leave the option out")
    found = {}
    for size in sizes:
        data = config.data if size is None else OmegaConf.merge(config, {"data": {"image_size": size}}).data
        found[str(size)] = _measure(codec, modality, data, f"{size}_pixels" if size else "", rates, options, command)
    if options.json:
        print(json.dumps({"sizes": found} if options.size else found["None"], indent=2))


def _measure(
    codec: Codec,
    modality: Modality,
    data: DictConfig,
    part: str,
    rates: Sequence[float],
    options: argparse.Namespace,
    command: str,
) -> dict[str, object]:
    """Evaluate a codec on signals of one size, write the results to `part` of their folder, and return the rows."""
    keeps = _numbers("--keep", options.keep, "1,4,16") if options.keep else None
    splits = validation_splits(modality, data, options.data)
    batches = validation_loader(splits.val, options.batch_size, options.workers)
    header = {"codec": str(options.run), **splits.about, "command": command}
    metrics = options.metrics.split(",") if options.metrics else modality.available()
    table = evaluate(codec, progress(batches, len(batches), "batches"), keeps, metrics, header, modality)
    run = options.run if options.run.is_dir() else options.run.absolute().parent.parent
    folder = options.out / part if options.out else _results(run / "evaluation" / part, splits.about)
    table.write_csv(folder / "evaluation.csv")
    if not options.json:
        table.print()
    table.plot(folder / "evaluation.png")
    replaced: Sequence[Mapping[str, object]] = []
    if rates:
        maps = available_features(torch.device(options.device))
        kept = max(keeps) if keeps else None
        found = robustness(codec, batches, rates, keep=kept, features=maps, header=header | versions())
        found.write_csv(folder / "robustness.csv")
        replaced = found.rows
        if not options.json:
            found.print()
    if not options.json:
        print(f"{table.rows[0][modality.plural]} {modality.plural}; written to {folder}")
    return {"rows": json_rows(table.rows), "robustness": json_rows(replaced)}


def _results(parent: Path, about: Mapping[str, str]) -> Path:
    """Return the folder of the results: `parent`, or one below it that has the name of the other data's folder.

    Other data of the same name is numbered.
    """
    if (measured := about.get("folder")) is None:
        return parent
    name = Path(measured).name
    for number in count(1):
        results = parent / (f"{name}_{number}" if number > 1 else name)
        table = results / "evaluation.csv"
        if not table.is_file() or read_rows(table)[0].get("folder", measured) == measured:
            break
    return results


def _numbers(option: str, text: str, such: str) -> list[int]:
    try:
        return [int(word) for word in text.split(",")]
    except ValueError:
        raise UserError(f"{option} {text}: give whole numbers with commas between, such as {such}") from None


def _shares(text: str) -> list[float]:
    try:
        rates = [float(word) for word in text.split(",")]
    except ValueError:
        rates = [math.nan]
    if not all(0 < rate <= 1 for rate in rates):
        raise UserError(f"--robustness {text}: give shares of the tokens above 0 and up to 1, such as 0.1,0.5")
    return rates


def validation_splits(modality: Modality, data: DictConfig, folder: Path | None) -> Splits:
    """Build the splits to evaluate on: the run's own, or those of a folder, preprocessed as the run's.

    Args:
        modality: The codec's modality.
        data: The run's data configuration.
        folder: Folder of other files, measured whole unless it has train/ and val/; None for the run's own data.
    """
    if folder is not None:
        splits = modality.folder_splits(data, folder)
        measured = f"{folder}, {len(splits.val)} {modality.plural}"
        return splits._replace(about=splits.about | {"dataset": measured, "folder": str(folder.resolve())})
    return build(data)  # type: ignore[no-any-return]
