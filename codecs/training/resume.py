"""Resuming a run: its checkpoint, and what may differ from the configuration that wrote it."""

import logging
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

from omegaconf import DictConfig, OmegaConf

from varitok import UserError

from ..build import checkpoint_of, misfit, open_checkpoint
from .base import Training
from .config.launch import detect_launch

__all__ = ["check_resume", "differing", "find_checkpoint", "holds_weights_alone"]

_log = logging.getLogger(__name__)

BUILT = ("codec", "bottleneck", "length", "objective", "prior", "training.ema_decay")  # what decides on the weights
# An optimizer's state is of its class and of the parameters that it trains.
FIXED = ("training.freeze", "optim.codec._target_", "optim.discriminator._target_")


def find_checkpoint(resume: str, folder: Path) -> Path | None:
    """Return the checkpoint to resume, or None; refuse to start anew in a folder that has one.

    Args:
        resume: A run or checkpoint; "auto": the run's own, if there is one; "none".
        folder: The run's folder.

    Raises:
        UserError: There is no such checkpoint, or the folder has one that isn't to be resumed.
    """
    own = folder / "checkpoints" / "last.ckpt"
    if resume == "auto":
        return own if own.is_file() else None
    if resume != "none":
        return checkpoint_of(resume)
    if own.is_file():
        raise UserError(f"{folder}: has a run already; resume it by resume=auto, or give another hydra.run.dir")
    return None


def holds_weights_alone(checkpoint: Path) -> bool:
    """Return whether a checkpoint is one of imported weights, without a training's state.

    Raises:
        UserError: The file isn't a checkpoint.
    """
    state, _ = open_checkpoint(checkpoint, map_location="meta", mmap=True)
    return "updates" not in state


def check_resume(checkpoint: Path, module: Training, plain: Mapping[str, Any]) -> None:
    """Check that a run can resume from a checkpoint, and log what differs between their configurations.

    Values of the optimizers, such as learning rate and betas, are those of the run.

    Args:
        checkpoint: The file.
        module: The run's training module.
        plain: The run's configuration, plain containers.

    Raises:
        UserError: The file isn't a checkpoint, its weights don't fit, or optimizers or frozen parts differ.
    """
    state, before = open_checkpoint(checkpoint, map_location="meta", mmap=True)
    changes = {key: told for key, told in _differences(before, plain) if key != "resume"}
    if fixed := [told for key, told in changes.items() if key in FIXED]:
        raise UserError(f"{checkpoint}: can't resume with {', '.join(fixed)}; start a new run by init_from instead")
    if odd := misfit(state, module.state_dict()):
        causes = [told for key, told in changes.items() if f"{key}.".startswith(tuple(f"{name}." for name in BUILT))]
        why = f"resumed with {', '.join(causes)}" if causes else "another version wrote it"
        raise UserError(f"{checkpoint}: doesn't fit this run's weights, {why} ({odd})")
    if changes and not detect_launch().rank:
        _log.info("resumed with %s", ", ".join(changes.values()))


def differing(before: DictConfig, now: DictConfig, groups: Sequence[str]) -> str:
    """Describe the values of groups in which two configurations differ, such as "codec.encoder.depth=2 (was 1)"."""
    old, new = (cast(dict[str, Any], OmegaConf.to_container(one, resolve=True)) for one in (before, now))
    return ", ".join(told for group in groups for _, told in _differences(old.get(group), new.get(group), group))


def _differences(before: Any, now: Any, key: str = "") -> Iterator[tuple[str, str]]:
    """List the keys whose values differ, each with a description; what follows from another `_target_` is left out."""
    if isinstance(before, Mapping) and isinstance(now, Mapping):
        names = ["_target_"] if before.get("_target_") != now.get("_target_") else dict.fromkeys((*before, *now))
        for name in names:
            yield from _differences(before.get(name), now.get(name), f"{key}.{name}" if key else str(name))
    elif before != now:
        yield key, f"{key}={_describe(now)} (was {_describe(before)})"


def _describe(value: Any) -> str:
    """Write a value as on a command line; an object by its class."""
    if isinstance(value, Mapping):
        return str(value.get("_target_", "{...}")).rpartition(".")[2]
    if isinstance(value, list):
        return f"[{','.join(map(_describe, value))}]"
    return "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)
