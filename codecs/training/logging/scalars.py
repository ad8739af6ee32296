"""The file of a run's scalars: rows `update,name,value`, appended whole, read back, and rewound when a run goes on."""

import csv
import io
import logging
import os
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path

from varitok import UserError

__all__ = ["Appended", "Scalars", "read_scalars", "replace", "stays"]

_log = logging.getLogger(__name__)

HEAD = ("update", "name", "value")


def stays(at: int, name: str, update: int, total: int) -> bool:
    """Tell whether what was logged stays when a run of `total` updates goes on behind one of them.

    What came later is done again, and at the end the evaluation is.

    Args:
        at: The update at which it was logged.
        name: Under which it was logged.
        update: The last that isn't done again.
        total: Updates of the run.
    """
    return at <= update and not (at == total and name.startswith("val/"))


def replace(path: Path, data: bytes) -> None:
    """Write a file such that after a kill the old one or the new one is there, whole."""
    partial = path.with_name(f"{path.name}.partial")
    partial.write_bytes(data)
    partial.replace(path)


class Appended:
    """A file that records are appended to; on a full disk it keeps whole ones, and gets the others when there is room.

    Args:
        path: The file; its folder must be there.
        head: What a new file begins with.
    """

    def __init__(self, path: Path, head: bytes = b"") -> None:
        self.path = path
        self.head = head
        self.waiting = b""

    def append(self, record: bytes) -> None:
        """Append a record, behind those that there was no room for."""
        size = self.path.stat().st_size if self.path.exists() else 0
        told, self.waiting = bool(self.waiting), self.waiting + record
        try:
            with self.path.open("ab") as file:
                file.write(self.waiting if size else self.head + self.waiting)
            self.waiting = b""
        except OSError as error:
            with suppress(OSError):
                os.truncate(self.path, size)
            if not told:
                _log.warning("%s: can't be written (%s); what is logged waits for room", self.path, error.strerror)


class Scalars(Appended):
    """The file `metrics.csv` of a run.

    Rows are long, not wide: a new name needs no new header, and a resumed run goes on in the same file.
    `pandas.read_csv(...).pivot(index="update", columns="name")` makes it wide.

    Args:
        path: The file.
    """

    def __init__(self, path: Path) -> None:
        super().__init__(path, _lines([HEAD]))

    def add(self, values: Mapping[str, float], update: int) -> None:
        """Append one row for each scalar."""
        # Nine digits tell any two float32 apart.
        self.append(_lines([str(update), name, f"{value:.9g}"] for name, value in values.items()))

    def rewind(self, update: int, total: int) -> None:
        """Leave out what is done again, and a row that was torn."""
        if not self.path.exists():
            return
        with self.path.open(newline="", encoding="utf-8") as file:
            rows = [row for row in csv.reader(file) if len(row) == len(HEAD)][1:]
        replace(self.path, _lines([HEAD, *(row for row in rows if stays(int(row[0]), row[1], update, total))]))


def read_scalars(path: Path) -> dict[str, dict[int, float]]:
    """Read what a run logged, each name's values by update; nothing where it logged elsewhere. A torn row is none.

    Raises:
        UserError: The file is damaged.
    """
    found: dict[str, dict[int, float]] = {}
    if path.is_file():
        try:
            whole, _, _ = path.read_text(encoding="utf-8").rpartition("\n")
            for row in csv.DictReader(whole.splitlines()):
                found.setdefault(row["name"], {})[int(row["update"])] = float(row["value"])
        except (ValueError, KeyError, TypeError, csv.Error) as error:
            raise UserError(f"{path}: not what a run logs, or damaged; move it away to do without") from error
    return found


def _lines(rows: Iterable[Sequence[str]]) -> bytes:
    text = io.StringIO(newline="")
    csv.writer(text).writerows(rows)
    return text.getvalue().encode()
