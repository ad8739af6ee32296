"""Where a run's scalars, pictures and sounds go. No logger ever stops a run."""

import csv
import logging
import os
import secrets
from abc import abstractmethod
from argparse import Namespace
from collections.abc import Callable, Mapping
from functools import partial, wraps
from netrc import netrc
from pathlib import Path
from typing import Any

from pytorch_lightning.loggers import Logger
from pytorch_lightning.utilities import rank_zero_only

__all__ = ["CsvLog", "RunLog", "WandbLog"]

_log = logging.getLogger(__name__)

HEAD = ["update", "name", "value"]


class RunLog(Logger):
    """A logger that takes pictures and sounds too.

    Args:
        folder: The run's folder.
        name: The run's name.
    """

    def __init__(self, folder: str, name: str) -> None:
        super().__init__()
        self.folder = Path(folder)
        self._name = name

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
    """Appends rows `update,name,value` to `metrics.csv` in the run's folder.

    Rows are long, not wide: a new name needs no new header, and a resumed run goes on in the same file (Lightning's
    CSVLogger erases it). `pandas.read_csv(...).pivot(index="update", columns="name")` makes it wide.
    """

    @rank_zero_only
    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        """Append one row for each scalar."""
        path = self.folder / "metrics.csv"
        new = not path.exists()
        with path.open("a", newline="") as file:
            rows = csv.writer(file)
            if new:
                rows.writerow(HEAD)
            # Nine digits tell any two float32 apart.
            rows.writerows([step, name, f"{value:.9g}"] for name, value in metrics.items())

    @rank_zero_only
    def rewind(self, update: int, total: int) -> None:
        """Leave out the rows of later updates; after the last one, those of the evaluation at the end."""
        path = self.folder / "metrics.csv"
        if not path.exists():
            return
        with path.open(newline="") as file:
            head, *rows = [row for row in csv.reader(file) if len(row) == len(HEAD)] or [HEAD]
        evaluated = (total, "val/")
        kept = [row for row in rows if int(row[0]) <= update and (int(row[0]), row[1][:4]) != evaluated]
        partial = path.with_name(f"{path.name}.partial")
        with partial.open("w", newline="") as file:
            csv.writer(file).writerows([head, *kept])
        partial.replace(path)

    def log_hyperparams(self, params: dict[str, Any] | Namespace, *args: Any, **kwargs: Any) -> None:
        """Do nothing: `config.yaml` in the same folder has them."""

    def log_picture(self, name: str, picture: Path, update: int) -> None:
        """Do nothing: pictures are in the run's folder already."""

    def log_media(self, name: str, files: Mapping[str, Path], update: int) -> None:
        """Do nothing: they are in the run's folder already."""


def _unharmed(method: Callable[..., None]) -> Callable[..., None]:
    """Let a W&B call fail without harm to the run; the first failure is named, and the logger falls silent."""

    @wraps(method)
    def call(self: "WandbLog", *args: Any, **kwargs: Any) -> None:
        if self.failed:
            return
        try:
            method(self, *args, **kwargs)
        except Exception as error:  # W&B raises many kinds, ConnectionResetError among them
            self.failed = True
            _log.warning("W&B stopped logging (%s: %s); the run goes on", type(error).__name__, error)

    return call


class WandbLog(RunLog):
    """Logs to Weights & Biases, offline where no key is found or the service can't be reached.

    Args:
        folder: The run's folder; W&B's own files go into its `wandb/`.
        name: The run's name.
        project: W&B's project.
    """

    def __init__(self, folder: str, name: str, project: str = "varitok") -> None:
        super().__init__(folder, name)
        self.project = project
        self.settings: Any = None
        self.failed = False
        self.sent = -1  # the last update that an earlier life of this run has sent
        self.begun = -1  # the last that this one has begun to send
        self._run: Any = None

    def _mode(self) -> str:
        if "WANDB_MODE" in os.environ:
            return os.environ["WANDB_MODE"]
        return "online" if os.environ.get("WANDB_API_KEY") or _key_in_netrc() else "offline"

    @property
    def run(self) -> Any:
        """W&B's run, started at the first call."""
        if self._run is None:
            import wandb  # noqa: PLC0415 (a second to import, and only needed here)

            for mode in (self._mode(), "offline"):
                try:
                    self._run = wandb.init(
                        project=self.project,
                        name=self._name,
                        id=self._identity(),
                        resume="allow",
                        dir=str(self.folder),
                        config=self.settings,
                        mode=mode,  # type: ignore[arg-type]
                        settings=wandb.Settings(init_timeout=10, silent=True),
                    )
                    break
                except Exception as error:
                    # Without the teardown the second try fails as well (wandb issue 9865).
                    wandb.teardown()
                    _log.warning("W&B could not start %s (%s)", mode, error)
            if self._run is None:
                raise RuntimeError("W&B could not start, not even offline")
        return self._run

    def _identity(self) -> str:
        """Give the name under which W&B knows this run, the same in all its lives."""
        path = self.folder / "wandb" / "run_id"
        if not path.is_file():
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(secrets.token_hex(4))
        return path.read_text().strip()

    @rank_zero_only
    @_unharmed
    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        """Log scalars against `update`."""
        self._send(metrics, step or 0)

    def _send(self, values: dict[str, Any], update: int) -> None:
        """Log values, but for what an earlier life of this run has sent: they were the same."""
        if update <= self.sent:
            return
        self.run.log({**values, "update": update})
        if update > self.begun:  # the one before it is complete
            (self.folder / "wandb" / "sent").write_text(str(self.begun))
            self.begun = update

    @rank_zero_only
    @_unharmed
    def rewind(self, update: int, total: int) -> None:
        """Find out what was sent already, which can't be taken back."""
        path = self.folder / "wandb" / "sent"
        self.sent = self.begun = int(path.read_text()) if path.is_file() else -1

    def log_hyperparams(self, params: dict[str, Any] | Namespace, *args: Any, **kwargs: Any) -> None:
        """Keep the run's configuration for W&B's start."""
        self.settings = params

    @rank_zero_only
    @_unharmed
    def log_picture(self, name: str, picture: Path, update: int) -> None:
        """Log a picture against `update`."""
        import wandb  # noqa: PLC0415

        self._send({name: wandb.Image(str(picture))}, update)

    @rank_zero_only
    @_unharmed
    def log_media(self, name: str, files: Mapping[str, Path], update: int) -> None:
        """Log sounds and clips against `update`."""
        import wandb  # noqa: PLC0415

        if files:
            kinds: dict[str, Callable[[str], Any]] = {".wav": wandb.Audio, ".mp4": partial(wandb.Video, format="mp4")}
            media = {f"{name}/{label}": kinds[path.suffix](str(path)) for label, path in files.items()}
            self._send(media, update)

    @rank_zero_only
    @_unharmed
    def finalize(self, status: str) -> None:
        """Close W&B's run."""
        if self._run is not None:
            self._run.finish(exit_code=0 if status == "success" else 1)


def _key_in_netrc() -> bool:
    try:
        return netrc().authenticators("api.wandb.ai") is not None
    except (OSError, ValueError, SyntaxError):
        return False
