"""The training module: one codec forward, the discriminator's turn, the codec's turn, the log."""

import math
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any

import pytorch_lightning as pl
import torch
from pytorch_lightning.utilities.types import STEP_OUTPUT
from torch import Tensor, nn
from torch.optim import Optimizer

from varitok import UserError
from varitok.data.batch import Batch, normalise

from ..codec import Codec
from ..lengths import Kept
from ..losses.objective import Objective
from ..result import Reconstruction
from .average import Average
from .health import Health
from .record import Record
from .schedules import warmup_cosine

__all__ = ["CodecTraining"]

MakeOptimizer = Callable[[Iterable[dict[str, Any]]], Optimizer]


class CodecTraining(pl.LightningModule):
    """Trains a codec, with or without a discriminator.

    Optimization is manual. Of the two optimizers only the codec's is stepped through Lightning, so that its
    `global_step` counts updates (with two it counts double: Lightning issue 17958); schedules read the buffer
    `updates`, which survives a resume.

    Args:
        codec: What is trained.
        objective: What it is trained for.
        optimizer: Makes the codec's optimizer from parameter groups.
        discriminator_optimizer: Makes the discriminator's; needed where the objective has one.
        updates: Updates in the whole run.
        warmup: Updates over which the learning rates rise.
        final: Share of the learning rates left at the end of the cosine.
        clip: Largest norm of each optimizer's gradient.
        accumulate: Batches to an update.
        average: Decay of the moving average of parameters; 0 keeps none.
        freeze: Parts of the codec that don't train, by name: the second of two stages freezes "encoder",
            "project_in" and "bottleneck" (TiTok, arXiv 2406.07550, section 3.3).
        compile: Parts of the codec to be run through `torch.compile`, by name.
        log_every: Updates between two readings of the log.
        seed: Seed of the kept lengths, and of noise in the bottleneck.

    Raises:
        UserError: A part is named that the codec doesn't have, or float16 is asked for.
    """

    updates: Tensor

    def __init__(
        self,
        codec: Codec,
        objective: Objective,
        optimizer: MakeOptimizer,
        discriminator_optimizer: MakeOptimizer | None = None,
        *,
        updates: int,
        warmup: int = 0,
        final: float = 0.1,
        clip: float = 1.0,
        accumulate: int = 1,
        average: float = 0.999,
        freeze: Sequence[str] = (),
        compile: Sequence[str] = (),
        log_every: int = 50,
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.codec = codec
        self.objective = objective
        self.make_optimizer = optimizer
        self.make_discriminator_optimizer = discriminator_optimizer
        self.factor = partial(warmup_cosine, total=updates, warmup=warmup, final=final)
        self.total = updates
        self.clip = clip
        self.accumulate = accumulate
        self.seed = seed
        self.record = Record(log_every * accumulate)
        self.health = Health(codec.bottleneck)
        self.latest: dict[str, float] = {}  # the log's last reading
        self.stepped = False  # whether the last batch completed an update
        self.register_buffer("updates", torch.zeros((), dtype=torch.int64))
        self.frozen = [_part(codec, name, "freeze") for name in freeze]
        for part in self.frozen:
            part.requires_grad_(False)
        self.average = Average(codec, average) if average else None
        for name in compile:
            _part(codec, name, "compile").compile()

    @property
    def evaluated(self) -> Codec:
        """The codec to evaluate and to export: the averaged one where there is one."""
        return self.average.codec if self.average else self.codec

    def configure_optimizers(self) -> list[Optimizer]:
        """Make the optimizers; weights of linear maps and convolutions decay, nothing else does."""
        if self.trainer.precision == "16-mixed":
            raise UserError("trainer.precision=16-mixed: the discriminator's step is not scaled; use bf16-mixed")
        optimizers = [self.make_optimizer(_groups(self.codec))]
        if self.objective.adversarial:
            if self.make_discriminator_optimizer is None:
                raise UserError("optim.discriminator is missing: the objective has an adversarial term")
            optimizers.append(self.make_discriminator_optimizer(_groups(self.objective.adversarial)))
        for group in [group for optimizer in optimizers for group in optimizer.param_groups]:
            group["initial_lr"] = group["lr"]
        return optimizers

    def on_fit_start(self) -> None:
        """Read the counter once; from here on it is kept beside the buffer, so that no step waits for the device."""
        self.update = int(self.updates)
        self.batch = self.update * self.accumulate  # of the whole run, whatever Lightning's index says after a resume

    def train(self, mode: bool = True) -> "CodecTraining":
        """Switch to training, but for what is frozen."""
        super().train(mode)
        for part in self.frozen:
            part.eval()
        return self

    def training_step(self, batch: Batch, batch_idx: int) -> STEP_OUTPUT:
        """Train on one batch."""
        real = normalise(batch.signal)
        # A mask that hides nothing costs convolutions a tenth of their time.
        lengths = None if batch.whole else batch.lengths
        result = self.reconstruct(batch, real)
        self.batch += 1
        self.stepped = due = self.batch % self.accumulate == 0
        factor = self.factor(self.update)
        adversarial = self.objective.adversarial
        values: dict[str, Tensor] = {}
        judged = adversarial is not None and adversarial.learns(self.update)
        shared = adversarial is not None and adversarial.shared
        if adversarial and judged:
            loss, means = adversarial.discriminator_loss(result.signal, real, lengths)
            values |= {"discriminator/loss": loss} | {f"discriminator/{name}": mean for name, mean in means.items()}
            self.manual_backward(loss / self.accumulate, retain_graph=shared)
        if judged and due and not shared:
            values["discriminator/grad_norm"] = self.step_discriminator(factor)
        loss, terms = self.codec_loss(result, real, lengths)
        values |= terms
        if loss.requires_grad:  # a codec in which nothing learns (dMel) is measured only
            self.manual_backward(loss / self.accumulate)
        if judged and due and shared:
            # The codec has heard it as it was: a step in between would change what the gradient goes back through.
            values["discriminator/grad_norm"] = self.step_discriminator(factor)
        if due:
            optimizers = self.optimizers()
            first = optimizers[0] if isinstance(optimizers, list) else optimizers
            values["grad_norm"] = self.step(first, self.codec, factor)
            self.codec.bottleneck.update()
            self.update += 1
            self.updates.fill_(self.update)
            if self.average:
                self.average.update(self.codec, self.update)
        self.log_values(values, factor)
        return None

    def reconstruct(self, batch: Batch, real: Tensor) -> Reconstruction:
        """Send a batch through the codec, with as much of its codes as is drawn, whose health is taken."""
        kept = self.draw(batch)
        if self.codec.perturbation is not None:
            self.codec.perturbation.progress = self.update / self.total
        unmasked = batch.whole and not self.codec.ordered
        result: Reconstruction = self.codec(real, None if unmasked else kept.lengths, kept.depth)
        positions = batch.lengths.sum() * math.prod(real.shape[3:])
        self.health.add(result.quantized.codes, kept.lengths, kept.depth, positions)
        return result

    def codec_loss(
        self, result: Reconstruction, real: Tensor, lengths: Tensor | None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Sum the objective's terms, the bottleneck's penalties and the discriminator's word; name each for the log."""
        quantized = result.quantized
        loss, terms = self.objective(result.signal, real, lengths, self.update)
        loss = loss + sum(quantized.penalties.values())
        values = {f"loss/{name}": value for name, value in terms.items()}
        values |= {f"bottleneck/{name}": value for name, value in (quantized.penalties | quantized.metrics).items()}
        return loss, values | {"loss": loss}

    def step_discriminator(self, factor: float) -> Tensor:
        """Step the raw optimizer: stepping Lightning's wrapper would count a second global step."""
        assert self.objective.adversarial is not None
        return self.step(self.trainer.optimizers[1], self.objective.adversarial, factor)

    def step(self, optimizer: Any, module: nn.Module, factor: float) -> Tensor:
        """Clip the module's gradient and step; gives the norm before clipping."""
        norm = nn.utils.clip_grad_norm_([p for p in module.parameters() if p.grad is not None], self.clip)
        for group in optimizer.param_groups:
            group["lr"] = group["initial_lr"] * factor
        optimizer.step()
        optimizer.zero_grad()
        return norm

    def draw(self, batch: Batch) -> Kept:
        """Draw what a batch keeps; all chance of a batch is the same for the same run, process and batch."""
        size = batch.signal.shape[2:]
        blocks = self.codec.blocks(size)
        torch.manual_seed(hash((self.seed, self.global_rank, self.batch)) & (2**63 - 1))  # of noise in bottlenecks
        kept = self.codec.length.sample(
            len(batch.signal) * blocks,
            self.codec.count(size),
            self.codec.books,
            seed=(self.seed, self.batch),
            rank=self.global_rank,
            progress=self.update / self.total,
        )
        lengths, depth = (axis.to(self.device, non_blocking=True) for axis in kept)
        return Kept(torch.minimum(lengths, self.codec.valid(batch.lengths, size)), depth)

    def log_values(self, values: dict[str, Tensor], factor: float) -> None:
        """Collect the step's values; hand their means to the loggers when a reading is due."""
        self.record.add(values)
        if self.batch % self.record.every:
            return
        self.latest = self.record.read() | self.health.read()
        self.latest["lr"] = factor * self.trainer.optimizers[0].param_groups[0]["initial_lr"]
        for logger in self.loggers:
            logger.log_metrics(self.latest, step=self.update)


def _part(codec: Codec, name: str, option: str) -> nn.Module:
    """Find a part of the codec by name."""
    parts = dict(codec.named_children())
    if name not in parts:
        raise UserError(f"training.{option}: the codec has no part {name!r}; it has {', '.join(parts)}")
    return parts[name]


def _groups(module: nn.Module) -> list[dict[str, Any]]:
    """Split trainable parameters into those that decay and those that don't."""
    decayed = {
        id(child.weight)
        for child in module.modules()
        if isinstance(child, (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d))
    }
    trained = [p for p in module.parameters() if p.requires_grad]
    kept = [p for p in trained if id(p) not in decayed]
    return [{"params": [p for p in trained if id(p) in decayed]}, {"params": kept, "weight_decay": 0.0}]
