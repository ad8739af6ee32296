"""Composition and checks of a command line's configuration; every mistake ends in one line.

Hydra reports a wrong name in up to a dozen lines, and a wrong type not at all. Here its errors become
`error: what, where, what to do` (messages.py), and values are converted to the types of those in train.yaml.
This module doesn't import torch, so that a typo is reported at once.
"""

import json
import os
import platform
import re
import subprocess
import sys
from collections.abc import Callable, Iterable, Sequence
from datetime import datetime
from importlib import metadata
from pathlib import Path
from typing import Any, NoReturn, cast

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException
from hydra.types import RunMode
from omegaconf import DictConfig, Node, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from varitok import UserError, __version__, exit_on_closed_output

from ...conversion import convert
from ...renamed import modernize
from .choices import drop_foreign
from .launch import detect_launch, match_launch
from .locations import check_locations, with_absolute_paths
from .messages import HERE, command_line, explain, groups, no_such_key, one_line, paths
from .overrides import arrange

__all__ = ["check", "run_folder", "run_with", "save_resolved"]

FULL_ERROR = "HYDRA_FULL_ERROR"
RUN_ID = "VARITOK_RUN_ID"
PACKAGES = (
    "torch torchvision torchaudio pytorch-lightning hydra-core omegaconf "
    "vector-quantize-pytorch torchmetrics numpy pillow onnx onnxruntime wandb"
).split()
PRIMARY = "train"  # name of varitok's own configuration; any other is the saved one of a run
NULLABLE = ("checkpoint.keep", "optim.clip")  # numbers for which null is no wrong type
SECRET = re.compile(r"(^|[._])(api_?key|wandb_?key|password|secret)$|^logger\..*\bkey$", re.IGNORECASE)


def run_with(task: Callable[[DictConfig], Any]) -> None:
    """Compose the configuration of the command line, and call `task` with it.

    A user's mistake ends in one line and exit status 2, an interrupt in status 130; any other error keeps its
    traceback. With the environment variable HYDRA_FULL_ERROR=1 every error does.

    Args:
        task: Called with the composed, checked configuration, once for each job of a sweep (`--multirun`).
    """
    told_in_full = os.environ.get(FULL_ERROR) == "1"
    started = False

    def job(config: DictConfig) -> None:
        nonlocal started
        started = True
        if not told_in_full:
            os.environ.pop(FULL_ERROR, None)
        if HydraConfig.get().job.config_name != PRIMARY:
            config = OmegaConf.create(modernize(OmegaConf.to_container(config)))
            OmegaConf.set_struct(config, True)
        try:
            check(config)
            task(config)
        except (UserError, OmegaConfBaseException) as error:
            if told_in_full:
                raise
            # Hydra would print lines of its own for an Exception; `_fail` raises SystemExit, which it propagates.
            _fail(error)

    job.__module__ = "varitok.train"  # Hydra names jobs after it
    program = hydra.main(version_base="1.3", config_path="pkg://varitok.configs", config_name=PRIMARY)(job)
    # torch's C++ would print pages of log for a lost process, which `Watchdog` reports in one line.
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    try:
        if {"-m", "--multirun"}.intersection(sys.argv) and not detect_launch().launcher:
            os.environ[RUN_ID] = _run_id()  # all jobs of a sweep, on any machine, share one folder
        os.environ[FULL_ERROR] = "1"  # makes Hydra raise its errors instead of printing them
        sys.argv[1:] = arrange(sys.argv[1:])
        _check_words(sys.argv[1:])
        with exit_on_closed_output():
            program()
    except KeyboardInterrupt:
        sys.exit(130)
    except SystemExit as leaving:
        # Lightning exits with status 1 after an interrupt, when it has cleaned up.
        if isinstance(leaving.__context__, KeyboardInterrupt):
            sys.exit(130)
        raise
    except (HydraException, OmegaConfBaseException, UserError) as error:
        if told_in_full:
            raise
        _fail(error)
    except ValueError:  # from Hydra: a group's option is neither a string nor a list
        if told_in_full or started:
            raise
        words, folders = command_line()
        chosen = [word for word in words if word.lstrip("+").partition("=")[0] in groups(folders)]
        _fail(UserError(f"{' '.join(chosen)}: the option of a group must be a name, or a list of names"))
    except OSError as error:
        # Before the job, Hydra writes to the run's folder only.
        if told_in_full or started:
            raise
        _fail(UserError(f"{error.filename}: can't write the run there ({error.strerror}); give hydra.run.dir=FOLDER"))


