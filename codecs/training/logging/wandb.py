"""Weights & Biases as a logger: online where it can, offline where it must."""

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

START = 5.0  # seconds to wait for the service at a run's start, before it is done without
FINISH = 10.0  # seconds that the last uploads may take; the rest stays on the disk
PREEMPTED = {128 + getattr(signal, name) for name in ("SIGTERM", "SIGUSR1") if hasattr(signal, name)}


class WandbLog(RunLog):
    """Logs to Weights & Biases, offline where no key is found or the service can't be reached.

    Beside scalars and media it gets the resolved configuration and the run's `provenance.json`: command line, git
    commit, versions. All is logged against `update`. A run has the same name there in all its lives; what an earlier
    life has sent isn't sent again.

    Args:
        folder, name: As of `RunLog`; W&B's own files go into the folder's `wandb/`.
        project: W&B's project.
    """

    def __init__(self, folder: str, name: str, project: str = "varitok") -> None:
        super().__init__(folder, name)
        self.project = project
        self.settings: dict[str, Any] = {}
        self.sent = -1  # the last update that an earlier life of this run has sent
        self.begun = -1  # the last that this one has begun to send
        self._run: Any = None

    @property
    def run(self) -> Any:
        """W&B's run, started at the first call."""
        if self._run is None:
            # Its reports of its own errors hold a process up at its end where the service can't be reached.
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
        """Return the run's ID at W&B, the same after each resume; a sweep's agent provides one."""
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
        """Log values, but for what an earlier life of this run has sent: they were the same."""
        if update <= self.sent:
            return
        self.run.log({**values, "update": update})
        if update > self.begun:  # the one before it is complete
            replace(self.folder / "wandb" / "sent", str(self.begun).encode())
            self.begun = update

    @unharmed
    def rewind(self, update: int, total: int) -> None:
        """Find the last update that was sent, which can't be taken back."""
        path = self.folder / "wandb" / "sent"
        self.sent = self.begun = int(path.read_text()) if path.is_file() else -1

    def log_hyperparams(self, params: dict[str, Any] | Namespace, *args: Any, **kwargs: Any) -> None:
        """Keep the run's configuration for W&B's start."""
        self.settings = dict(params) if isinstance(params, dict) else vars(params)

    @unharmed
    def log_picture(self, name: str, picture: Path, update: int) -> None:
        """Log a picture against `update`."""
        import wandb  # noqa: PLC0415

        self._send({name: wandb.Image(str(picture))}, update)

    @unharmed
    def log_media(self, name: str, files: Mapping[str, Path], update: int) -> None:
        """Log sounds and clips against `update`."""
        import wandb  # noqa: PLC0415

        if files:
            kinds: dict[str, Callable[[str], Any]] = {".wav": wandb.Audio, ".mp4": partial(wandb.Video, format="mp4")}
            media = {f"{name}/{label}": kinds[path.suffix](str(path)) for label, path in files.items()}
            self._send(media, update)

    def finalize(self, status: str) -> None:
        """Close W&B's run with the exit status that the process will have.

        A sweep's agent learns that a scheduler has stopped the run, and queues it again.
        """
        self._finish(status)
        if self.failed and "wandb" in sys.modules:
            with suppress(Exception):  # which W&B would print when the process ends
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
    """Return W&B's mode: the environment's, else online if there is a key."""
    if "WANDB_MODE" in os.environ:
        return os.environ["WANDB_MODE"]
    return "online" if os.environ.get("WANDB_API_KEY") or _key_in_netrc() else "offline"


def _key_in_netrc() -> bool:
    host = urlsplit(os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai")).hostname or ""
    try:
        return netrc().authenticators(host) is not None
    except (OSError, ValueError, SyntaxError):
        return False
