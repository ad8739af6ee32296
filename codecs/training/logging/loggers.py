"""Where a run's scalars, pictures and sounds go. No logger ever stops a run."""

import errno
import logging
from abc import abstractmethod
from argparse import Namespace
from collections.abc import Callable, Mapping
from functools import wraps
from pathlib import Path
from typing import Any

from pytorch_lightning.loggers import Logger
from pytorch_lightning.utilities import rank_zero_only

from .scalars import Scalars

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
        """Make room for what a run of `total` updates does again when it goes on behind one of them."""

    @abstractmethod
    def log_picture(self, name: str, picture: Path, update: int) -> None:
        """Log a picture's file, of the given update."""

    @abstractmethod
    def log_media(self, name: str, files: Mapping[str, Path], update: int) -> None:
        """Log files of sounds and clips by their names, of the given update; there may be none."""


class CsvLog(RunLog):
    """Appends rows `update,name,value` to `metrics.csv` in the run's folder (`Scalars`).

    A resumed run goes on in the same file (Lightning's CSVLogger erases it).
    """

    def __init__(self, folder: str, name: str) -> None:
        super().__init__(folder, name)
        self.scalars = Scalars(self.folder / "metrics.csv")

    @rank_zero_only
    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        """Append one row for each scalar."""
        self.scalars.add(metrics, step or 0)

    @rank_zero_only
    def rewind(self, update: int, total: int) -> None:
        """Leave out the rows of later updates; after the last one, those of the evaluation at the end."""
        self.scalars.rewind(update, total)

    def log_hyperparams(self, params: dict[str, Any] | Namespace, *args: Any, **kwargs: Any) -> None:
        """Do nothing: `config.yaml` in the same folder has them."""

    def log_picture(self, name: str, picture: Path, update: int) -> None:
        """Do nothing: pictures are in the run's folder already."""

    def log_media(self, name: str, files: Mapping[str, Path], update: int) -> None:
        """Do nothing: they are in the run's folder already."""


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
