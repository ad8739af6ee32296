"""Files that a run's log is appended to whole, and rewound in when it goes on; the scalars in them, read back."""

import csv
import logging
import os
from contextlib import suppress
from pathlib import Path

from varitok import UserError

__all__ = ["HEAD", "Appended", "read_scalars", "replace", "stays"]

_log = logging.getLogger(__name__)

HEAD = ("update", "name", "value")


def stays(at: int, name: str, update: int, total: int) -> bool:
    """Return whether a logged row stays when a run of `total` updates resumes after one of them.

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
        """Append a record, after those waiting for room."""
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
                _log.warning("%s: can't be written (%s); rows are kept until there is room", self.path, error.strerror)


def read_scalars(path: Path) -> dict[str, dict[int, float]]:
    """Read what a run logged, each name's values by update; nothing if it logged elsewhere. A torn row is none.

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
