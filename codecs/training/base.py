"""The base training module: optimizers, learning-rate schedule, gradient accumulation, EMA and logging."""

import inspect
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple, Protocol

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
from .compilation import compile_blocks
from .distributed.strategy import Parallel, Sharded
from .ema import EMA
from .guard import Guard
from .logging.loggers import RunLog
from .logging.scalar_buffer import ScalarBuffer
from .logging.throughput import Throughput
from .schedules import warmup_cosine

__all__ = ["MakeOptimizer", "Readable", "Refusal", "Training", "fastest", "parameter_groups"]

MakeOptimizer = Callable[[Iterable[dict[str, Any]]], Optimizer]


class Readable(Protocol):
    """A collector of values between two log readings, whose state checkpoints save."""

    def state(self) -> dict[str, Any]:
        """Return the collected values as plain data and tensors; every process must call it."""
        ...

    def restore(self, state: dict[str, Any], process: int, device: torch.device) -> None:
        """Restore a `state`."""
        ...


class Refusal(NamedTuple):
    """A refused update.

    Attributes:
        update: Its number.
        why: The reason.
        mine: Whether this process's own latents and loss were finite.
    """

    update: int
    why: str
    mine: bool


class Training(pl.LightningModule):
    """A Lightning module that trains a codec or a prior by manual optimization.

    Only the first optimizer, the trained module's own, is stepped through Lightning. So `global_step` counts updates;
    stepping two would count double (Lightning issue 17958). Schedules read the buffer `updates`, which is restored on
    resume.

    Args:
        name: Name of the trained module in state dicts.
        trained: Module to train.
        optimizer: Builds its optimizer from parameter groups.
        updates: Updates in the whole run.
        warmup: Updates of the learning rate's linear warmup.
        final: Learning rate at the end of the cosine, as a share of its maximum.
        clip: Maximum gradient norm for each optimizer.
        accumulate: Batches per update.
        ema_decay: Decay of the parameters' EMA; 0 disables it.
        freeze: Names of submodules that are not trained.
        compile: Names of submodules, or of `others`, to run through `torch.compile`.
        compile_mode: Mode of `torch.compile`; "reduce-overhead" replays CUDA graphs.
        activation_checkpointing: Names of submodules whose activations are recomputed in the backward pass.
        log_every: Updates between two log readings.
        guard: Arguments of `Guard`, which refuses bad updates.
        seed: Seed of the random draws of training steps.
        others: Modules outside the trained one that may be compiled, by name.

    Raises:
        UserError: The module has no submodule of a given name, or `activation_checkpointing` names a bottleneck.
    """

    updates: Tensor

    def __init__(
        self,
        name: str,
        trained: nn.Module,
        optimizer: MakeOptimizer,
        *,
        updates: int,
        warmup: Annotated[int, "[0, inf)"] = 0,
        final: Annotated[float, "[0, 1]", "1 keeps the learning rate constant"] = 0.1,
        clip: Annotated[float, "(0, inf]", "inf doesn't clip"] = 1.0,
        accumulate: int = 1,
        ema_decay: Annotated[float, "[0, 1)", "0 averages nothing"] = 0.999,
        freeze: Sequence[str] = (),
        compile: Sequence[str] = (),
        compile_mode: Literal["default", "reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs"] = "default",
        activation_checkpointing: Sequence[str] = (),
        log_every: int = 50,
        guard: Mapping[str, Any] | None = None,
        seed: Annotated[int, "[0, 4294967295]"] = 0,
        others: Mapping[str, Sequence[nn.Module]] | None = None,
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
        self.latest: dict[str, float] = {}  # values of the last log reading
        self.evaluation: dict[str, float] = {}  # values that the last evaluation logged, and its `update`
        self.stepped = False  # whether the last batch completed an update
        self.late = False  # whether the guard's verdict is read an update late, so that none waits for the device
        self.refusals: list[Refusal] = []  # not reported yet
        self.unread: dict[str, Tensor] = {}  # the last update's values, logged if its verdict accepts it
        self.register_buffer("updates", torch.zeros((), dtype=torch.int64))
        self.frozen = [self._part(part, "freeze") for part in freeze]
        for part in self.frozen:
            part.requires_grad_(False).eval()  # Lightning keeps modes: it doesn't call `train` when it begins
        self.average = EMA(trained, ema_decay) if ema_decay else None
        self.compiled = bool(compile)
        others = others or {}
        for part_name in compile:
            if part_name not in others:
                compile_blocks(self._part(part_name, "compile", others), compile_mode)
                continue
            for other in others[part_name]:
                other.compile(mode=compile_mode)
        recomputed = [self._part(part, "activation_checkpointing") for part in activation_checkpointing]
        if any(isinstance(part, Bottleneck) for part in recomputed):
            raise UserError(
                "training.activation_checkpointing: a bottleneck updates codebooks in its forward pass;"
                " choose encoder, decoder"
            )
        self.recompute = ActivationCheckpointing(recomputed)

    @property
    def trained(self) -> nn.Module:
        """The trained module."""
        return self.get_submodule(self.name)

    @property
    def learning(self) -> nn.Module:
        """The module whose parameters the first optimizer updates."""
        return self.trained

    @property
    def data(self) -> DataModule:
        """The run's data module."""
        data: DataModule = self.trainer.datamodule  # type: ignore[attr-defined]
        return data

    def configure_optimizers(self) -> list[Optimizer]:
        """Build the optimizers; weight decay applies to weights of linear layers and convolutions only."""
        made = zip(self.make_optimizers, self.parts(), strict=True)
        optimizers = [make(parameter_groups(part), **fastest(make, self.device)) for make, part in made]
        for group in [group for optimizer in optimizers for group in optimizer.param_groups]:
            group["initial_lr"] = group["lr"]
        for optimizer in optimizers:
            # A checkpoint's groups have the options of the run that wrote it; a resumed run may have others.
            # Before the state is loaded: the options decide on its device.
            optimizer.register_load_state_dict_pre_hook(partial(_with_options, options=_options(optimizer)))
        return optimizers

    def parts(self) -> list[nn.Module]:
        """List the modules with an optimizer of their own, in the order of `make_optimizers`."""
        return [self.learning]

    def on_fit_start(self) -> None:
        """Copy the update counter to the host, so that no step waits for the device, and rewind the logs.

        Values that a killed run logged after its last checkpoint are removed, since those updates are repeated.
        """
        self.update = int(self.updates)
        self.late = self.device.type == "cuda" and self.can_be_late()
        self.batch = self.update * self.accumulate  # of the whole run; Lightning's index may differ after a resume
        for logger in self.loggers:
            if isinstance(logger, RunLog):
                logger.rewind(self.update, self.total)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Save the values collected since the last log reading: a checkpoint may fall between two."""
        checkpoint["unread"] = {name: part.state() for name, part in self.read_parts().items()}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Restore the collected values, and clear `is_last_batch`: this run's loader decides when batches end."""
        checkpoint["loops"]["fit_loop"]["epoch_loop.batch_progress"]["is_last_batch"] = False
        for name, part in self.read_parts().items():
            part.restore(checkpoint["unread"][name], self.global_rank, self.device)

    def read_parts(self) -> dict[str, Readable]:
        """Map names to the collectors whose state a checkpoint saves."""
        return {"record": self.record, "guard": self.guard, "bad": self.data.bad}

    def train(self, mode: bool = True) -> "Training":
        """Switch to training mode, except for frozen submodules."""
        super().train(mode)
        for part in self.frozen:
            part.eval()
        return self

    def on_train_batch_start(self, batch: Batch, batch_idx: int) -> None:
        """Record that a batch has arrived."""
        if self.compiled:
            # Graphs may overwrite what the last step computed.
            torch.compiler.cudagraph_mark_step_begin()  # type: ignore[no-untyped-call]
        self.pace.arrive(len(batch.signal))

    def on_train_batch_end(self, outputs: Any, batch: Batch, batch_idx: int) -> None:
        """Record, after all callbacks, that the loop waits for the next batch."""
        self.pace.leave()

    def begin_batch(self) -> bool:
        """Count a batch; return whether it completes an update."""
        self.batch += 1
        self.stepped = self.batch % self.accumulate == 0
        return self.stepped

    def learn(self, part: nn.Module, loss: Tensor, *, retain_graph: bool = False) -> None:
        """Backpropagate a part's loss; on the last batch of an update, average gradients over processes."""
        strategy = self.trainer.strategy
        if isinstance(strategy, Parallel):
            strategy.expect(part, self.stepped)
        # Lightning runs the whole step under autocast. There, the backward pass of operations in float32, such as LFQ's
        # entropies, would multiply in bfloat16.
        with self.without_autocast():
            self.manual_backward(loss / self.accumulate, retain_graph=retain_graph)

    def end_update(self, factor: float) -> Tensor:
        """Step the first optimizer unless the guard refuses, and count the update; return the gradient norm."""
        with self.without_autocast():
            return self._end_update(factor)

    def _end_update(self, factor: float) -> Tensor:
        self.settle()
        norm = self.clip_norm(self.learning)
        verdict = self.guard.judge(norm)
        taken = verdict if self.late else self._read_verdict(self.update + 1)
        optimizers = self.optimizers()
        self.step(optimizers[0] if isinstance(optimizers, list) else optimizers, factor, taken)
        self.update += 1
        self.updates.fill_(self.update)
        self.after_step(taken)
        if self.average and taken is True:
            self.average.update(self.trained, self.update)
        return norm

    def can_be_late(self) -> bool:
        """Return whether the optimizers can skip a step by a flag on the device, and the guard decides there."""
        flagged = all(getattr(optimizer, "_step_supports_amp_scaling", False) for optimizer in self.trainer.optimizers)
        return flagged and self.guard.spike is None and not isinstance(self.trainer.strategy, Sharded)

    def settle(self) -> None:
        """Read the verdict on the last update, unless known; then average the parameters and log."""
        if not self.guard.undecided:
            return
        if self._read_verdict(self.update):
            if self.average:
                self.average.update(self.trained, self.update)
            self.record.add(self.unread)
        self.unread = {}

    def _read_verdict(self, update: int) -> bool:
        taken = self.guard.read()
        if not taken:
            self.refusals.append(Refusal(update, self.guard.why, self.guard.mine))
        return taken

    def state_dict(self, *given: Any, **named: Any) -> Any:
        """Return the state after the last update."""
        self.settle()
        return super().state_dict(*given, **named)

    def without_autocast(self) -> torch.autocast:
        """Return a context in which operations compute in the type of their inputs."""
        return torch.autocast(self.device.type, enabled=False)

    def after_step(self, taken: bool | Tensor) -> None:
        """Run after a step, accepted or refused as in `step`, before the EMA update; does nothing by default."""

    def clip_norm(self, module: nn.Module) -> Tensor:
        """Clip the module's gradient norm; return the norm before clipping."""
        return full_tensor(nn.utils.clip_grad_norm_([p for p in module.parameters() if p.grad is not None], self.clip))

    def step(self, optimizer: Any, factor: float, taken: bool | Tensor = True) -> None:
        """Set the learning rate, step the optimizer if `taken`, and clear the gradients.

        Args:
            optimizer: An optimizer of torch, or Lightning's wrapper of one.
            factor: Learning rate, as a share of the initial one.
            taken: Whether to step; if a tensor, bool `()`, a fused optimizer reads it on the device.
        """
        for group in optimizer.param_groups:
            group["lr"] = group["initial_lr"] * factor
        if isinstance(taken, Tensor):
            # As a GradScaler sets it: 1 leaves parameters and state as they are.
            getattr(optimizer, "optimizer", optimizer).found_inf = (~taken).float()
        if taken is not False:
            optimizer.step()
        optimizer.zero_grad()

    def go_back(self, path: Path) -> None:
        """Restore a checkpoint's weights and optimizer states, but keep the update counter and data position."""
        self.settle()
        saved = torch.load(path, weights_only=True, map_location=self.device)
        self.load_state_dict(saved["state_dict"])
        self.updates.fill_(self.update)
        for optimizer, state in zip(self.trainer.optimizers, saved["optimizer_states"], strict=True):
            optimizer.load_state_dict(state)

    def log_values(self, values: dict[str, Tensor], factor: float) -> None:
        """Collect the step's values, unless it was refused; log their means when a reading is due."""
        if self.stepped and self.guard.undecided:
            self.unread = {name: value.detach() for name, value in values.items()}
        elif not (self.stepped and self.guard.why):
            self.record.add(values)
        if self.batch % self.record.every:
            return
        self.settle()
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

    def log_evaluation(self, values: dict[str, float], compared: dict[str, float] | None = None) -> None:
        """Log an evaluation's values, and keep for the checkpoint callback those that are `compared`; all if None."""
        self.evaluation = (values if compared is None else compared) | {"update": self.update}
        self._send(values)

    def _send(self, values: dict[str, float]) -> None:
        for logger in self.loggers:
            logger.log_metrics(values, step=self.update)

    def reading(self) -> dict[str, float]:
        """Return additional values to log; none by default."""
        return {}

    def _part(self, name: str, option: str, others: Iterable[str] = ()) -> nn.Module:
        """Return a submodule of the trained module by its name, with dots for one of a part; list `others` too."""
        parts: dict[str, nn.Module] = dict(self.trained.named_modules(remove_duplicate=False))
        if not name or name not in parts:
            known = ", ".join([*(part for part, _ in self.trained.named_children()), *others])
            raise UserError(f"training.{option}: the {self.name} has no part {name!r}; take {known}")
        return parts[name]


def _options(optimizer: Optimizer) -> list[dict[str, Any]]:
    """Return the options of each group of parameters: learning rate, betas, weight decay."""
    return [{key: value for key, value in group.items() if key != "params"} for group in optimizer.param_groups]


def _with_options(optimizer: Optimizer, state: dict[str, Any], options: list[dict[str, Any]]) -> dict[str, Any]:
    groups = [group | own for group, own in zip(state["param_groups"], options, strict=True)]
    return state | {"param_groups": groups}


def fastest(make: MakeOptimizer, device: torch.device) -> dict[str, Any]:
    """Return the arguments by which an optimizer updates all parameters in one kernel, if it can on a device.

    An implementation that the configuration chooses stays: `+optim.codec.foreach=true`, or `fused=false`.
    """
    chosen = getattr(make, "keywords", {})
    can = device.type == "cuda" and "fused" in inspect.signature(make).parameters
    return {"fused": True} if can and all(chosen.get(name) is None for name in ("fused", "foreach")) else {}


def parameter_groups(module: nn.Module) -> list[dict[str, Any]]:
    """Split trainable parameters into a group with weight decay and one without."""
    decayed = {
        id(child.weight)
        for child in module.modules()
        if isinstance(child, (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d))
    }
    trained = [p for p in module.parameters() if p.requires_grad]
    kept = [p for p in trained if id(p) not in decayed]
    return [{"params": [p for p in trained if id(p) in decayed]}, {"params": kept, "weight_decay": 0.0}]
