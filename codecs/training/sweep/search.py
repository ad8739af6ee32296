"""Hyperparameter search of a sweep: Optuna proposes trials, each a run in its own process.

Hydra's Optuna sweeper is no longer maintained, can't read W&B's sweep files, and restarts an interrupted trial from
scratch. Optuna's own loop (`study.optimize`) records such a trial as failed.
"""

import fcntl
import math
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from types import FrameType
from typing import NamedTuple, TextIO

import optuna
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend
from optuna.trial import FrozenTrial, Trial, TrialState

import varitok
from varitok import UserError

from ..logging.scalars import read_scalars
from .space import Sweep, short, word

__all__ = ["JOURNAL", "Search", "open_study", "trial_name"]

JOURNAL = "study.journal"
PROGRAM = ["-m", "varitok.train"]
PATIENCE = 3  # failed trials in a row that end the search
PULSE = 0.5  # seconds between two polls of a trial
STARTUP = 5  # random trials before a Bayesian search uses their values
# Exit statuses of a run that saved and exited on a signal, or that the signal killed before it could.
STOPPED = {end for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1) for end in (128 + number, -number)}


def trial_name(trial: Trial | FrozenTrial) -> str:
    """Return the name of a trial's folder within the sweep's folder."""
    return f"trial_{trial.number:03d}"


def open_study(folder: Path, sweep: Sweep | None = None) -> optuna.Study:
    """Open or create the Optuna study in a sweep's folder.

    Args:
        folder: Folder of the sweep.
        sweep: Search space and method; None opens an existing study for reading.
    """
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    storage = JournalStorage(JournalFileBackend(str(folder / JOURNAL)))
    if sweep is None:
        return optuna.load_study(study_name="sweep", storage=storage)
    study = optuna.create_study(
        study_name="sweep",
        storage=storage,
        pruner=sweep.pruner(),
        direction="maximize" if sweep.maximize else "minimize",
        load_if_exists=True,
    )
    study.set_user_attr("metric", sweep.metric)
    # A resumed sweep gets another seed, to avoid drawing the same trials again.
    seed = len(study.get_trials(deepcopy=False))
    study.sampler = (
        optuna.samplers.TPESampler(seed=seed, n_startup_trials=STARTUP, constant_liar=True)
        if sweep.method == "bayes"
        else optuna.samplers.RandomSampler(seed=seed)
    )
    return study


class Running(NamedTuple):
    """A running trial, its process, and whether it is being pruned."""

    trial: Trial
    process: subprocess.Popen[bytes]
    behind: bool = False


