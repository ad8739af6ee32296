"""The subcommand `probe`."""

import argparse
import json
import math
import shlex
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import torch
from rich.table import Table

from varitok import UserError
from varitok.codecs.conversion import convert
from varitok.codecs.evaluation.evaluate import versions
from varitok.codecs.evaluation.table import json_rows, wide_console, write_rows

from ..adapters.dataset import files_of, noun_of
from ..runtime.bundle import Bundle
from ..runtime.load import load
from .labels import FOLDERS, Kind, read_labels
from .latents import Coded, Target, encode, latents_of, mutual_information, rungs, targets_of
from .probes import PROBES, Fit, Sequences, cross_validate, ctc, interval

__all__ = ["main"]

Row = dict[str, Any]
SCORES: dict[Kind, str] = {"class": "accuracy", "spans": "accuracy", "text": "cer"}


def main(words: Sequence[str]) -> None:
    """Run `varitok probe`.

    Raises:
        UserError: An option, the bundle or the labels are wrong.
    """
    _run(_parser().parse_args(words), shlex.join(["varitok", "probe", *words]))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        "varitok probe",
        description="Measure what codes reveal of classes, phones or words: small classifiers learn from the latents"
        " that a bundle's codes stand for, and are judged by cross-validation.",
        epilog="for example: varitok probe tokenizer --data SOUNDS --labels phones.csv",
    )
    parser.add_argument("bundle", type=Path, metavar="BUNDLE", help="the bundle's folder")
    parser.add_argument("--data", type=Path, nargs="+", required=True, metavar="PATH", help="files, or folders of them")
    parser.add_argument(
        "--labels",
        default=FOLDERS,
        metavar="CSV",
        help="columns file and label (a class), and start, end in seconds (spans of sounds), or file and text"
        " (transcripts); group: files that are tested together, such as a speaker's; default: classes by folders",
    )
    parser.add_argument(
        "--keep", metavar="1,4,16", help="numbers of tokens or codebooks; 1, 2, 4, ... and all by default"
    )
    parser.add_argument(
        "--probe", choices=PROBES, default="linear", help="of transcripts always conv, with CTC; default: %(default)s"
    )
    parser.add_argument(
        "--folds", type=int, default=5, metavar="N", help="of the cross-validation; default: %(default)s"
    )
    parser.add_argument("--workers", type=int, default=2, help="processes that read files; default: %(default)s")
    parser.add_argument("--out", type=Path, metavar="CSV", help="file of the table")
    parser.add_argument("--json", action="store_true", help="for scripts: one JSON object")
    return parser


def _run(options: argparse.Namespace, command: str) -> None:
    """Probe a bundle at each length; print and write the table."""
    convert(options.workers, Annotated[int, "[0, 1000]", "0 reads in the main process"], "--workers")
    convert(options.folds, Annotated[int, "[2, 1000]"], "--folds")
    bundle = load(options.bundle)
    if not isinstance(bundle, Bundle) or not bundle.suffixes or not bundle.codebook_sizes:
        raise UserError(f"{options.bundle}: a probe needs a bundle with codes, of sounds, images or clips")
    keeps = _keeps(options.keep, rungs(bundle)[-1]) if options.keep else rungs(bundle)
    kind, labeled = read_labels(options.labels, files_of(bundle, options.data, "--data"))
    coded = encode(bundle, labeled, options.workers)
    if kind == "text":
        coded = _that_fit(coded)
    if not coded.files:
        raise UserError(f"--data: no labeled {noun_of(bundle)} could be read; the first that failed: {coded.bad[0]}")
    for reason in coded.bad:
        print(f"left out: {reason}", file=sys.stderr)
    rows = _probe(bundle, kind, coded, keeps, options)
    if options.out:
        write_rows(options.out, _header(options, kind, bundle, coded, command), rows)
    if options.json:
        print(json.dumps({"rows": json_rows(rows)}, indent=2))
        return
    table = Table(*rows[0], box=None)
    for row in rows:
        table.add_row(*(f"{value:.4g}" if isinstance(value, float) else str(value) for value in row.values()))
    wide_console().print(table)
    if options.out:
        print(f"written to {options.out}")


