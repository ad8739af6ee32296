"""The search of a sweep: trials drawn by Optuna, each a run in a process of its own.

Hydra's Optuna sweeper is no longer maintained, reads no file of W&B's, and begins a trial anew that was cut off;
Optuna's own loop (`study.optimize`) records such a trial as failed.
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
PATIENCE = 3  # trials in a row that may fail
PULSE = 0.5  # seconds between two looks at a trial
STARTUP = 5  # random trials before a Bayesian search has something to go by
# Exit statuses of a run that was stopped, having saved itself; or killed by the signal before it could.
STOPPED = {end for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1) for end in (128 + number, -number)}


def trial_name(trial: Trial | FrozenTrial) -> str:
    """Name a trial's folder in the sweep's."""
    return f"trial_{trial.number:03d}"


def open_study(folder: Path, sweep: Sweep | None = None) -> optuna.Study:
    """Open the study of a sweep's folder, or begin it.

    Args:
        folder: The sweep's.
        sweep: What is searched; None only reads.
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
    # Where a sweep goes on, what it has drawn isn't drawn again.
    seed = len(study.get_trials(deepcopy=False))
    study.sampler = (
        optuna.samplers.TPESampler(seed=seed, n_startup_trials=STARTUP, constant_liar=True)
        if sweep.method == "bayes"
        else optuna.samplers.RandomSampler(seed=seed)
    )
    return study


class Running(NamedTuple):
    """A trial's process, and whether it was stopped for falling behind."""

    trial: Trial
    process: subprocess.Popen[bytes]
    behind: bool = False


class Search:
    """Runs trials until there are enough; what a kill or Ctrl-C has cut off goes on when the sweep is called again.

    A trial is `train.py` with a folder below the sweep's, in which it resumes as any run does. One that fails is
    recorded and told; three in a row end the search.

    Args:
        sweep: What is searched.
        folder: The sweep's.
        given: Words for all trials, by key; they win over the file's.
        jobs: Trials at a time. The devices of CUDA_VISIBLE_DEVICES are dealt out to them.

    Raises:
        UserError: Another search goes on in the folder, or a trial that it has left; or it holds another sweep's.
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
            raise UserError(f"{folder}: holds the trials of another sweep, or of other words; give another --out")
        self.study.set_user_attr("asked", asked)
        self.running: dict[int, Running] = {}  # by job
        self.stopped = 0  # the signal
        self.failures: list[str] = []  # in a row

    @property
    def finished(self) -> int:
        """How many trials have come to a value."""
        return len(self.study.get_trials(deepcopy=False, states=(TrialState.COMPLETE, TrialState.PRUNED)))

    def run(self, trials: int) -> None:
        """Run until there are `trials` trials, earlier ones included; a grid ends by itself.

        Raises:
            UserError: Too many trials have failed.
            SystemExit: A signal came, with the status of a process that it has ended.
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
            print(f"stopped; the same command goes on where {self.folder} is", file=sys.stderr)
            sys.exit(128 + self.stopped)
        if len(self.failures) >= PATIENCE:
            raise UserError(f"{len(self.failures)} trials in a row have failed, the last by: {self.failures[-1]}")

    def _stop(self, number: int, frame: FrameType | None) -> None:
        """Hand a signal on; the second ends trials at once."""
        for _, process, _ in self.running.values():
            process.send_signal(signal.SIGKILL if self.stopped else number)
        self.stopped = number

    def _fill(self, trials: int) -> None:
        """Start as many trials as may run."""
        for job in set(range(self.jobs)) - self.running.keys():
            if not self.stopped and len(self.failures) < PATIENCE and (trial := self._next(trials)):
                trial.set_user_attr("words", self.sweep.words(trial.params))
                self.running[job] = Running(trial, self._start(trial, job))

    def _next(self, trials: int) -> Trial | None:
        """Take up a trial that was cut off, or draw one."""
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
                start_new_session=True,  # a terminal's Ctrl-C comes by `_stop` alone
                pass_fds=[self.held.fileno()],
            )
        if self.stopped:  # while it was started
            process.send_signal(self.stopped)
        return process

    def _values(self, trial: Trial) -> list[float]:
        """Read what a trial's evaluations have found."""
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
        """Record how a trial has ended, and say it."""
        trial, values = ended.trial, self._values(ended.trial)
        if ended.behind and status in STOPPED and not self.stopped:
            self.study.tell(trial.number, state=TrialState.PRUNED)
            said = f"fell behind at {values[-1]:.5g}"
        elif status == 0 and values and math.isfinite(values[-1]):
            self.failures.clear()
            self.study.tell(trial.number, values[-1])
            said = f"{self.sweep.metric} {values[-1]:.5g}"
        elif self.stopped or status in STOPPED:
            said = "was stopped, and goes on when the sweep is called again"
        else:
            self.failures.append(self._why(trial, status))
            trial.set_user_attr("why", self.failures[-1])
            self.study.tell(trial.number, state=TrialState.FAIL)
            said = f"failed, {self.failures[-1]}"
        shown = ", ".join(f"{key}={short(value)}" for key, value in trial.user_attrs["words"].items())
        print(f"{trial_name(trial)}: {said}; {shown}", flush=True)

    def _why(self, trial: Trial, status: int) -> str:
        """Return the reason of a run's failure: its last line of output."""
        if status <= 0:
            return signal.Signals(-status).name if status else f"{self.sweep.metric} was not logged, or is not a number"
        output = (self.folder / trial_name(trial) / "output.txt").read_text(encoding="utf-8", errors="replace")
        lines = [line.strip() for line in output.split("\n$ ")[-1].splitlines()[1:] if line.strip()]
        return f"status {status}: {(lines or ['without a word'])[-1][:300]}"


def _hold(folder: Path) -> TextIO:
    """Lock a sweep's folder, as long as this process or a trial of its lives."""
    folder.mkdir(parents=True, exist_ok=True)
    held = (folder / "lock").open("w")
    try:
        fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        raise UserError(f"{folder}: another sweep, or a trial that it left, still runs there; wait for it") from None
    return held


def _environment(job: int, jobs: int) -> dict[str, str]:
    """Return a trial's environment: this package, and with parallel trials its share of the devices and cores."""
    # If the checkout isn't installed, the trial imports the package from the same place as this process.
    path = [*(str(Path(place).parent) for place in varitok.__path__), os.environ.get("PYTHONPATH", "")]
    found = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, path))}
    if jobs > 1:  # each would take all cores, and threads that wait for one another take most of the time
        found.setdefault("OMP_NUM_THREADS", str(max(1, len(os.sched_getaffinity(0)) // jobs)))
        if len(devices := found.get("CUDA_VISIBLE_DEVICES", "").split(",")) > 1:
            found["CUDA_VISIBLE_DEVICES"] = ",".join(devices[job % len(devices) :: jobs])
    return found
