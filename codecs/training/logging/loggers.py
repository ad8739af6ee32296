"""Loggers of a run's scalars, images, audio and video. A failing logger never ends a run."""

import csv
import errno
import io
import logging
from abc import abstractmethod
from argparse import Namespace
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import wraps
from pathlib import Path
from typing import Any

from pytorch_lightning.loggers import Logger
from pytorch_lightning.utilities import rank_zero_only

from .scalars import HEAD, Appended, replace, stays

__all__ = ["CsvLog", "RunLog", "unharmed"]

_log = logging.getLogger(__name__)


class RunLog(Logger):
    """The base of loggers, for pictures and media files besides scalars.

    Args:
        folder: Folder of the run.
        name: Name of the run.

    Attributes:
        failed: True once the logger has failed; it then logs nothing more (`unharmed`).
    """

    def __init__(self, folder: str, name: str) -> None:
        super().__init__()
        self.folder = Path(folder)
        self._name = name
        self.failed = False

    @property
    def name(self) -> str:
        """Name of the run."""
        return self._name

    @property
    def version(self) -> str:
        """Name of the run's folder."""
        return self.folder.name

    @abstractmethod
    def rewind(self, update: int, total: int) -> None:
        """Remove the records after update `update`, which a resumed run of `total` updates repeats."""

    # These do nothing by default: all media are in the run's folder too.

    def log_hyperparams(self, params: dict[str, Any] | Namespace, *args: Any, **kwargs: Any) -> None:
        """Log the run's configuration."""

    def log_picture(self, name: str, picture: Path, update: int) -> None:
        """Log an image file at the given update."""

    def log_media(self, name: str, files: Mapping[str, Path], update: int) -> None:
        """Log audio and video files by name at the given update; `files` may be empty."""


class CsvLog(RunLog):
    """A logger that appends rows `update,name,value` to `metrics.csv` in the run's folder.

    In this long format a new name needs no new header, and a resumed run continues the file (Lightning's CSVLogger
    erases it). `pandas.read_csv(...).pivot(index="update", columns="name", values="value")` makes it wide.
    """

    def __init__(self, folder: str, name: str) -> None:
        super().__init__(folder, name)
        self.file = Appended(self.folder / "metrics.csv", _lines([HEAD]))

    @rank_zero_only
    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        """Append one row for each scalar."""
        # Nine digits distinguish any two float32.
        self.file.append(_lines([str(step or 0), name, f"{value:.9g}"] for name, value in metrics.items()))

    @rank_zero_only
    def rewind(self, update: int, total: int) -> None:
        """Remove an incomplete row, and the rows of updates that are repeated."""
        if self.file.path.exists():
            with self.file.path.open(newline="", encoding="utf-8") as file:
                rows = [row for row in csv.reader(file) if len(row) == len(HEAD)][1:]
            kept = (row for row in rows if stays(int(row[0]), row[1], update, total))
            replace(self.file.path, _lines([HEAD, *kept]))


def _lines(rows: Iterable[Sequence[str]]) -> bytes:
    text = io.StringIO(newline="")
    csv.writer(text).writerows(rows)
    return text.getvalue().encode()


def unharmed(method: Callable[..., None]) -> Callable[..., None]:
    """Decorate a logger's method so that its errors don't end the run; it runs on rank 0 only.

    On a full disk the record is skipped with a warning. After any other error, which is logged, the logger is disabled.
    """

    @rank_zero_only
    @wraps(method)
    def call(self: RunLog, *args: Any, **kwargs: Any) -> None:
        if self.failed:
            return
        try:
            method(self, *args, **kwargs)
        except Exception as error:  # W&B raises many kinds, ConnectionResetError among them
            full = isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)
            self.failed = not full
            what = "skipped a record" if full else "stopped logging"
            _log.warning("%s %s (%s: %s); the run goes on", type(self).__name__, what, type(error).__name__, error)

    return call