def check(config: DictConfig) -> None:
    """Check a composed configuration, and convert values to their types in place: `1e3` to an int, `None` to null.

    Keys that an experiment sets for other options than the chosen ones are removed (`drop_foreign`). The trainer's
    numbers of devices and nodes are set to those of the launcher (`match_launch`).

    Raises:
        UserError: A required value is missing, an interpolation fails, a path is empty, a key is unknown, a value has a
            wrong type, a key is that of a secret, or the launched processes don't match the trainer's.
    """
    _refuse_secrets(paths(config))
    if HydraConfig.initialized():
        words = cast(list[str], OmegaConf.to_container(HydraConfig.get().overrides.task))
        drop_foreign(config, words, command_line()[1])
    _set_null(config)
    try:
        if missing := sorted(OmegaConf.missing_keys(config)):
            give = [f"{key}={'FOLDER' if key.endswith(('root', 'folder', 'dir')) else 'VALUE'}" for key in missing]
            are = "is" if len(missing) == 1 else "are"
            raise UserError(f"{', '.join(missing)} {are} required: give {' '.join(give)}")
        check_locations(OmegaConf.to_container(config, resolve=True))
    except OmegaConfBaseException as error:
        mistake = error.__cause__
        raise mistake if isinstance(mistake, UserError) else UserError(one_line(error)) from error
    _check_types(config, _defaults(), "")
    if "optim" in config:
        _check_types(config.optim, OmegaConf.load(HERE / "optim" / "adamw.yaml"), "optim.", open_ended=True)
    sweeping = HydraConfig.initialized() and HydraConfig.get().mode == RunMode.MULTIRUN
    if "trainer" in config:
        match_launch(config.trainer, HydraConfig.get().runtime.choices["hydra/launcher"] if sweeping else "")


def _set_null(config: DictConfig) -> None:
    """Replace `None`, as W&B's sweeps write it, by null in place."""
    for key in config:
        node = config._get_node(key)
        if isinstance(node, DictConfig):
            if not (node._is_none() or node._is_missing() or node._is_interpolation()):
                _set_null(node)
        elif isinstance(node, Node) and node._value() == "None":
            config[key] = None


def _refuse_secrets(keys: Iterable[str]) -> None:
    """Refuse secrets on the command line: they are visible in process lists and would be saved with the run."""
    if found := [key for key in keys if SECRET.search(key)]:
        raise UserError(f"{found[0]}: others can read it there; log in by `wandb login`, or set WANDB_API_KEY instead")


def _check_words(words: Sequence[str]) -> None:
    """Refuse secrets, and `KEY=`, which an unset variable of the shell makes of `KEY=$NAME`.

    An empty text is written `KEY=""`.
    """
    _refuse_secrets(word.lstrip("+~").partition("=")[0] for word in words)
    if found := [word for word in words if word.endswith("=") and not word.startswith("-")]:
        raise UserError(f"{found[0]}: is empty; give a value, or null for none (is a variable of the shell unset?)")


def _run_id() -> str:
    """Return the run's ID: that of its job or sweep, the same on all machines and after a restart; else the time.

    The process that launches a sweep's jobs sets it for all of them (`RUN_ID`).

    Raises:
        UserError: Several processes were started, but the launcher provides no common ID.
    """
    if given := os.environ.get(RUN_ID):
        return given
    here, job = detect_launch(), os.environ.get("SLURM_JOB_ID")
    if job and here.launcher == "srun":
        return f"slurm_{job}"
    if os.environ.get("TORCHELASTIC_RUN_ID", "none") != "none":
        return os.environ["TORCHELASTIC_RUN_ID"]
    if "WANDB_SWEEP_ID" in os.environ and "WANDB_RUN_ID" in os.environ:  # a requeued trial resumes in its folder
        return os.path.join(os.environ["WANDB_SWEEP_ID"], os.environ["WANDB_RUN_ID"])
    if here.processes > 1 or "NODE_RANK" in os.environ or int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise UserError("hydra.run.dir: several processes must share a folder; give hydra.run.dir=FOLDER")
    return datetime.now().strftime("%Y-%m-%d_%H-%M-%S")


