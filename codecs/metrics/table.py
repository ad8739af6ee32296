"""The table of an evaluation: a row for each length of a code, and above it what the numbers mean."""

import csv
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import rich.box
from rich.console import Console
from rich.table import Table as RichTable

from varitok import UserError

from .figure import Curve, draw_curves

__all__ = ["PRINTED", "SHOWN", "Row", "Table", "json_rows", "read_csv", "read_rows", "wide_console", "write_rows"]

Row = dict[str, float]

SHOWN = (("psnr", "ssim"), ("mel", "si_sdr"), ("mse", "cosine"))  # pairs of metrics that are drawn

PRINTED = {
    "k": ("tokens", "{:.0f}"),
    "books": ("books", "{:.0f}"),
    "bytes": ("bytes", "{:.0f}"),
    "bpp": ("bpp", "{:.4f}"),
    "psnr": ("PSNR", "{:.2f}"),
    "ssim": ("SSIM", "{:.4f}"),
    "ms_ssim": ("MS-SSIM", "{:.4f}"),
    "flicker": ("flicker", "{:.2f}"),
    "lpips_alex": ("LPIPS alex", "{:.4f}"),
    "lpips_vgg": ("LPIPS vgg", "{:.4f}"),
    "rfid": ("rFID", "{:.2f}"),
    "fvd": ("FVD", "{:.1f}"),
    "fvd_random": ("random FVD", "{:.4g}"),
    "bpf": ("bits/frame", "{:.1f}"),
    "mse": ("MSE", "{:.4f}"),
    "cosine": ("cosine", "{:.4f}"),
    "kbps": ("kbit/s", "{:.3f}"),
    "mel": ("mel", "{:.3f}"),
    "stft": ("STFT", "{:.3f}"),
    "si_sdr": ("SI-SDR", "{:.2f}"),
    "pesq": ("PESQ", "{:.2f}"),
    "stoi": ("STOI", "{:.3f}"),
    "estoi": ("ESTOI", "{:.3f}"),
    "usage": ("used", "{:.1%}"),
    "entropy": ("entropy", "{:.2f}"),
}


def json_rows(rows: Sequence[Mapping[str, object]]) -> list[dict[str, object]]:
    """Give rows as JSON can hold them: it has neither NaN nor infinity, in whose place null stands."""
    return [
        {name: None if isinstance(value, float) and not math.isfinite(value) else value for name, value in row.items()}
        for row in rows
    ]


def write_rows(path: Path, header: Mapping[str, str], rows: Sequence[Mapping[str, object]]) -> None:
    """Write a CSV file with a line `# key: value` above it for each entry of the header; floats get 6 digits."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="", encoding="utf-8") as file:
        for key, value in header.items():
            file.write(f"# {key}: {' '.join(value.split())}\n")
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(rows[0])
        writer.writerows([f"{v:.6g}" if isinstance(v, float) else v for v in row.values()] for row in rows)


@dataclass(frozen=True)
class Table:
    """What `evaluate` found.

    Attributes:
        rows: A row for each kept number of tokens or books, upwards; all with the same columns.
        header: What the numbers mean and where they come from, by key.
    """

    rows: list[Row]
    header: dict[str, str] = field(default_factory=dict)

    def column(self, name: str) -> list[float]:
        """List a column's values."""
        return [row[name] for row in self.rows]

    def write_csv(self, path: Path) -> None:
        """Write the table, the header as comment lines above it; `read_csv` reads it back."""
        write_rows(path, self.header, self.rows)

    @property
    def axis(self) -> str:
        """Name of the column of kept numbers: "k" of tokens, "books" of books."""
        return "k" if "k" in self.rows[0] else "books"

    def curve(self, name: str) -> Curve:
        """Give the table's points of quality over size: bytes of an image, kbit/s of a sound."""
        labels = [f"{keep:.0f}" for keep in self.column(self.axis)]
        shown = next(pair for pair in SHOWN if set(pair) <= self.rows[0].keys())
        sizes = self.column("kbps" if "kbps" in self.rows[0] else "bytes")
        return Curve(name, sizes, {metric: self.column(metric) for metric in shown}, labels)

    def plot(self, path: Path, others: Iterable[Curve] = (), title: str | None = None) -> None:
        """Draw quality over size to a PNG, each point with its kept number; needs one of the pairs in `SHOWN`."""
        noun = "tokens" if self.axis == "k" else "books"
        sizes = "kbit/s" if "kbps" in self.rows[0] else f"bytes per {'clip' if 'clips' in self.rows[0] else 'image'}"
        draw_curves(
            path, self.curve(f"varitok, at its {noun}"), tuple(others), title or f"Quality per kept {noun}", sizes
        )

    def print(self, console: Console | None = None) -> None:
        """Print the table."""
        columns = [name for name in PRINTED if name in self.rows[0]]
        shown = RichTable(
            title=f"Quality per kept {'tokens' if self.axis == 'k' else 'books'} (PSNR, SI-SDR in dB, entropy in bits)",
            box=rich.box.SIMPLE_HEAD,
            title_justify="left",
            collapse_padding=True,
            pad_edge=False,
        )
        for name in columns:
            shown.add_column(PRINTED[name][0], justify="right")
        for row in self.rows:
            shown.add_row(*(PRINTED[name][1].format(row[name]) for name in columns))
        (console or wide_console()).print(shown)


def wide_console() -> Console:
    """Give a console that does not cut tables off in files and logs, which have no width."""
    console = Console()
    return console if console.is_terminal else Console(width=160)


def read_rows(path: Path) -> tuple[dict[str, str], list[dict[str, str]]]:
    """Read a CSV file that `write_rows` wrote: its header, and its rows as text.

    Raises:
        UserError: The file isn't there, or isn't text of as many columns in each row.
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
        UserError: The file isn't there or isn't such a table.
    """
    header, words = read_rows(path)
    try:
        rows = [{name: _number(value) for name, value in row.items()} for row in words]
    except ValueError as error:
        raise UserError(f"{path}: not a table of numbers; give the CSV file that varitok evaluate wrote") from error
    if not rows or not {"k", "books"} & rows[0].keys():
        raise UserError(f"{path}: no row with a column k or books; give the CSV file that varitok evaluate wrote")
    return Table(rows, header)


def _number(text: str) -> float:
    return int(text) if text.lstrip("-").isdigit() else float(text)
