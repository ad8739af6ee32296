"""Tables of classical codecs, written by `varitok compare`."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from varitok import UserError
from varitok.codecs.evaluation.figure import Curve
from varitok.codecs.evaluation.table import read_rows
from varitok.codecs.modalities.registry import MODALITIES

__all__ = ["Classics", "find_classics", "read_classics"]


class Classics(NamedTuple):
    """A table of classical codecs.

    Attributes:
        path: Path of the file.
        header: Descriptions of the columns and of the measurement.
        rows: Values by column; only the rows that count payloads, if others count whole files.
    """

    path: Path
    header: Mapping[str, str]
    rows: Sequence[Mapping[str, str]]

    @property
    def noun(self) -> str:
        """Noun of its signals; in older tables only audio has the column `kbps`, and only clips have `flicker`."""
        columns = self.rows[0].keys()
        guess = "sound" if "kbps" in columns else "clip" if "flicker" in columns else "image"
        return next((kind.noun for kind in MODALITIES.values() if kind.plural in columns), guess)

    def curves(self, size: str, metric: str) -> list[Curve]:
        """Return each codec's curve of a metric over a size column, ascending; none if a column is missing."""
        points: dict[str, set[tuple[float, float]]] = {}
        if {size, metric} <= self.rows[0].keys():
            for row in self.rows:
                point = _number(row[size]), _number(row[metric])
                if all(math.isfinite(value) for value in point):
                    points.setdefault(row["codec"], set()).add(point)
        return [
            Curve(codec, [x for x, _ in ordered], {metric: [y for _, y in ordered]})
            for codec, ordered in ((codec, sorted(found)) for codec, found in points.items())
        ]


def read_classics(path: Path) -> Classics:
    """Read a table of classical codecs.

    Raises:
        UserError: The file isn't such a table.
    """
    found = _classics(path)
    if found is None:
        raise UserError(f"{path}: no table of classical codecs; name a comparison.csv of varitok compare")
    return found


def find_classics(folder: Path) -> list[Classics]:
    """Find the tables of classical codecs in a folder."""
    tables = (_classics(path) for path in sorted(folder.glob("*.csv")))
    return [table for table in tables if table is not None]


def _classics(path: Path) -> Classics | None:
    """Read a table; None if it isn't one of classical codecs."""
    header, rows = read_rows(path)
    others = (row for row in rows if row.get("codec") not in (None, "varitok"))
    chosen = [row for row in others if row.get("counted", "payload") == "payload"]
    return Classics(path, header, chosen) if chosen and {"bytes", "kbps"} & chosen[0].keys() else None


def _number(text: str) -> float:
    """Parse a number; NaN if the text isn't one, as in an empty cell."""
    try:
        return float(text)
    except ValueError:
        return math.nan
