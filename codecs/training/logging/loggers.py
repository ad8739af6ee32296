"""Where a run's scalars, pictures and sounds go. No logger ever stops a run."""

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
    """A logger that takes pictures and sounds too.

    Args:
        folder: The run's folder.
        name: The run's name.

    Attributes:
        failed: Whether it has failed, and is silent from then on (`unharmed`).
    """

    def __init__(self, folder: str, name: str) -> None:
        super().__init__()
        self.folder = Path(folder)
        self._name = name
        self.failed = False

    @property
    def name(self) -> str:
        """The run's name."""
        return self._name

    @property
    def version(self) -> str:
        """The run folder's own name."""
        return self.folder.name

    @abstractmethod
    def rewind(self, update: int, total: int) -> None:
        """Remove what a run of `total` updates repeats when it resumes after one of them."""

    # Media that a logger doesn't take are in the run's folder all the same.

    def log_hyperparams(self, params: dict[str, Any] | Namespace, *args: Any, **kwargs: Any) -> None:
        """Take the run's configuration."""

    def log_picture(self, name: str, picture: Path, update: int) -> None:
        """Log a picture's file, of the given update."""

    def log_media(self, name: str, files: Mapping[str, Path], update: int) -> None:
        """Log files of sounds and clips by their names, of the given update; there may be none."""


class CsvLog(RunLog):
    """Appends rows `update,name,value` to `metrics.csv` in the run's folder.

    Rows are long, not wide: a new name needs no new header, and a resumed run goes on in the same file (Lightning's
    CSVLogger erases it). `pandas.read_csv(...).pivot(index="update", columns="name")` makes it wide.
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
        """Remove rows of updates that are repeated, and an incomplete row."""
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
    """Let a logger's call fail without harm to the run, on the first process, which alone logs.

    What a full disk has no room for is passed over. After any other failure, which is named, the logger is silent.
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
            what = "passed over something" if full else "stopped logging"
            _log.warning("%s %s (%s: %s); the run goes on", type(self).__name__, what, type(error).__name__, error)

    return call
