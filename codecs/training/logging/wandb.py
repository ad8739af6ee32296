"""The Weights & Biases (W&B) logger: online if a key is found and the service is reachable, else offline."""

import json
import logging
import os
import secrets
import signal
import sys
from argparse import Namespace
from collections.abc import Callable, Mapping
from contextlib import suppress
from functools import partial
from netrc import netrc
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from .loggers import RunLog, unharmed
from .scalars import replace

__all__ = ["WandbLog"]

_log = logging.getLogger(__name__)

START = 5.0  # seconds to wait for the service at a run's start, before falling back to offline
FINISH = 10.0  # seconds that the last uploads may take; the rest stays on disk
PREEMPTED = {128 + getattr(signal, name) for name in ("SIGTERM", "SIGUSR1") if hasattr(signal, name)}


class WandbLog(RunLog):
    """A logger to Weights & Biases, offline if no key is found or the service can't be reached.

    Besides scalars and media it logs the resolved configuration and the run's `provenance.json`: command line, git
    commit, versions. The step metric is `update`. A resumed run continues the same W&B run, and doesn't send repeated
    updates again.

    Args:
        folder, name: See `RunLog`; W&B's own files are in the folder's `wandb/`.
        project: Name of the W&B project.
    """

    def __init__(self, folder: str, name: str, project: str = "varitok") -> None:
        super().__init__(folder, name)
        self.project = project
        self.settings: dict[str, Any] = {}
        self.sent = -1  # last update sent before the resume
        self.begun = -1  # last update that is partly sent
        self._run: Any = None

    @property
    def run(self) -> Any:
        """The W&B run, started at the first access."""
        if self._run is None:
            # W&B's error reporting would delay the exit if the service can't be reached.
            os.environ.setdefault("WANDB_ERROR_REPORTING", "false")
            import wandb  # noqa: PLC0415 (a second to import, and only needed here)

            for mode in dict.fromkeys((_mode(), "offline")):
                try:
                    self._run = wandb.init(
                        project=self.project,
                        name=self._name,
                        id=self._identity(),
                        resume="allow",
                        dir=str(self.folder),
                        config=self.settings | self._provenance(),
                        mode=mode,  # type: ignore[arg-type]
                        settings=wandb.Settings(init_timeout=START, finish_timeout=FINISH, silent=True),
                    )
                    self._run.define_metric("*", step_metric="update")
                    break
                except Exception as error:
                    # Without the teardown the second try fails as well (wandb issue 9865).
                    wandb.teardown()
                    _log.warning("W&B could not start %s (%s)", mode, " ".join(str(error).split()))
            if self._run is None:
                raise RuntimeError("W&B could not start, not even offline")
        return self._run

    def _identity(self) -> str:
        """Return the run's W&B ID, the same after each resume: a sweep agent's, or a random one."""
        path = self.folder / "wandb" / "run_id"
        if not path.is_file():
            path.parent.mkdir(parents=True, exist_ok=True)
            replace(path, os.environ.get("WANDB_RUN_ID", secrets.token_hex(4)).encode())
        return path.read_text().strip()

    def _provenance(self) -> dict[str, Any]:
        path = self.folder / "provenance.json"
        return {"provenance": json.loads(path.read_text(encoding="utf-8"))} if path.is_file() else {}

    @unharmed
    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        """Log scalars against `update`."""
        self._send(metrics, step or 0)

    def _send(self, values: dict[str, Any], update: int) -> None:
        """Log values, unless they were sent before the resume: repeated updates give the same values."""
        if update <= self.sent:
            return
        self.run.log({**values, "update": update})
        if update > self.begun:  # the previous update is complete
            replace(self.folder / "wandb" / "sent", str(self.begun).encode())
            self.begun = update

    @unharmed
    def rewind(self, update: int, total: int) -> None:
        """Read the last update that was sent; W&B can't remove it."""
        path = self.folder / "wandb" / "sent"
        self.sent = self.begun = int(path.read_text()) if path.is_file() else -1

    def log_hyperparams(self, params: dict[str, Any] | Namespace, *args: Any, **kwargs: Any) -> None:
        """Keep the run's configuration until the W&B run starts."""
        self.settings = dict(params) if isinstance(params, dict) else vars(params)

    @unharmed
    def log_picture(self, name: str, picture: Path, update: int) -> None:
        """Log an image file against `update`."""
        import wandb  # noqa: PLC0415

        self._send({name: wandb.Image(str(picture))}, update)

    @unharmed
    def log_media(self, name: str, files: Mapping[str, Path], update: int) -> None:
        """Log audio and video files against `update`."""
        import wandb  # noqa: PLC0415

        if files:
            kinds: dict[str, Callable[[str], Any]] = {".wav": wandb.Audio, ".mp4": partial(wandb.Video, format="mp4")}
            media = {f"{name}/{label}": kinds[path.suffix](str(path)) for label, path in files.items()}
            self._send(media, update)

    def finalize(self, status: str) -> None:
        """Finish the W&B run with the exit status that the process will have.

        A run that a scheduler has stopped is marked as preempted, so that a sweep agent requeues it.
        """
        self._finish(status)
        if self.failed and "wandb" in sys.modules:
            with suppress(Exception):  # W&B would print it at the process's end
                sys.modules["wandb"].teardown()

    @unharmed
    def _finish(self, status: str) -> None:
        if self._run is None:
            return
        leaving = sys.exc_info()[1]
        code = leaving.code if isinstance(leaving, SystemExit) else status != "success"
        if code in PREEMPTED:
            self._run.mark_preempting()
        self._run.finish(exit_code=int(code) if isinstance(code, int) else 1)


def _mode() -> str:
    """Return W&B's mode: WANDB_MODE if it is set, else online if there is a key."""
    if "WANDB_MODE" in os.environ:
        return os.environ["WANDB_MODE"]
    return "online" if os.environ.get("WANDB_API_KEY") or _key_in_netrc() else "offline"


def _key_in_netrc() -> bool:
    host = urlsplit(os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai")).hostname or ""
    try:
        return netrc().authenticators(host) is not None
    except (OSError, ValueError, SyntaxError):
        return False