def _keeps(words: str, most: int) -> list[int]:
    """Parse `--keep`."""
    try:
        found = sorted({int(word) for word in words.split(",")})
    except ValueError:
        found = [0]
    if not 1 <= found[0] <= found[-1] <= most:
        raise UserError(f"--keep {words}: write whole numbers from 1 to {most}, such as 1,{most}")
    return found


def _that_fit(coded: Coded) -> Coded:
    """Leave out files with more characters than tokens, which CTC can't write."""
    fits = [len(one.text) <= codes.shape[-1] for one, codes in zip(coded.files, coded.codes, strict=True)]
    bad = [
        f"{one.file}: its transcript has {len(one.text)} characters, its codes {codes.shape[-1]} tokens"
        for one, codes, fit in zip(coded.files, coded.codes, fits, strict=True)
        if not fit
    ]
    files, codes = ([one for one, fit in zip(each, fits, strict=True) if fit] for each in (coded.files, coded.codes))
    return Coded(files, codes, [*coded.bad, *bad])  # type: ignore[arg-type]


def _probe(bundle: Bundle, kind: Kind, coded: Coded, keeps: Sequence[int], options: argparse.Namespace) -> list[Row]:
    """Cross-validate a probe at each length."""
    target = targets_of(kind, bundle, coded)
    groups = [one.group for one in coded.files]
    fit: Fit = ctc if kind == "text" else PROBES[options.probe]
    cut = latents_of(bundle, coded.codes, pools=kind == "class" and options.probe == "linear")
    axis, rows = "k" if bundle.tokens else "codebooks", []
    for keep in keeps:
        data = Sequences(list(cut(keep)), target.values, groups, len(target.names))
        scores = cross_validate(data, fit, options.folds)
        share, low, high = interval(scores, groups)
        row: Row = {axis: keep, SCORES[kind]: share, "low": low, "high": high, "chance": _chance(kind, target)}
        if kind == "spans":
            row["information"] = mutual_information(coded.codes, target.values, keep - 1)
        row |= {"counted": sum(score.counted for score in scores), "classes": len(target.names)}
        rows.append(row | {"files": len(coded.files), "groups": len(set(groups))})
    return rows


def _chance(kind: Kind, target: Target) -> float:
    """Return the score without a look at the codes: the most frequent class, or an empty transcript."""
    if kind == "text":
        return 1.0
    counts = Counter(int(value) for value in torch.cat(target.values) if value >= 0)
    return max(counts.values()) / counts.total() if counts else math.nan


def _header(options: argparse.Namespace, kind: Kind, bundle: Bundle, coded: Coded, command: str) -> dict[str, str]:
    text = kind == "text"
    what = {"class": "files", "spans": "tokens whose middle is in a span", "text": "characters"}[kind]
    trained = "two convolutions along the tokens, by CTC" if text else options.probe
    return {
        "codec": str(options.bundle),
        "dataset": f"{' '.join(map(str, options.data))}, {len(coded.files)} labeled {noun_of(bundle)}s",
        "labels": str(options.labels),
        "probe": f"{trained}; {options.folds}-fold cross-validation, files of a group in one fold",
        f"column {SCORES[kind]}": "insertions, deletions and substitutions per character of the transcript; lower is"
        " better"
        if text
        else f"share of {what} that are classified rightly",
        "column low, high": "95 % interval: bootstrap over groups",
        "column chance": "of an empty transcript" if text else "share of the most frequent class",
        **({"column information": "I(class; code) / H(class) of the last kept codebook"} if kind == "spans" else {}),
        "column counted": what,
        **({"unreadable or too short files left out": str(len(coded.bad))} if coded.bad else {}),
        "command": command,
        **versions(),
    }
