"""The adversarial term: a discriminator, its criteria and its timetable. It owns no optimizer."""

from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

from varitok import UserError

from ..discriminators.contract import DiscriminatorOutput, Feature, valid_means, zero_padding
from ..distributed import mean_over_ranks
from ..masking import prefix_mask

__all__ = ["Adversarial"]


class Adversarial(nn.Module):
    """The discriminator's loss, and the codec's adversarial and feature-matching losses.

    Training begins at update `start`; for `head_start` updates the discriminator learns alone, then its word to the
    codec grows over `ramp` updates to the full weight. (A discriminator that is heard from its first step on wrecks
    the reconstructions: taming-transformers issue 44.)

    Of several judgments the mean is taken, and of every judgment the mean over each sample's valid logits, then over
    the batch.

    Args:
        discriminator: Signals `(b, c, *grid)` and lengths `(b,)` to a list of judgments.
        kind: "hinge" (arXiv 1705.02894), "nonsaturating" (arXiv 1406.2661, section 3) or "least_squares" (arXiv
            1611.04076).
        weight: Full weight of the codec's adversarial loss.
        features: Full weight of feature matching, the mean absolute difference of the discriminator's activations on
            the real and on the reconstructed signal; 0 is off.
        relative: Whether that difference is divided by the mean magnitude on the real signal (EnCodec, arXiv
            2210.13438, equation 3), layer by layer and sample by sample.
        reduction: Whether the codec's losses are the "mean" over judgments and layers (EnCodec) or the "sum" over
            both (DAC, arXiv 2306.06546).
        start: Update at which the discriminator begins to learn.
        head_start: Updates that it learns alone.
        ramp: Updates over which the codec's weight then grows to `weight`.
        every: Updates between two of the discriminator.
        shared: Judge both sides once for both turns: the codec then hears the discriminator as it was before this
            update's step, which must come after the codec's backward pass. Saves time and takes the memory of both
            turns at once.
        peak: Sounds lose their mean and get this peak before they are judged (DAC's code has 0.8); None leaves them.
        lecam: Weight of the LeCam regularization (arXiv 2104.03310, equation 5); 0 is off.
        lecam_decay: Decay of its moving averages, which are buffers and survive a resume.

    Raises:
        UserError: `every` is below 1.
    """

    real_average: Tensor
    fake_average: Tensor

    def __init__(
        self,
        discriminator: nn.Module,
        *,
        kind: Literal["hinge", "nonsaturating", "least_squares"] = "hinge",
        weight: float = 0.1,
        features: float = 0.0,
        relative: bool = False,
        reduction: Literal["mean", "sum"] = "mean",
        start: int = 0,
        head_start: int = 0,
        ramp: int = 0,
        every: int = 1,
        shared: bool = False,
        peak: float | None = None,
        lecam: float = 0.0,
        lecam_decay: float = 0.999,
    ) -> None:
        super().__init__()
        if every < 1:
            raise UserError(f"objective.adversarial.every={every} should be 1 or more")
        self.discriminator = discriminator
        self.kind = kind
        self.weights = {"adversarial": weight, "features": features}
        self.relative = relative
        self.reduction = reduction
        self.start = start
        self.head_start = head_start
        self.ramp = ramp
        self.every = every
        self.shared = shared
        self.judged: tuple[Tensor, list[DiscriminatorOutput], list[DiscriminatorOutput]] | None = (
            None  # between the turns of an update
        )
        self.peak = peak
        self.lecam = lecam
        self.lecam_decay = lecam_decay
        self.register_buffer("real_average", torch.zeros(()))
        self.register_buffer("fake_average", torch.zeros(()))

    def learns(self, update: int) -> bool:
        """Return whether the discriminator trains at this update."""
        return update >= self.start and (update - self.start) % self.every == 0

    def loss_weights(self, update: int) -> dict[str, float]:
        """Return the weights of the codec's losses at this update, by name; absent ones need not be computed."""
        since = update - self.start - self.head_start
        share = min(1.0, max(0.0, (since + 1) / (self.ramp + 1)))
        return {name: share * weight for name, weight in self.weights.items() if share * weight}

    def discriminator_loss(
        self, fake: Tensor, real: Tensor, lengths: Tensor | None = None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Compute the discriminator's loss on signals `(b, c, *grid)`, detached, and its mean logits for the log.

        The first `lengths` steps are valid, None for all.
        """
        fake = fake.detach()
        if self.shared:
            # Two passes: the codec's gradient goes back through that of its own side only.
            fake = fake.requires_grad_()
            on_fake, on_real = self._judge(fake, lengths), self._judge(real, lengths)
            self.judged = fake, on_fake, on_real
        else:
            # One pass over both: half the launches, and the same statistics for both sides.
            twice = None if lengths is None else lengths.repeat(2)
            pairs = [judgment.split() for judgment in self._judge(torch.cat([real, fake]), twice)]
            on_real, on_fake = [real for real, _ in pairs], [fake for _, fake in pairs]
        losses = [self._compute_discriminator_loss(judgment, 1.0) for judgment in on_real]
        losses += [self._compute_discriminator_loss(judgment, -1.0) for judgment in on_fake]
        loss = _mean(losses)
        with torch.no_grad():
            sides = {"real": on_real, "fake": on_fake}
            means = {name: _mean([_logits(one.logits, one.valid) for one in side]) for name, side in sides.items()}
        if self.lecam:
            self._follow(means["real"], means["fake"])
            above = [_logits(functional.relu(one.logits - self.fake_average).square(), one.valid) for one in on_real]
            below = [_logits(functional.relu(self.real_average - one.logits).square(), one.valid) for one in on_fake]
            loss = loss + self.lecam * (_mean(above) + _mean(below))
        return loss, means

    def codec_losses(self, fake: Tensor, real: Tensor, lengths: Tensor | None = None) -> dict[str, Tensor]:
        """Compute the codec's losses, unweighted, on a reconstruction with gradient.

        Feature matching is among them if it has a weight; both share one pass over the reconstruction.
        """
        judged, self.judged = self.judged, None
        # A reconstruction that the discriminator's turn has not seen, because it did not learn, is judged anew.
        if judged is not None and judged[0].data_ptr() == fake.data_ptr():
            leaf, on_fake, on_real = judged
            losses = self._compute_codec_losses(on_fake, on_real)
            return dict(zip(losses, _Bridge.apply(fake, (leaf, *losses.values())), strict=True))
        # Its own parameters need no gradient in the codec's turn.
        self.discriminator.requires_grad_(False)
        on_real = []
        if self.weights["features"]:
            with torch.no_grad():
                on_real = self._judge(real, lengths)
        losses = self._compute_codec_losses(self._judge(fake, lengths), on_real)
        self.discriminator.requires_grad_(True)
        return losses

    def _compute_codec_losses(
        self, fake: list[DiscriminatorOutput], real: list[DiscriminatorOutput]
    ) -> dict[str, Tensor]:
        """Compute the codec's losses: the discriminator should have answered real."""
        hinge = self.kind == "hinge"
        said = [
            -_logits(one.logits, one.valid) if hinge else self._compute_discriminator_loss(one, 1.0) for one in fake
        ]
        losses = {"adversarial": self._reduce(said)}
        if self.weights["features"]:
            pairs = zip(
                [f for one in fake for f in one.features], [f for one in real for f in one.features], strict=True
            )
            losses["features"] = self._reduce([self._difference(*pair) for pair in pairs])
        return losses

    def _judge(self, signal: Tensor, lengths: Tensor | None) -> list[DiscriminatorOutput]:
        judged: list[DiscriminatorOutput] = self.discriminator(_normalize_logits(signal, lengths, self.peak), lengths)
        return judged

    def _compute_discriminator_loss(self, judgment: DiscriminatorOutput, side: float) -> Tensor:
        """Compute the discriminator's loss for the target `side`: 1 for real, -1 for fake."""
        logits, valid, _ = judgment
        if self.kind == "hinge":
            return _logits(functional.relu(1 - side * logits), valid)
        if self.kind == "least_squares":
            return _logits((logits - (side + 1) / 2).square(), valid)
        return _logits(functional.softplus(-side * logits), valid)

    def _difference(self, fake: Feature, real: Feature) -> Tensor:
        wanted = real.values.detach()
        away = valid_means((fake.values - wanted).abs(), fake.valid)
        if self.relative:
            away = away / valid_means(wanted.abs(), real.valid).clamp(min=1e-6)
        return away.mean()

    def _reduce(self, losses: list[Tensor]) -> Tensor:
        return _mean(losses) if self.reduction == "mean" else torch.stack(losses).sum()

    def _follow(self, real: Tensor, fake: Tensor) -> None:
        with torch.no_grad():
            means = mean_over_ranks(torch.stack([real, fake]).float())
            for average, value in zip((self.real_average, self.fake_average), means, strict=True):
                # Of logits that are not finite nothing is left.
                average.lerp_(torch.where(value.isfinite(), value, average), 1 - self.lecam_decay)


def _logits(values: Tensor, valid: Tensor | None) -> Tensor:
    """Average `(b, ...)` over each sample's valid logits, then over the batch."""
    return valid_means(values, valid).mean()


class _Bridge(torch.autograd.Function):
    """Gives losses made from `leaf`, a copy of `fake` without history, their gradient at `fake`.

    It goes back to the leaf only: the discriminator's parameters, on the way, have their own gradients already.
    """

    @staticmethod
    def forward(ctx: Any, fake: Tensor, made: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        # In a tuple, autograd doesn't see them, and won't go back through the discriminator a second time.
        ctx.leaf, *ctx.losses = made
        ctx.set_materialize_grads(False)
        return tuple(loss.detach().clone() for loss in ctx.losses)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor, None]:
        pairs = [(loss, given) for loss, given in zip(ctx.losses, gradients, strict=True) if given is not None]
        losses, given = zip(*pairs, strict=True)
        # The balancer comes once for each loss.
        (gradient,) = torch.autograd.grad(losses, ctx.leaf, given, retain_graph=True)
        return gradient, None


def _mean(losses: list[Tensor]) -> Tensor:
    return torch.stack(losses).mean()


def _normalize_logits(signal: Tensor, lengths: Tensor | None, peak: float | None) -> Tensor:
    """Take the mean of each channel away and scale a sample's valid part to the peak."""
    if peak is None:
        return signal
    signal = zero_padding(signal, lengths)
    count = signal.shape[2] if lengths is None else lengths.clamp(min=1)[:, None, None]
    signal = signal - signal.sum(2, keepdim=True) / count
    if lengths is not None:
        signal = signal * prefix_mask(lengths, signal.shape[2])[:, None]
    return signal * (peak / (signal.abs().amax((1, 2), keepdim=True) + 1e-9))