# Registered on import: a job that another process launches needs the resolver too.
OmegaConf.register_new_resolver("run_id", _run_id, replace=True, use_cache=True)


def run_folder(config: DictConfig) -> Path:
    """Return the run's folder: `runs/NAME/DATE_TIME`, or `hydra.run.dir`."""
    if not HydraConfig.initialized():
        raise UserError(f"{config.get('name', 'run')}: the run has no folder; start it by train.py or `run_with`")
    return Path(HydraConfig.get().runtime.output_dir)


def save_resolved(config: DictConfig, folder: Path) -> None:
    """Save a run's configuration, from which it can be repeated, and its provenance; only rank 0 saves.

    `config.yaml` is the resolved configuration, with absolute paths, and train.yaml's `hydra:` block, unresolved, so
    that a repeated run gets a new folder. `provenance.json` has the command line, the git commit and the versions of
    the main packages.

    Args:
        config: The composed configuration.
        folder: The run's folder; created if missing.
    """
    if detect_launch().rank:
        return
    folder.mkdir(parents=True, exist_ok=True)
    plain = with_absolute_paths(cast(dict[str, Any], OmegaConf.to_container(config, resolve=True)))
    parts = [
        "# Repeat this run: python train.py --config-dir THIS_FOLDER --config-name config\n",
        OmegaConf.to_yaml(OmegaConf.create(plain)),
        OmegaConf.to_yaml({"hydra": _defaults().get("hydra", {})}),
    ]
    (folder / "config.yaml").write_text("".join(parts), encoding="utf-8")
    (folder / "provenance.json").write_text(json.dumps(_provenance(), indent=2) + "\n", encoding="utf-8")


def _defaults() -> DictConfig:
    return cast(DictConfig, OmegaConf.load(HERE / "train.yaml"))


def _check_types(config: Any, defaults: Any, path: str, open_ended: bool = False) -> None:
    """Convert values to the types of their defaults; `build` converts everything below a `_target_`."""
    options = set() if path else set(groups([HERE]))
    if not open_ended and (unknown := [key for key in config if key not in defaults and key not in options]):
        known = [f"{path}{key}" for key in defaults if key not in ("defaults", "hydra")]
        raise UserError(no_such_key(f"{path}{unknown[0]}", known, known))
    for key, default in defaults.items():
        if key in options or key in ("defaults", "hydra") or key not in config:
            continue
        value, name = config[key], f"{path}{key}"
        if OmegaConf.is_dict(default):
            if not OmegaConf.is_dict(value):
                raise UserError(f"{name}: holds {', '.join(map(str, default))}; set one of them")
            if "_target_" not in default:
                _check_types(value, default, f"{name}.", open_ended)
            continue
        plain = OmegaConf.to_container(value) if OmegaConf.is_config(value) else value
        hint: Any = list if OmegaConf.is_list(default) else type(default)
        converted = convert(plain, Any if default is None else hint | None if name in NULLABLE else hint, name)
        if type(converted) is not type(plain):
            config[key] = converted


def _fail(error: Exception) -> NoReturn:
    """Print an error in one line, and exit with status 2."""
    sys.stdout.flush()
    print(f"error: {explain(error)}", file=sys.stderr)
    sys.exit(2)


def _provenance() -> dict[str, Any]:
    """Return the run's command, commit and versions; paths in the working or home folder become relative to it."""
    versions = {"python": platform.python_version(), "varitok": __version__}
    for name in PACKAGES:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    here, home = str(Path.cwd()), str(Path.home())
    arguments = [word.replace(here + os.sep, "").replace(here, ".").replace(home, "~") for word in sys.argv[1:]]
    return {"argv": [Path(sys.argv[0]).name, *arguments], "git": _commit(), "versions": versions}


def _commit() -> dict[str, Any] | None:
    """Return the checkout's git commit; None if the package is installed from a wheel, or git is missing."""
    checkout = HERE.resolve().parent
    if not (checkout / ".git").exists():
        return None

    def git(*words: str) -> str:
        done = subprocess.run(["git", "-C", str(checkout), *words], capture_output=True, text=True, check=True)
        return done.stdout.strip()

    try:
        return {"commit": git("rev-parse", "HEAD"), "dirty": bool(git("status", "--porcelain"))}
    except (OSError, subprocess.CalledProcessError):
        return None
