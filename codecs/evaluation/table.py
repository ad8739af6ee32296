"""The table of an evaluation: a row per code length, and a header with the columns' definitions."""

import csv
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import rich.box
from rich.console import Console
from rich.table import Table as RichTable

from varitok import UserError

from ..modalities.base import Modality
from ..modalities.registry import COLUMNS, MODALITIES
from .figure import Curve, draw_curves

__all__ = ["Row", "Table", "json_rows", "read_csv", "read_rows", "wide_console", "write_rows"]

Row = dict[str, float]


def json_rows(rows: Sequence[Mapping[str, object]]) -> list[dict[str, object]]:
    """Replace NaN and infinity in rows by None, for JSON."""
    return [
        {name: None if isinstance(value, float) and not math.isfinite(value) else value for name, value in row.items()}
        for row in rows
    ]


def write_rows(path: Path, header: Mapping[str, str], rows: Sequence[Mapping[str, object]]) -> None:
    """Write a CSV file after a line `# key: value` for each header entry; floats have 6 significant digits."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="", encoding="utf-8") as file:
        for key, value in header.items():
            file.write(f"# {key}: {' '.join(value.split())}\n")
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(rows[0])
        writer.writerows([f"{v:.6g}" if isinstance(v, float) else v for v in row.values()] for row in rows)


@dataclass(frozen=True)
class Table:
    """Result of `evaluate`.

    Attributes:
        rows: A row for each kept number of tokens or codebooks, ascending; all with the same columns.
        header: Definitions of the columns and provenance, by key.
    """

    rows: list[Row]
    header: dict[str, str] = field(default_factory=dict)

    def column(self, name: str) -> list[float]:
        """Return a column's values."""
        return [row[name] for row in self.rows]

    def write_csv(self, path: Path) -> None:
        """Write the table as CSV, with the header as comment lines; `read_csv` reads it."""
        write_rows(path, self.header, self.rows)

    @property
    def axis(self) -> str:
        """Column of the kept numbers: "k" for tokens, "codebooks" for codebooks."""
        return "k" if "k" in self.rows[0] else "codebooks"

    @property
    def modality(self) -> type[Modality] | None:
        """Modality whose `shown` metrics the table has; None if there is none."""
        columns = self.rows[0].keys()
        kinds = [kind for kind in MODALITIES.values() if set(kind.shown) <= columns]
        return max(kinds, key=lambda kind: len({kind.plural, kind.rate.name} & columns), default=None)

    def plot(self, path: Path, others: Iterable[Curve] = (), title: str | None = None) -> None:
        """Draw the `shown` metrics over size to a PNG, if the table has them; points are labeled with kept numbers."""
        modality, noun = self.modality, "tokens" if self.axis == "k" else "codebooks"
        if modality is None:
            return
        values = {metric: self.column(metric) for metric in modality.shown}
        labels = [f"{keep:.0f}" for keep in self.column(self.axis)]
        ours = Curve(f"varitok, at its {noun}", self.column(modality.size.name), values, labels)
        sizes = modality.size.label.format(modality.noun)
        draw_curves(path, ours, tuple(others), title or f"Quality per kept {noun}", sizes)

    def print(self, console: Console | None = None) -> None:
        """Print the table."""
        columns = [column for name, column in COLUMNS.items() if name in self.rows[0]]
        noun = "tokens" if self.axis == "k" else "codebooks"
        decibels = ", ".join(column.title for column in columns if column.label.endswith("(dB)"))
        units = [f"{decibels} in dB"] * bool(decibels) + ["entropy in bits"] * ("entropy" in self.rows[0])
        shown = RichTable(
            title=f"Quality per kept {noun}" + f" ({', '.join(units)})" * bool(units),
            box=rich.box.SIMPLE_HEAD,
            title_justify="left",
            collapse_padding=True,
            pad_edge=False,
        )
        for column in columns:
            shown.add_column(column.title, justify="right")
        for row in self.rows:
            shown.add_row(*(column.form.format(row[column.name]) for column in columns))
        (console or wide_console()).print(shown)


def wide_console() -> Console:
    """Return a console that is 160 columns wide if it isn't a terminal, so that files and logs have whole tables."""
    console = Console()
    return console if console.is_terminal else Console(width=160)


def read_rows(path: Path) -> tuple[dict[str, str], list[dict[str, str]]]:
    """Read the header and the rows, as text, of a CSV file that `write_rows` wrote.

    Raises:
        UserError: The file doesn't exist, isn't text, or has rows with different numbers of columns.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}; give the CSV file that varitok evaluate wrote") from error
    except ValueError as error:
        raise UserError(f"{path}: not text; give the CSV file that varitok evaluate wrote") from error
    comments = (line[2:].partition(": ") for line in lines if line.startswith("# "))
    try:
        rows = list(csv.DictReader(line for line in lines if not line.startswith("#")))
    except csv.Error as error:
        raise UserError(f"{path}: {error}; was it damaged?") from error
    if any(None in row or None in row.values() for row in rows):
        raise UserError(
            f"{path}: rows differ in their number of columns; give the whole file that varitok evaluate wrote"
        )
    return {key: value for key, _, value in comments}, rows


def read_csv(path: Path) -> Table:
    """Read a table that `Table.write_csv` wrote.

    Raises:
        UserError: The file doesn't exist or isn't such a table.
    """
    header, words = read_rows(path)
    try:
        rows = [{name: _number(value) for name, value in row.items()} for row in words]
    except ValueError as error:
        raise UserError(f"{path}: not a table of numbers; give the CSV file that varitok evaluate wrote") from error
    if not rows or not {"k", "codebooks"} & rows[0].keys():
        raise UserError(f"{path}: no row with a column k or codebooks; give the CSV file that varitok evaluate wrote")
    return Table(rows, header)


def _number(text: str) -> float:
    return int(text) if text.lstrip("-").isdigit() else float(text)
