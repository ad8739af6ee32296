"""What every training has: optimizers and their schedule, whole updates, the moving average, the log."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import pytorch_lightning as pl
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from varitok import UserError
from varitok.data.batch import Batch
from varitok.data.datamodule import DataModule

from ..bottlenecks.contract import Bottleneck
from ..distributed import full_tensor, sum_over_ranks
from .activation_checkpointing import ActivationCheckpointing
from .distributed.strategy import Parallel
from .ema import EMA
from .guard import Guard
from .logging.loggers import RunLog
from .logging.scalar_buffer import ScalarBuffer
from .logging.throughput import Throughput
from .schedules import warmup_cosine

__all__ = ["MakeOptimizer", "Readable", "Training", "parameter_groups"]

MakeOptimizer = Callable[[Iterable[dict[str, Any]]], Optimizer]


class Readable(Protocol):
    """Something that collects numbers between two readings of the log."""

    def state(self) -> dict[str, Any]:
        """Return the collected values, plain data and tensors; every process must call it."""
        ...

    def restore(self, state: dict[str, Any], process: int, device: torch.device) -> None:
        """Go on from there."""
        ...


class Training(pl.LightningModule):
    """Trains a module by manual optimization.

    Of several optimizers only the first, the module's own, is stepped through Lightning, so that its `global_step`
    counts updates (with two it counts double: Lightning issue 17958); schedules read the buffer `updates`, which
    survives a resume.

    Args:
        name: What the module is called in checkpoints.
        trained: The module.
        optimizer: Makes its optimizer from parameter groups.
        updates: Updates in the whole run.
        warmup: Updates over which the learning rates rise.
        final: Share of the learning rates left at the end of the cosine.
        clip: Largest norm of each optimizer's gradient.
        accumulate: Batches to an update.
        ema_decay: Decay of the moving average of parameters; 0 keeps none.
        freeze: Parts of the module that don't train, by name.
        compile: Parts of it to be run through `torch.compile`, by name.
        activation_checkpointing: Parts of it, by name, whose activations are made again in the backward pass; see
            `ActivationCheckpointing`.
        log_every: Updates between two readings of the log.
        guard: What refuses updates, arguments of `Guard`.
        seed: Seed of what a step draws.

    Raises:
        UserError: A part is named that the module doesn't have, or a bottleneck is to be recomputed.
    """

    updates: Tensor

    def __init__(
        self,
        name: str,
        trained: nn.Module,
        optimizer: MakeOptimizer,
        *,
        updates: int,
        warmup: int = 0,
        final: float = 0.1,
        clip: float = 1.0,
        accumulate: int = 1,
        ema_decay: float = 0.999,
        freeze: Sequence[str] = (),
        compile: Sequence[str] = (),
        activation_checkpointing: Sequence[str] = (),
        log_every: int = 50,
        guard: Mapping[str, Any] | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.add_module(name, trained)
        self.name = name
        self.make_optimizers = [optimizer]
        self.factor = partial(warmup_cosine, total=updates, warmup=warmup, final=final)
        self.total = updates
        self.clip = clip
        self.accumulate = accumulate
        self.seed = seed
        self.record = ScalarBuffer(log_every * accumulate)
        self.guard = Guard(**(guard or {}))
        self.pace = Throughput()
        self.latest: dict[str, float] = {}  # the log's last reading
        self.evaluation: dict[str, float] = {}  # what the last evaluation logged, and its `update`
        self.stepped = False  # whether the last batch completed an update
        self.register_buffer("updates", torch.zeros((), dtype=torch.int64))
        self.frozen = [self._part(part, "freeze") for part in freeze]
        for part in self.frozen:
            part.requires_grad_(False)
        self.average = EMA(trained, ema_decay) if ema_decay else None
        for part_name in compile:
            self._part(part_name, "compile").compile()
        recomputed = [self._part(part, "activation_checkpointing") for part in activation_checkpointing]
        if any(isinstance(part, Bottleneck) for part in recomputed):
            raise UserError(
                "training.activation_checkpointing: a bottleneck learns in its forward; take encoder, decoder"
            )
        self.recompute = ActivationCheckpointing(recomputed)

    @property
    def trained(self) -> nn.Module:
        """What is trained."""
        return self.get_submodule(self.name)

    @property
    def learning(self) -> nn.Module:
        """What the first optimizer steps."""
        return self.trained

    @property
    def data(self) -> DataModule:
        """The run's batches."""
        data: DataModule = self.trainer.datamodule  # type: ignore[attr-defined]
        return data

    def configure_optimizers(self) -> list[Optimizer]:
        """Make the optimizers; weights of linear maps and convolutions decay, nothing else does."""
        made = zip(self.make_optimizers, self.parts(), strict=True)
        optimizers = [make(parameter_groups(part)) for make, part in made]
        for group in [group for optimizer in optimizers for group in optimizer.param_groups]:
            group["initial_lr"] = group["lr"]
        return optimizers

    def parts(self) -> list[nn.Module]:
        """Name what has an optimizer of its own, in the order of `make_optimizers`."""
        return [self.learning]

    def on_fit_start(self) -> None:
        """Read the counter once; from here on it is kept beside the buffer, so that no step waits for the device.

        What a killed run has logged beyond its last checkpoint is forgotten: it is done again.
        """
        self.update = int(self.updates)
        self.batch = self.update * self.accumulate  # of the whole run, whatever Lightning's index says after a resume
        for logger in self.loggers:
            if isinstance(logger, RunLog):
                logger.rewind(self.update, self.total)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Add the values since the last log reading: a checkpoint may be between two."""
        checkpoint["unread"] = {name: part.state() for name, part in self.read_parts().items()}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Take it; whether there are more batches is for this run's own loader to say."""
        checkpoint["loops"]["fit_loop"]["epoch_loop.batch_progress"]["is_last_batch"] = False
        for name, part in self.read_parts().items():
            part.restore(checkpoint["unread"][name], self.global_rank, self.device)

    def read_parts(self) -> dict[str, Readable]:
        """Name what collects numbers between two readings of the log."""
        return {"record": self.record, "guard": self.guard, "bad": self.data.bad}

    def train(self, mode: bool = True) -> "Training":
        """Switch to training, except for frozen parts."""
        super().train(mode)
        for part in self.frozen:
            part.eval()
        return self

    def on_train_batch_start(self, batch: Batch, batch_idx: int) -> None:
        """Note that a batch has come."""
        self.pace.arrive(len(batch.signal))

    def on_train_batch_end(self, outputs: Any, batch: Batch, batch_idx: int) -> None:
        """Note that the next one is wanted: callbacks have done their part."""
        self.pace.leave()

    def begin_batch(self) -> bool:
        """Count a batch; return whether it completes an update."""
        self.batch += 1
        self.stepped = self.batch % self.accumulate == 0
        return self.stepped

    def learn(self, part: nn.Module, loss: Tensor, *, retain_graph: bool = False) -> None:
        """Go back through a part's loss of this batch; the last of an update brings all processes' gradients in."""
        strategy = self.trainer.strategy
        if isinstance(strategy, Parallel):
            strategy.expect(part, self.stepped)
        self.manual_backward(loss / self.accumulate, retain_graph=retain_graph)

    def end_update(self, factor: float) -> Tensor:
        """Step the trained module, unless the guard refuses, and count the update; return the gradient's norm."""
        optimizers = self.optimizers()
        first = optimizers[0] if isinstance(optimizers, list) else optimizers
        norm = self.clip_norm(self.learning)
        taken = self.guard.accepts(norm)
        self.step(first, factor, taken)
        self.update += 1
        self.updates.fill_(self.update)
        if taken:
            self.after_step()
            if self.average:
                self.average.update(self.trained, self.update)
        else:
            self.after_refusal()
        return norm

    def after_step(self) -> None:
        """Do what else belongs to an update, before the average follows."""

    def after_refusal(self) -> None:
        """Forget what belongs to an update that was refused."""

    def clip_norm(self, module: nn.Module) -> Tensor:
        """Clip the module's gradient; gives the norm before."""
        return full_tensor(nn.utils.clip_grad_norm_([p for p in module.parameters() if p.grad is not None], self.clip))

    def step(self, optimizer: Any, factor: float, taken: bool = True) -> None:
        """Step along the gradient, or only clear it."""
        for group in optimizer.param_groups:
            group["lr"] = group["initial_lr"] * factor
        if taken:
            optimizer.step()
        optimizer.zero_grad()

    def go_back(self, path: Path) -> None:
        """Take the weights of a checkpoint and the states of the optimizers, and go on with the next data."""
        saved = torch.load(path, weights_only=True, map_location=self.device)
        self.load_state_dict(saved["state_dict"])
        self.updates.fill_(self.update)
        for optimizer, state in zip(self.trainer.optimizers, saved["optimizer_states"], strict=True):
            optimizer.load_state_dict(state)

    def log_values(self, values: dict[str, Tensor], factor: float) -> None:
        """Collect the step's values, unless it was refused; hand their means to the loggers when a reading is due."""
        if not (self.stepped and self.guard.why):
            self.record.add(values)
        if self.batch % self.record.every:
            return
        self.latest = self.record.read() | self.reading()
        mine = torch.tensor([self.data.bad.total, self.data.bad.seen], device=self.device)
        bad, seen = sum_over_ranks([mine])[0].tolist()
        counts = {"refused": self.guard.refused, "bad_samples": bad}
        self.latest |= {name: float(count) for name, count in counts.items() if count}
        size = len(self.data.splits.train)
        self.latest |= {"data/samples": float(seen), "data/epochs": seen / size}
        self.latest |= self.pace.read()
        self.latest["lr"] = factor * self.trainer.optimizers[0].param_groups[0]["initial_lr"]
        self._send(self.latest)

    def log_evaluation(self, values: dict[str, float]) -> None:
        """Hand what an evaluation found to the loggers, and keep it for whoever follows it."""
        self.evaluation = values | {"update": self.update}
        self._send(values)

    def _send(self, values: dict[str, float]) -> None:
        for logger in self.loggers:
            logger.log_metrics(values, step=self.update)

    def reading(self) -> dict[str, float]:
        """Return further values for the log."""
        return {}

    def _part(self, name: str, option: str) -> nn.Module:
        """Find a part of the trained module."""
        parts = dict(self.trained.named_children())
        if name not in parts:
            raise UserError(f"training.{option}: the {self.name} has no part {name!r}; it has {', '.join(parts)}")
        return parts[name]


def parameter_groups(module: nn.Module) -> list[dict[str, Any]]:
    """Split trainable parameters into those that decay and those that don't."""
    decayed = {
        id(child.weight)
        for child in module.modules()
        if isinstance(child, (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d))
    }
    trained = [p for p in module.parameters() if p.requires_grad]
    kept = [p for p in trained if id(p) not in decayed]
    return [{"params": [p for p in trained if id(p) in decayed]}, {"params": kept, "weight_decay": 0.0}]
