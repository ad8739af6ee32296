"""Detection of rank and world size by launcher: torchrun, srun, submitit or Lightning.

This module doesn't import torch.
"""

import os
from collections.abc import Mapping
from typing import Any, NamedTuple

from omegaconf import DictConfig, OmegaConf

from varitok import UserError

__all__ = ["Launch", "detect_launch", "match_launch"]


class Launch(NamedTuple):
    """The launcher of a run's processes, and this process's rank.

    Attributes:
        launcher: Name of the launcher; empty if Lightning starts the processes (`trainer.devices`).
        rank: Global rank of this process.
        processes: Number of processes; 1 if Lightning starts them.
        machines: Number of machines, each with the same number of processes.
        local: Rank of this process on its machine.
    """

    launcher: str = ""
    rank: int = 0
    processes: int = 1
    machines: int = 1
    local: int = 0

    @property
    def on_each(self) -> int:
        """Number of processes on each machine."""
        return self.processes // self.machines


def detect_launch(environment: Mapping[str, str] = os.environ) -> Launch:
    """Read launcher and rank from environment variables."""

    def number(name: str, default: int = 0) -> int:
        return int(environment.get(name, default))

    if "TORCHELASTIC_RUN_ID" in environment:
        count, here = number("WORLD_SIZE", 1), number("LOCAL_WORLD_SIZE", 1)
        return Launch("torchrun", number("RANK"), count, count // here, number("LOCAL_RANK"))
    # In an interactive SLURM shell (`srun --pty bash`) runs start as in any other shell.
    interactive = environment.get("SLURM_JOB_NAME") in ("bash", "interactive")
    if "SLURM_PROCID" in environment and "SLURM_NTASKS" in environment and not interactive:
        rank, count = number("SLURM_PROCID"), number("SLURM_NTASKS")
        return Launch("srun", rank, count, number("SLURM_NNODES", 1), number("SLURM_LOCALID"))
    if "SUBMITIT_LOCAL_NTASKS" in environment:
        rank = number("SUBMITIT_LOCAL_GLOBALID")
        return Launch("submitit", rank, number("SUBMITIT_LOCAL_NTASKS"), local=rank)
    local = number("LOCAL_RANK")
    return Launch(rank=number("RANK") or number("NODE_RANK") or local, local=local)


def match_launch(trainer: DictConfig, sweep: str = "") -> None:
    """Set the trainer's numbers of devices and nodes to those that were launched.

    Args:
        trainer: Lightning's arguments, changed in place.
        sweep: Name of the launcher of a sweep's jobs; empty if there is none.

    Raises:
        UserError: The trainer's numbers differ, or are above 1 with a sweep launcher of one process per job.
    """
    here = detect_launch()
    numbers = {"devices": here.on_each, "num_nodes": here.machines}
    asked = {key: OmegaConf.select(trainer, key, default=1) for key in numbers}
    one = here.processes == 1
    if sweep and (one or not sweep.startswith("submitit")):
        devices: Any = asked["devices"] if one else here.processes
        if devices not in (1, "1") and not (OmegaConf.is_list(devices) and len(devices) == 1):
            raise UserError(
                f"trainer.devices={devices}: a sweep trains on one device; give trainer.devices=1, or start its jobs by"
                " hydra/launcher=submitit_slurm with hydra.launcher.tasks_per_node"
            )
    if one:
        return
    for key, number in numbers.items():
        if asked[key] not in (1, "1", -1, "auto", number):
            raise UserError(f"trainer.{key}={asked[key]}: {here.launcher} has started {number}; give trainer.{key}=1")
        OmegaConf.update(trainer, key, number, force_add=True)
    if here.launcher == "srun":
        # Lightning's SLURMEnvironment requires it, and SLURM sets it only if it was requested.
        os.environ.setdefault("SLURM_NTASKS_PER_NODE", str(here.on_each))
    if here.launcher == "submitit":  # on one machine; Lightning has no environment for it
        job = int(os.environ["SUBMITIT_LOCAL_JOB_ID"].partition("_")[0])
        os.environ |= {"LOCAL_RANK": str(here.rank), "NODE_RANK": "0", "MASTER_ADDR": "127.0.0.1"}
        os.environ.setdefault("MASTER_PORT", str(15000 + job % 10000))
