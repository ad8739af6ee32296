"""Where a run's scalars, pictures and sounds go. No logger ever stops a run."""

import csv
import logging
import os
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
                rows.writerow(["update", "name", "value"])
            rows.writerows([step, name, f"{value:.6g}"] for name, value in metrics.items())

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

    @rank_zero_only
    @_unharmed
    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        """Log scalars against `update`."""
        self.run.log({**metrics, "update": step})

    def log_hyperparams(self, params: dict[str, Any] | Namespace, *args: Any, **kwargs: Any) -> None:
        """Keep the run's configuration for W&B's start."""
        self.settings = params

    @rank_zero_only
    @_unharmed
    def log_picture(self, name: str, picture: Path, update: int) -> None:
        """Log a picture against `update`."""
        import wandb  # noqa: PLC0415

        self.run.log({name: wandb.Image(str(picture)), "update": update})

    @rank_zero_only
    @_unharmed
    def log_media(self, name: str, files: Mapping[str, Path], update: int) -> None:
        """Log sounds and clips against `update`."""
        import wandb  # noqa: PLC0415

        if files:
            kinds: dict[str, Callable[[str], Any]] = {".wav": wandb.Audio, ".mp4": partial(wandb.Video, format="mp4")}
            media = {f"{name}/{label}": kinds[path.suffix](str(path)) for label, path in files.items()}
            self.run.log({**media, "update": update})

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