class Search:
    """A search that runs a given number of trials; an interrupted one resumes when the sweep is called again.

    A trial is a run of `train.py` in a subfolder, where it resumes like any run. A failed trial is recorded and
    reported; three in a row end the search.

    Args:
        sweep: Search space and method.
        folder: Folder of the sweep.
        given: Overrides for all trials, by key; they win over the file's.
        jobs: Number of parallel trials, which share the devices of CUDA_VISIBLE_DEVICES.

    Raises:
        UserError: The folder is locked by another search or one of its trials, or is of another sweep.
    """

    def __init__(self, sweep: Sweep, folder: Path, given: Mapping[str, str], jobs: int = 1) -> None:
        self.sweep = sweep
        self.folder = folder
        self.fixed = {**sweep.fixed, "logger": "csv", **given}
        self.jobs = jobs
        self.held = _hold(folder)
        self.study = open_study(folder, sweep)
        self.cut_off = self.study.get_trials(states=(TrialState.RUNNING,))
        asked = repr((sweep._replace(trials=None), self.fixed))
        if self.study.user_attrs.get("asked", asked) != asked:
            raise UserError(f"{folder}: has trials of another sweep or of other overrides; give another --out")
        self.study.set_user_attr("asked", asked)
        self.running: dict[int, Running] = {}  # by job number
        self.stopped = 0  # number of the signal that stopped the search
        self.failures: list[str] = []  # reasons of the last failures in a row

    @property
    def finished(self) -> int:
        """Number of complete and pruned trials."""
        return len(self.study.get_trials(deepcopy=False, states=(TrialState.COMPLETE, TrialState.PRUNED)))

    def run(self, trials: int) -> None:
        """Run until there are `trials` trials, including earlier ones, or a grid is complete.

        Raises:
            UserError: Too many trials in a row have failed.
            SystemExit: A signal stopped the search; the status is 128 + the signal's number.
        """
        handlers = {number: signal.signal(number, self._stop) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            self._fill(trials)
            while self.running:
                time.sleep(PULSE)
                for job, (trial, process, behind) in [*self.running.items()]:
                    if (status := process.poll()) is not None:
                        self._record(self.running.pop(job), status)
                    elif self.sweep.halving and not behind and self._fell_behind(trial):
                        self.running[job] = Running(trial, process, behind=True)
                        process.terminate()
                self._fill(trials)
        finally:
            for number, handler in handlers.items():
                signal.signal(number, handler)
            self.held.close()
        if self.stopped:
            print(f"stopped; run the same command again to resume {self.folder}", file=sys.stderr)
            sys.exit(128 + self.stopped)
        if len(self.failures) >= PATIENCE:
            raise UserError(f"{len(self.failures)} trials in a row have failed, the last by: {self.failures[-1]}")

    def _stop(self, number: int, frame: FrameType | None) -> None:
        """Forward a signal to the trials; a second one kills them."""
        for _, process, _ in self.running.values():
            process.send_signal(signal.SIGKILL if self.stopped else number)
        self.stopped = number

    def _fill(self, trials: int) -> None:
        """Start trials in all free jobs."""
        for job in set(range(self.jobs)) - self.running.keys():
            if not self.stopped and len(self.failures) < PATIENCE and (trial := self._next(trials)):
                trial.set_user_attr("words", self.sweep.words(trial.params))
                self.running[job] = Running(trial, self._start(trial, job))

    def _next(self, trials: int) -> Trial | None:
        """Return an interrupted trial, or a new one from the sampler; None if there are enough."""
        if self.cut_off:
            return Trial(self.study, self.cut_off.pop(0)._trial_id)
        begun = len(self.study.get_trials(deepcopy=False))
        if self.sweep.method == "grid":
            grid = self.sweep.grid()
            trials = min(trials, len(grid))
            if begun < trials:
                self.study.enqueue_trial(grid[begun])
        return self.study.ask(self.sweep.space) if begun < trials else None

    def _start(self, trial: Trial, job: int) -> subprocess.Popen[bytes]:
        folder = self.folder / trial_name(trial)
        folder.mkdir(exist_ok=True)
        words = [f"{key}={value}" for key, value in (self.fixed | trial.user_attrs["words"]).items()]
        command = [sys.executable, *PROGRAM, *words, f"hydra.run.dir={word(str(folder))}"]
        with (folder / "output.txt").open("ab", buffering=0) as output:
            output.write(f"$ {shlex.join(command)}\n".encode())
            process = subprocess.Popen(
                command,
                env=_environment(job, self.jobs),
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,  # so that Ctrl-C reaches the trial through `_stop` only
                pass_fds=[self.held.fileno()],
            )
        if self.stopped:  # a signal arrived during the start
            process.send_signal(self.stopped)
        return process

    def _values(self, trial: Trial) -> list[float]:
        """Read the metric's values of a trial's evaluations."""
        return [*read_scalars(self.folder / trial_name(trial) / "metrics.csv").get(self.sweep.metric, {}).values()]

    def _fell_behind(self, trial: Trial) -> bool:
        """Report evaluations to Optuna, and return whether to prune the trial."""
        known = self.study.get_trials(deepcopy=False)[trial.number].intermediate_values
        for step, value in enumerate(self._values(trial), 1):
            if step not in known:
                trial.report(value, step)
                if trial.should_prune():
                    return True
        return False

    def _record(self, ended: Running, status: int) -> None:
        """Record and print how a trial has ended."""
        trial, values = ended.trial, self._values(ended.trial)
        if ended.behind and status in STOPPED and not self.stopped:
            self.study.tell(trial.number, state=TrialState.PRUNED)
            said = f"fell behind at {values[-1]:.5g}"
        elif status == 0 and values and math.isfinite(values[-1]):
            self.failures.clear()
            self.study.tell(trial.number, values[-1])
            said = f"{self.sweep.metric} {values[-1]:.5g}"
        elif self.stopped or status in STOPPED:
            said = "was stopped; call the sweep again to resume it"
        else:
            self.failures.append(self._why(trial, status))
            trial.set_user_attr("why", self.failures[-1])
            self.study.tell(trial.number, state=TrialState.FAIL)
            said = f"failed, {self.failures[-1]}"
        shown = ", ".join(f"{key}={short(value)}" for key, value in trial.user_attrs["words"].items())
        print(f"{trial_name(trial)}: {said}; {shown}", flush=True)

    def _why(self, trial: Trial, status: int) -> str:
        """Return the reason of a trial's failure: its last line of output, or the signal."""
        if status <= 0:
            return signal.Signals(-status).name if status else f"{self.sweep.metric} was not logged, or is not a number"
        output = (self.folder / trial_name(trial) / "output.txt").read_text(encoding="utf-8", errors="replace")
        lines = [line.strip() for line in output.split("\n$ ")[-1].splitlines()[1:] if line.strip()]
        return f"status {status}: {(lines or ['no output'])[-1][:300]}"


def _hold(folder: Path) -> TextIO:
    """Lock a sweep's folder for the lifetime of this process and of its trials."""
    folder.mkdir(parents=True, exist_ok=True)
    held = (folder / "lock").open("w")
    try:
        fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        raise UserError(f"{folder}: another sweep, or a trial that it left, still runs there; wait for it") from None
    return held


def _environment(job: int, jobs: int) -> dict[str, str]:
    """Return a trial's environment: package path, and if trials are parallel, its share of devices and cores."""
    # If the checkout isn't installed, the trial imports the package from the same place as this process.
    path = [*(str(Path(place).parent) for place in varitok.__path__), os.environ.get("PYTHONPATH", "")]
    found = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, path))}
    if jobs > 1:  # else each trial would use all cores, and threads would mostly wait for one another
        found.setdefault("OMP_NUM_THREADS", str(max(1, len(os.sched_getaffinity(0)) // jobs)))
        if len(devices := found.get("CUDA_VISIBLE_DEVICES", "").split(",")) > 1:
            found["CUDA_VISIBLE_DEVICES"] = ",".join(devices[job % len(devices) :: jobs])
    return found
