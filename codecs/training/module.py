"""The training module: one codec forward, the discriminator's turn, the codec's turn, the log."""

import math
from functools import cached_property
from typing import Any

import torch
from pytorch_lightning.utilities.types import STEP_OUTPUT
from torch import Tensor, nn

from varitok import UserError
from varitok.data.batch import Batch, normalize

from ..codec import Codec
from ..distributed import world_size
from ..lengths.policy import BatchShard, SampledLengths
from ..losses.contract import Guidance
from ..losses.feature_hooks import capture
from ..losses.objective import Objective
from ..result import Reconstruction
from .base import MakeOptimizer, Readable, Training
from .codebook_health import CodebookHealth
from .distributed.strategy import Sharded

__all__ = ["CodecTraining"]


class CodecTraining(Training):
    """Trains a codec, with or without a discriminator.

    Args:
        codec: What is trained.
        objective: What it is trained for.
        optimizer: Makes the codec's optimizer from parameter groups.
        discriminator_optimizer: Makes the discriminator's; needed where the objective has one.
        options: See `Training`. The second of two stages freezes "encoder", "project_in" and "bottleneck" (TiTok, arXiv
            2406.07550, section 3.3); the seed is of kept lengths, and of noise in the bottleneck.

    Raises:
        UserError: A part is named that the codec doesn't have, or the discriminator's optimizer is missing.
    """

    codec: Codec

    def __init__(
        self,
        codec: Codec,
        objective: Objective,
        optimizer: MakeOptimizer,
        discriminator_optimizer: MakeOptimizer | None = None,
        **options: Any,
    ) -> None:
        super().__init__("codec", codec, optimizer, **options)
        self.objective = objective
        objective.attend(codec)
        if objective.adversarial:
            if discriminator_optimizer is None:
                raise UserError("optim.discriminator is missing: the objective has an adversarial term")
            self.make_optimizers.append(discriminator_optimizer)
        self.health = CodebookHealth(codec.bottleneck)
        codec.bottleneck.register_forward_pre_hook(self.guard.clean)

    @property
    def evaluated(self) -> Codec:
        """The codec to evaluate and to export: the averaged one if there is one; of shards, a complete copy.

        Every process must ask for it.
        """
        found: Codec = self.average.codec if self.average else self.codec  # type: ignore[assignment]
        strategy = self._trainer and self._trainer.strategy
        return strategy.assemble(found) if isinstance(strategy, Sharded) else found  # type: ignore[return-value]

    @cached_property  # one object: it is what a reducer is for, and isn't registered a second time
    def learning(self) -> nn.Module:
        """The codec, and what of the terms learns with it."""
        return nn.ModuleList([self.codec, self.objective.terms])

    def parts(self) -> list[nn.Module]:
        """List the codec, and the discriminator if there is one."""
        return [*super().parts(), *([self.objective.adversarial] if self.objective.adversarial else [])]

    def training_step(self, batch: Batch, batch_idx: int) -> STEP_OUTPUT:
        """Train on one batch."""
        real = normalize(batch.signal)
        # A mask that hides nothing costs convolutions a tenth of their time.
        lengths = None if batch.whole else batch.lengths
        with self.recompute, capture(self.codec, self.objective.taps, real, lengths) as inside:
            result = self.reconstruct(batch, real)
        due = self.begin_batch()
        factor = self.factor(self.update)
        adversarial = self.objective.adversarial
        values: dict[str, Tensor] = {}
        judged = adversarial is not None and adversarial.learns(self.update)
        shared = adversarial is not None and adversarial.shared
        if adversarial and judged:
            loss, means = adversarial.discriminator_loss(result.signal, real, lengths)
            values |= {"discriminator/loss": loss} | {f"discriminator/{name}": mean for name, mean in means.items()}
            self.learn(adversarial, loss, retain_graph=shared)
        if judged and due and not shared:
            values["discriminator/grad_norm"] = self.step_discriminator(factor)
        guidance = self.objective.guidance(real, lengths, inside, batch.features, batch.captions)
        loss, terms = self.codec_loss(result, real, lengths, guidance)
        self.guard.see(loss)
        values |= terms
        if loss.requires_grad:  # a codec in which nothing learns (dMel) is measured only
            self.learn(self.learning, loss)
        if judged and due and shared:
            # The codec has heard it as it was: a step in between would change what the gradient goes back through.
            values["discriminator/grad_norm"] = self.step_discriminator(factor)
        if due:
            values["grad_norm"] = self.end_update(factor)
        self.log_values(values, factor)
        return None

    def reconstruct(self, batch: Batch, real: Tensor) -> Reconstruction:
        """Send a batch through the codec, with as much of its codes as is drawn, whose health is taken."""
        kept = self.draw(batch)
        if self.codec.perturbation is not None:
            self.codec.perturbation.progress = self.update / self.total
        unmasked = batch.whole and not self.codec.layout.ordered  # placed tokens are all there
        result: Reconstruction = self.codec(real, None if unmasked else kept.lengths, kept.n_codebooks)
        positions = batch.lengths.sum() * math.prod(real.shape[3:])
        self.health.add(result.quantized.codes, kept.lengths, kept.n_codebooks, positions)
        return result

    def codec_loss(
        self, result: Reconstruction, real: Tensor, lengths: Tensor | None, guidance: Guidance
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Sum the objective's terms, the bottleneck's penalties and the discriminator's word; name each for the log."""
        quantized = result.quantized
        loss, terms = self.objective(result.signal, real, lengths, self.update, guidance)
        loss = loss + sum(quantized.penalties.values())
        values = {f"loss/{name}": value for name, value in terms.items()}
        values |= {f"bottleneck/{name}": value for name, value in (quantized.penalties | quantized.metrics).items()}
        return loss, values | {"loss": loss}

    def step_discriminator(self, factor: float) -> Tensor:
        """Step the raw optimizer: stepping Lightning's wrapper would count a second global step."""
        assert self.objective.adversarial is not None
        norm = self.clip_norm(self.objective.adversarial)
        self.step(self.trainer.optimizers[1], factor, bool(norm.isfinite()))
        return norm

    def draw(self, batch: Batch) -> SampledLengths:
        """Draw what a batch keeps; all chance of a batch is the same for the same run, process and batch."""
        size = batch.signal.shape[2:]
        layout = self.codec.layout
        blocks = layout.blocks(size)
        torch.manual_seed(hash((self.seed, self.global_rank, self.batch)) & (2**63 - 1))  # of noise in bottlenecks
        kept = self.codec.length.sample(
            len(batch.signal) * blocks,
            layout.count(size),
            self.codec.num_codebooks,
            seed=(self.seed, self.batch),
            dealt=BatchShard(self.global_rank, world_size(), blocks),
            progress=self.update / self.total,
        )
        lengths, n_codebooks = (axis.to(self.device, non_blocking=True) for axis in kept)
        return SampledLengths(torch.minimum(lengths, layout.valid(batch.lengths, size)), n_codebooks)

    def after_step(self) -> None:
        """Let the bottleneck learn what it doesn't learn by gradient."""
        self.codec.bottleneck.update()

    def after_refusal(self) -> None:
        """Let the bottleneck forget what it gathered."""
        self.codec.bottleneck.discard()

    def reading(self) -> dict[str, float]:
        """Return the codebooks' health."""
        return self.health.read()

    def read_parts(self) -> dict[str, Readable]:
        """Name what collects numbers between two readings of the log."""
        return super().read_parts() | {"health": self.health}
