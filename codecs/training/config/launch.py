"""Which of a run's processes this one is, by what has started them: torchrun, srun, submitit, or Lightning.

Nothing here loads torch.
"""

import os
from collections.abc import Mapping
from typing import Any, NamedTuple

from omegaconf import DictConfig, OmegaConf

from varitok import UserError

__all__ = ["Launch", "detect_launch", "match_launch"]


class Launch(NamedTuple):
    """Where a process stands among those of its run.

    Attributes:
        launcher: Name of the launcher of all processes; empty if Lightning starts them (`trainer.devices`).
        rank: Rank of this process.
        processes: Number of processes; 1 if Lightning starts them.
        machines: Number of machines, with equally many processes.
    """

    launcher: str = ""
    rank: int = 0
    processes: int = 1
    machines: int = 1

    @property
    def on_each(self) -> int:
        """Processes of each machine."""
        return self.processes // self.machines


def detect_launch(environment: Mapping[str, str] = os.environ) -> Launch:
    """Read the place of this process out of its environment."""

    def number(name: str, default: int = 0) -> int:
        return int(environment.get(name, default))

    if "TORCHELASTIC_RUN_ID" in environment:
        count, here = number("WORLD_SIZE", 1), number("LOCAL_WORLD_SIZE", 1)
        return Launch("torchrun", number("RANK"), count, count // here)
    # A shell on a node that SLURM has lent (`srun --pty bash`) starts runs as any shell does.
    interactive = environment.get("SLURM_JOB_NAME") in ("bash", "interactive")
    if "SLURM_PROCID" in environment and "SLURM_NTASKS" in environment and not interactive:
        return Launch("srun", number("SLURM_PROCID"), number("SLURM_NTASKS"), number("SLURM_NNODES", 1))
    if "SUBMITIT_LOCAL_NTASKS" in environment:
        return Launch("submitit", number("SUBMITIT_LOCAL_GLOBALID"), number("SUBMITIT_LOCAL_NTASKS"))
    return Launch(rank=number("RANK") or number("NODE_RANK") or number("LOCAL_RANK"))


def match_launch(trainer: DictConfig, sweep: str = "") -> None:
    """Let the trainer have the processes that were started.

    Args:
        trainer: Lightning's arguments, changed in place; missing ones get the launcher's numbers.
        sweep: Name of the launcher of a sweep's jobs; empty if there is none.

    Raises:
        UserError: Other numbers were asked for than were started, or a sweep's launcher starts one process a job.
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
        # Lightning asks for it, and not everyone gives it; from there on all is its SLURMEnvironment's.
        os.environ.setdefault("SLURM_NTASKS_PER_NODE", str(here.on_each))
    if here.launcher == "submitit":  # of one machine, which Lightning doesn't know
        job = int(os.environ["SUBMITIT_LOCAL_JOB_ID"].partition("_")[0])
        os.environ |= {"LOCAL_RANK": str(here.rank), "NODE_RANK": "0", "MASTER_ADDR": "127.0.0.1"}
        os.environ.setdefault("MASTER_PORT", str(15000 + job % 10000))
