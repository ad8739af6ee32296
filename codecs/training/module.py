"""The training module of a codec: forward pass, discriminator step, codec step, logging."""

import math
from functools import cached_property
from typing import Any

import torch
from pytorch_lightning.utilities.types import STEP_OUTPUT
from torch import Tensor, nn

from varitok import UserError
from varitok.data.batch import Batch, normalize

from ..bottlenecks.statistics import Gathering
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
from .guard import undone_unless

__all__ = ["CodecTraining"]


class CodecTraining(Training):
    """The training module of a codec, with or without a discriminator.

        loss = sum_i weight_i term_i + the bottleneck's and the decoder's own losses + adversarial terms

    Args:
        codec: Codec to train.
        objective: Weighted sum of losses, with the discriminator if there is one.
        optimizer: Builds the codec's optimizer from parameter groups.
        discriminator_optimizer: Builds the discriminator's; required if the objective has a discriminator.
        options: See `Training`. Two-stage training freezes "encoder", "project_in" and "bottleneck" in the second stage
            (TiTok, arXiv 2406.07550, section 3.3). The seed determines kept lengths and noise in the bottleneck.

    Raises:
        UserError: The codec has no submodule of a given name, or the discriminator's optimizer is missing.
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
        adversarial = objective.adversarial
        others = {
            "discriminator": [adversarial.discriminator] if adversarial else [],
            "losses": [*objective.terms.values()],
        }
        super().__init__("codec", codec, optimizer, others=others, **options)
        self.objective = objective
        objective.bind(codec)
        if objective.adversarial is not None:
            if discriminator_optimizer is None:
                raise UserError("optim.discriminator is missing: the objective has an adversarial term")
            if objective.adversarial.adaptive is not None and "decoder" in options.get("compile", ()):
                # Its gradient takes a backward pass of its own; a compiled graph allows a single one.
                raise UserError("training.compile: not the decoder with objective.adversarial.adaptive; give null")
            self.make_optimizers.append(discriminator_optimizer)
        self.health = CodebookHealth(codec.bottleneck)
        codec.bottleneck.register_forward_pre_hook(self.guard.clean)

    @property
    def evaluated(self) -> Codec:
        """The codec to evaluate and to export: its EMA if there is one; if sharded, a complete copy.

        Every process must read it.
        """
        self.settle()
        found: Codec = self.average.codec if self.average else self.codec  # type: ignore[assignment]
        strategy = self._trainer and self._trainer.strategy
        return strategy.assemble(found) if isinstance(strategy, Sharded) else found  # type: ignore[return-value]

    @cached_property  # one object, the key of its reducer; not registered as a submodule a second time
    def learning(self) -> nn.Module:
        """The codec, and the loss terms, since some have trainable parameters."""
        return nn.ModuleList([self.codec, self.objective.terms])

    def parts(self) -> list[nn.Module]:
        """List the codec, and the discriminator if there is one."""
        return [*super().parts(), *([self.objective.adversarial] if self.objective.adversarial else [])]

    def training_step(self, batch: Batch, batch_idx: int) -> STEP_OUTPUT:
        """Train on one batch."""
        real = normalize(batch.signal)
        # No mask if all steps are valid: masking would make convolutions a tenth slower.
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
            loss, means = adversarial.discriminator_loss(result.signal, real, lengths, self.update)
            values |= {"discriminator/loss": loss} | {f"discriminator/{name}": mean for name, mean in means.items()}
            self.learn(adversarial, loss, retain_graph=shared)
        if judged and due and not shared:
            values["discriminator/grad_norm"] = self.step_discriminator(factor)
        guidance = self.objective.guidance(real, lengths, inside, batch.features, batch.captions)
        loss, terms = self.codec_loss(result, real, lengths, guidance)
        self.guard.check(loss)
        values |= terms
        if loss.requires_grad:  # false for a codec without trainable parameters (dMel), which is only measured
            self.learn(self.learning, loss)
        if judged and due and shared:
            # Only now: stepping before the codec's backward pass would modify weights that its graph needs.
            values["discriminator/grad_norm"] = self.step_discriminator(factor)
        if due:
            values["grad_norm"] = self.end_update(factor)
        self.log_values(values, factor)
        return None

    def reconstruct(self, batch: Batch, real: Tensor) -> Reconstruction:
        """Run the codec at the sampled lengths, and count the codes for `CodebookHealth`."""
        kept = self.draw(batch)
        if self.codec.perturbation is not None:
            self.codec.perturbation.progress = self.update / self.total
        unmasked = batch.whole and not self.codec.layout.ordered  # placed tokens are all valid
        lengths = None if unmasked else kept.lengths
        result: Reconstruction = self.codec(real, lengths, kept.n_codebooks, kept.common)
        positions = batch.lengths.sum() * math.prod(real.shape[3:])
        self.health.add(result.quantized.codes, kept.lengths, kept.n_codebooks, positions)
        return result

    def codec_loss(
        self, result: Reconstruction, real: Tensor, lengths: Tensor | None, guidance: Guidance
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the sum of the objective's terms and the codec's own losses, and each one by its log name."""
        quantized = result.quantized
        loss, terms = self.objective(result.signal, real, lengths, self.update, guidance)
        loss = loss + sum(quantized.penalties.values()) + sum(result.penalties.values())
        values = {f"loss/{name}": value for name, value in (terms | result.penalties).items()}
        values |= {f"bottleneck/{name}": value for name, value in (quantized.penalties | quantized.metrics).items()}
        return loss, values | {"loss": loss}

    def step_discriminator(self, factor: float) -> Tensor:
        """Step the discriminator's raw optimizer: stepping Lightning's wrapper would increment `global_step` again."""
        assert self.objective.adversarial is not None
        with self.without_autocast():
            norm = self.clip_norm(self.objective.adversarial)
            finite = norm.isfinite()
            self.step(self.trainer.optimizers[1], factor, finite if self.late else bool(finite))
        return norm

    def draw(self, batch: Batch) -> SampledLengths:
        """Sample the batch's kept lengths, and seed the global generator by run, process and batch."""
        size = batch.signal.shape[2:]
        layout = self.codec.layout
        blocks = layout.blocks(size)
        torch.manual_seed(hash((self.seed, self.global_rank, self.batch)) & (2**63 - 1))  # for noise in bottlenecks
        kept = self.codec.length.sample(
            len(batch.signal) * blocks,
            layout.count(size),
            self.codec.num_codebooks,
            seed=(self.seed, self.batch),
            dealt=BatchShard(self.global_rank, world_size(), blocks),
            progress=self.update / self.total,
        )
        lengths, n_codebooks = (axis.to(self.device, non_blocking=True) for axis in kept[:2])
        lengths = torch.minimum(lengths, layout.valid(batch.lengths, size))
        return SampledLengths(lengths, n_codebooks, kept.common if batch.whole else None)

    def after_step(self, taken: bool | Tensor) -> None:
        """Update the bottleneck's gradient-free state, such as EMA codebooks, unless the step was refused."""
        bottleneck = self.codec.bottleneck
        if isinstance(taken, Tensor):
            moving = [module for module in bottleneck.modules() if isinstance(module, Gathering)]
            with undone_unless(taken, [buffer for module in moving for buffer in module.buffers()]):
                bottleneck.update()
        elif taken:
            bottleneck.update()
        else:
            bottleneck.discard()

    def reading(self) -> dict[str, float]:
        """Return the codebook health."""
        return self.health.read()

    def read_parts(self) -> dict[str, Readable]:
        """Map names to the collectors whose state a checkpoint saves."""
        return super().read_parts() | {"health": self.health}
