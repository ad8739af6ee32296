"""Log files of a run: atomic appends, rewinding on resume, and reading of scalars."""

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
    """Return whether a logged row stays when a run of `total` updates resumes after update `update`.

    Later updates are repeated, and so is the evaluation after the last update.

    Args:
        at: Update of the row.
        name: Name of the row's scalar.
        update: Last update that isn't repeated.
        total: Number of updates of the run.
    """
    return at <= update and not (at == total and name.startswith("val/"))


def replace(path: Path, data: bytes) -> None:
    """Replace a file atomically: after a kill either the old or the new content is there, complete."""
    partial = path.with_name(f"{path.name}.partial")
    partial.write_bytes(data)
    partial.replace(path)


class Appended:
    """An append-only file of complete records; on a full disk new ones are buffered until there is space.

    Args:
        path: Path of the file, in an existing folder.
        head: Header of a new file.
    """

    def __init__(self, path: Path, head: bytes = b"") -> None:
        self.path = path
        self.head = head
        self.waiting = b""

    def append(self, record: bytes) -> None:
        """Append the buffered records and a new one."""
        size = self.path.stat().st_size if self.path.exists() else 0
        was_waiting, self.waiting = bool(self.waiting), self.waiting + record
        try:
            with self.path.open("ab") as file:
                file.write(self.waiting if size else self.head + self.waiting)
            self.waiting = b""
        except OSError as error:
            with suppress(OSError):
                os.truncate(self.path, size)
            if not was_waiting:
                _log.warning("%s: can't be written (%s); rows are kept until there is room", self.path, error.strerror)


def read_scalars(path: Path) -> dict[str, dict[int, float]]:
    """Read each scalar's values by update; empty if there is no file. An incomplete last row is ignored.

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
            raise UserError(f"{path}: not the log of a run, or damaged; move it away to continue without") from error
    return found
