"""The table of an evaluation: a row for each number of kept tokens, and above it what the numbers mean."""

import csv
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import rich.box
from rich.console import Console
from rich.table import Table as RichTable

from varitok import UserError

from .figure import Curve, draw_curves

__all__ = ["Row", "Table", "read_csv", "write_rows"]

Row = dict[str, float]

PRINTED = {
    "k": ("tokens", "{:.0f}"),
    "bytes": ("bytes", "{:.0f}"),
    "bpp": ("bpp", "{:.4f}"),
    "psnr": ("PSNR", "{:.2f}"),
    "ssim": ("SSIM", "{:.4f}"),
    "ms_ssim": ("MS-SSIM", "{:.4f}"),
    "lpips_alex": ("LPIPS alex", "{:.4f}"),
    "lpips_vgg": ("LPIPS vgg", "{:.4f}"),
    "rfid": ("rFID", "{:.2f}"),
    "usage": ("used", "{:.1%}"),
    "entropy": ("entropy", "{:.2f}"),
    "perplexity": ("perplexity", "{:.1f}"),
}


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
        rows: A row for each number of kept tokens, upwards; all with the same columns.
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

    def curve(self, name: str) -> Curve:
        """Give the table's points of quality over size."""
        labels = [f"{k:.0f}" for k in self.column("k")]
        return Curve(name, self.column("bytes"), self.column("psnr"), self.column("ssim"), labels)

    def plot(self, path: Path, others: Iterable[Curve] = (), title: str = "Quality per kept tokens") -> None:
        """Draw PSNR and SSIM over bytes to a PNG, each point with its number of tokens; needs psnr and ssim."""
        draw_curves(path, self.curve("varitok, at its tokens"), tuple(others), title)

    def print(self, console: Console | None = None) -> None:
        """Print the table."""
        columns = [name for name in PRINTED if name in self.rows[0]]
        shown = RichTable(
            title="Quality per kept tokens (PSNR in dB, entropy in bits)",
            box=rich.box.SIMPLE_HEAD,
            title_justify="left",
        )
        for name in columns:
            shown.add_column(PRINTED[name][0], justify="right")
        for row in self.rows:
            shown.add_row(*(PRINTED[name][1].format(row[name]) for name in columns))
        (console or Console()).print(shown)


def read_csv(path: Path) -> Table:
    """Read a table that `Table.write_csv` wrote.

    Raises:
        UserError: The file isn't there or isn't such a table.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
        comments = [line[2:] for line in lines if line.startswith("# ")]
        body = csv.DictReader(line for line in lines if not line.startswith("#"))
        rows = [{name: _number(value) for name, value in row.items()} for row in body]
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}; give the CSV file that varitok-evaluate wrote") from error
    except (ValueError, TypeError, AttributeError) as error:
        raise UserError(f"{path}: not a table of numbers; give the CSV file that varitok-evaluate wrote") from error
    if not rows or "k" not in rows[0]:
        raise UserError(f"{path}: no row with the column k; give the CSV file that varitok-evaluate wrote")
    return Table(rows, {key: value for key, _, value in (line.partition(": ") for line in comments)})


def _number(text: str) -> float:
    return int(text) if text.lstrip("-").isdigit() else float(text)
