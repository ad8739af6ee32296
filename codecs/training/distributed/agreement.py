"""Agreement of a run's processes: what they run and resume, and that their parameters stay equal."""

import hashlib
import platform
import socket
from collections.abc import Iterable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
import torch.distributed as dist
from torch import Tensor

import varitok
from varitok import UserError, __version__

from ...distributed import world_size
from .strategy import Sharded

__all__ = ["Agreement", "checksum", "sources"]

REMEDIES = {
    "checkpoint": "; the run's folder must be shared by all nodes",
    "sources": "; all nodes must have the same commit and no edits of their own",
}


class Agreement(pl.Callback):
    """The callback that ends a run whose processes differ, which would train on without a message.

    Before the start it compares versions and sources, and the checkpoint that each process found: if the run's folder
    isn't shared by all nodes, some would resume and others begin anew, from equal weights but other optimizer states.
    At each log reading it compares a checksum of all parameters and buffers. Sharded codecs have nothing to compare.

    Args:
        checkpoint: The checkpoint that this process resumes; None if it found none.
    """

    def __init__(self, checkpoint: Path | None) -> None:
        self.checkpoint = checkpoint

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Compare the processes before the start.

        Raises:
            UserError: Their versions, sources or checkpoints differ.
        """
        if world_size() == 1:
            return
        found: list[dict[str, str]] = [{}] * world_size()
        dist.all_gather_object(found, _describe(self.checkpoint))
        for rank, other in enumerate(found):
            for what, told in other.items():
                if what != "node" and told != found[0][what]:
                    raise UserError(
                        f"process 0 ({found[0]['node']}) has {what} {found[0][what]}, process {rank} ({other['node']})"
                        f" {told}{REMEDIES.get(what, '')}"
                    )

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: object, batch: Any, batch_idx: int
    ) -> None:
        """Compare parameters and buffers when a log reading is due.

        Raises:
            UserError: They differ.
        """
        module: Any = pl_module
        if world_size() == 1 or isinstance(trainer.strategy, Sharded) or module.batch % module.record.every:
            return
        mine = checksum([*module.parameters(), *module.buffers()]).to(module.device)
        sums = [torch.empty_like(mine) for _ in range(world_size())]
        dist.all_gather(sums, mine)
        values = torch.stack(sums).tolist()
        if odd := [rank for rank, value in enumerate(values) if value != values[0]]:
            raise UserError(
                f"update {module.update}: the weights of process {odd[0]} differ from those of process 0; resume from"
                " a checkpoint that an evaluation shows to be good, on other devices if it happens again"
            )


def checksum(tensors: Iterable[Tensor]) -> Tensor:
    """Return the sum of the tensors' bits as integers, modulo 2^64: int64 `()`; equal tensors have equal sums."""
    sums = []
    for tensor in tensors:
        bits = tensor.detach()
        if bits.is_floating_point():
            bits = bits.view({2: torch.int16, 4: torch.int32, 8: torch.int64}[bits.element_size()])
        sums.append(bits.sum(dtype=torch.int64))
    return torch.stack(sums).sum() if sums else torch.zeros((), dtype=torch.int64)


def sources() -> str:
    """Return a digest of this package's modules, which commits and uncommitted edits change alike."""
    digest = hashlib.sha256()
    root = Path(varitok.__file__).parent
    for folder in sorted(path.resolve() for path in root.iterdir() if path.is_dir()):  # links, in a checkout
        for module in sorted(folder.rglob("*.py")):
            digest.update(module.read_bytes())
    return digest.hexdigest()[:12]


def _describe(checkpoint: Path | None) -> dict[str, str]:
    """Return what must be equal in all processes, and the name of this one's node."""
    return {
        "node": socket.gethostname(),
        "varitok": __version__,
        "sources": sources(),
        "torch": version("torch"),
        "Python": platform.python_version(),
        "checkpoint": "none" if checkpoint is None else f"{checkpoint.name} of {checkpoint.stat().st_size} bytes",
    }
