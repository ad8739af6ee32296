"""Labels of files, of spans of sounds, and transcripts, from folders' names or a CSV file."""

import csv
import math
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path, PurePath
from typing import Literal, NamedTuple, TypeAlias

from varitok import UserError

from ..compare.classifier import classes_of

__all__ = ["FOLDERS", "Kind", "Labeled", "Span", "read_labels"]

FOLDERS = "folders"  # word in the place of a CSV file: classes by folders
NAMES = ("file", "path")  # accepted names of the column of files
FEWEST = 2  # least number of classes
Kind: TypeAlias = Literal["class", "spans", "text"]


class Span(NamedTuple):
    """A labeled span of a sound, such as a phone, in seconds."""

    start: float
    end: float
    label: str


class Labeled(NamedTuple):
    """A file and its labels.

    Attributes:
        file: The file.
        group: Files of a group, such as a speaker, are tested together; by default each file is one.
        label: Its class, if that is known.
        spans: Its labeled spans, if they are known.
        text: Its transcript, in lower case, if that is known.
    """

    file: Path
    group: str
    label: str = ""
    spans: tuple[Span, ...] = ()
    text: str = ""


def read_labels(source: str, files: Sequence[Path]) -> tuple[Kind, list[Labeled]]:
    """Read the labels of files; those without any are left out.

    Args:
        source: "folders", whose names are the classes (or first words of files' names if all are in one folder); or a
            CSV file with the column `file` and either `label`, or `label`, `start` and `end` in seconds, one row for
            each span, or `text`. A column `group` says which files are tested together. A file is named by its path,
            or by an end of it that no other file has.
        files: The files.

    Raises:
        UserError: The CSV file is missing or malformed, names none of the files, or there are fewer than two classes.
    """
    if source == FOLDERS:
        found = [Labeled(file, str(file), label) for file, label in zip(files, classes_of(files), strict=True)]
        return _require_classes("class", found, source)
    path = Path(source)
    rows = _read_rows(path)
    columns = rows[0].keys()
    name = next((name for name in NAMES if name in columns), None)
    kind = _kind_of(columns)
    if name is None or kind is None:
        have = ", ".join(columns)
        raise UserError(f"--labels {path}: needs the columns file, and label or text; it has {have}")
    by_file: dict[str, list[tuple[int, Mapping[str, str]]]] = {}
    for number, row in enumerate(rows, start=2):
        by_file.setdefault(PurePath(row[name]).as_posix(), []).append((number, row))
    found = []
    for file in files:
        own = _own(by_file, file)
        if own:
            group = own[0][1].get("group") or str(file)
            spans = tuple(_span(path, number, row) for number, row in own) if kind == "spans" else ()
            label = own[0][1].get("label", "").strip() if kind == "class" else ""
            text = " ".join(own[0][1].get("text", "").lower().split())
            found.append(Labeled(file, group, label, spans, text))
    if not found:
        raise UserError(f"--labels {path}: names none of the files of --data, such as {files[0].name}")
    return _require_classes(kind, found, str(path))


def _read_rows(path: Path) -> list[dict[str, str]]:
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            lines = (line for line in file if not line.startswith("#"))
            rows = [{key: value or "" for key, value in row.items() if key} for row in csv.DictReader(lines)]
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"--labels {path}: can't be read as CSV; or write --labels {FOLDERS}") from error
    if not rows:
        raise UserError(f"--labels {path}: has no rows")
    return rows


def _kind_of(columns: Collection[str]) -> Kind | None:
    if {"label", "start", "end"} <= set(columns):
        return "spans"
    return "class" if "label" in columns else "text" if "text" in columns else None


def _own(
    by_file: Mapping[str, list[tuple[int, Mapping[str, str]]]], file: Path
) -> list[tuple[int, Mapping[str, str]]] | None:
    """Return the rows that name a file by its path or the longest end of it."""
    parts = file.resolve().parts
    ends = [str(file), *("/".join(parts[first:]) for first in range(len(parts)))]
    return next((by_file[end] for end in ends if end in by_file), None)


def _span(path: Path, number: int, row: Mapping[str, str]) -> Span:
    try:
        start, end = float(row["start"]), float(row["end"])
    except ValueError:
        start, end = math.nan, math.nan
    if not 0 <= start < end < math.inf:
        raise UserError(f"--labels {path}: line {number}: start and end should be ascending seconds")
    return Span(start, end, row["label"].strip())


def _require_classes(kind: Kind, found: list[Labeled], source: str) -> tuple[Kind, list[Labeled]]:
    if kind != "text":
        classes = {one.label for one in found} | {span.label for one in found for span in one.spans}
        classes.discard("")
        if len(classes) < FEWEST:
            only = f"only the class {min(classes)}" if classes else "no class"
            raise UserError(f"--labels {source}: the files have {only}; a probe needs two")
    return kind, [one for one in found if one.label or one.spans or one.text]
