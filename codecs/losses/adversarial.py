"""Adversarial loss: a discriminator, its criterion and its schedule. The optimizers are the trainer's."""

from typing import Annotated, Any, Literal, TypeAlias

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel

from ..discriminators.contract import DiscriminatorOutput, Feature, valid_means, zero_padding
from ..distributed import mean_over_ranks
from ..masking import prefix_mask

__all__ = ["Adversarial"]

Kind: TypeAlias = Literal["hinge", "nonsaturating", "least_squares"]


class Adversarial(nn.Module):
    """Discriminator loss, and the codec's adversarial and feature-matching losses.

    With x the signal, y its reconstruction and D the logits:

        hinge          D: (relu(1 - D(x)) + relu(1 + D(y))) / 2      codec: -D(y)             (arXiv 1705.02894)
        nonsaturating  D: (softplus(-D(x)) + softplus(D(y))) / 2     codec: softplus(-D(y))   (arXiv 1406.2661, sec. 3)
        least_squares  D: ((D(x) - 1)^2 + D(y)^2) / 2                codec: (D(y) - 1)^2      (arXiv 1611.04076)
        features       codec: mean |F(y) - F(x)|, of each layer F of D
        LeCam          D: + lecam * (relu(D(x) - EMA(D(y)))^2 + relu(EMA(D(x)) - D(y))^2)
        R1             D: + r1 / 2 * |dD/dx|^2                                           (arXiv 1801.04406, equation 9)

    The discriminator trains alone for `head_start` updates; then the codec's loss weights ramp up linearly over `ramp`
    updates. (Full weight from the first update on ruins the reconstructions: taming-transformers issue 44.)

    Logits are averaged over each sample's valid positions, then over the batch, then over discriminators.

    Args:
        discriminator: Maps signals `(b, c, *grid)` and lengths `(b,)` to a list of `DiscriminatorOutput`.
        kind: Criterion: "hinge", "nonsaturating" or "least_squares".
        codec_kind: The codec's criterion, if another (Open-MAGVIT2: nonsaturating beside a hinge); None for `kind`.
        weight: Full weight of the codec's adversarial loss.
        features: Full weight of feature matching; 0 turns it off.
        relative: Whether each layer's difference is divided by the mean of |F(x)|, sample by sample (EnCodec, arXiv
            2210.13438, equation 3).
        reduction: Reduction of the codec's losses over discriminators and layers: "mean" (EnCodec) or "sum" (DAC,
            arXiv 2306.06546).
        start: Update at which the discriminator starts training.
        head_start: Number of updates between `start` and the first with the codec's losses.
        ramp: Number of updates of the linear ramp to the full weights.
        every: Interval between the discriminator's training steps, in updates.
        shared: Whether both losses share one forward pass of the discriminator. The codec's loss then uses the
            discriminator before its step of this update, so this step must follow the codec's backward pass. Faster,
            but holds the activations of both losses at once.
        peak: Peak to which waveforms are scaled before the discriminator, after their mean is subtracted (0.8 in
            DAC's code); None leaves signals unchanged.
        lecam: Weight of LeCam regularization (arXiv 2104.03310, equation 5); 0 turns it off.
        lecam_decay: Decay of LeCam's EMA of the logits; checkpoints include it.
        r1: Weight of the R1 penalty on the gradient at real signals; 0 turns it off.
        r1_every: Interval between penalized steps of the discriminator; these have `r1_every` times the weight ("lazy",
            StyleGAN2, arXiv 1912.04958, section 3.1).
        adaptive: Largest factor by which the codec's adversarial loss is scaled to the gradient of its other terms, see
            `adapt` (1e4 in VQGAN's code); None leaves its weight fixed.
    """

    real_average: Tensor
    fake_average: Tensor

    def __init__(
        self,
        discriminator: nn.Module,
        *,
        kind: Kind = "hinge",
        codec_kind: Kind | None = None,
        weight: float = 0.1,
        features: float = 0.0,
        relative: bool = False,
        reduction: Literal["mean", "sum"] = "mean",
        start: Annotated[int, "[0, inf)"] = 0,
        head_start: Annotated[int, "[0, inf)"] = 0,
        ramp: Annotated[int, "[0, inf)"] = 0,
        every: int = 1,
        shared: bool = False,
        peak: Annotated[float | None, "(0, inf)", "null keeps the level"] = None,
        lecam: float = 0.0,
        lecam_decay: Annotated[float, "[0, 1)"] = 0.999,
        r1: float = 0.0,
        r1_every: int = 16,
        adaptive: Annotated[float | None, "(0, inf)", "null fixes the weight"] = None,
    ) -> None:
        super().__init__()
        self.discriminator = discriminator
        self.kind: Kind = kind
        self.codec_kind: Kind = codec_kind or kind
        self.weights = {"adversarial": weight, "features": features}
        self.relative = relative
        self.reduction = reduction
        self.start = start
        self.head_start = head_start
        self.ramp = ramp
        self.every = every
        self.shared = shared
        # If shared, kept from the discriminator's loss to the codec's within an update.
        self.judged: tuple[Tensor, list[DiscriminatorOutput], list[DiscriminatorOutput]] | None = None
        self.peak = peak
        self.lecam = lecam
        self.lecam_decay = lecam_decay
        self.r1 = r1
        self.r1_every = r1_every
        self.adaptive = adaptive
        self.register_buffer("real_average", torch.zeros(()))
        self.register_buffer("fake_average", torch.zeros(()))

    def learns(self, update: int) -> bool:
        """Return whether the discriminator is trained at this update."""
        return update >= self.start and (update - self.start) % self.every == 0

    def loss_weights(self, update: int) -> dict[str, float]:
        """Return the nonzero weights of the codec's losses at this update, by name."""
        since = update - self.start - self.head_start
        share = min(1.0, max(0.0, (since + 1) / (self.ramp + 1)))
        return {name: share * weight for name, weight in self.weights.items() if share * weight}

    def discriminator_loss(
        self, fake: Tensor, real: Tensor, lengths: Tensor | None = None, update: int | None = None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Compute the discriminator's loss, and its mean logits (and the R1 penalty, if due) for the log.

        Args:
            fake: Reconstructions `(b, c, *grid)`; they are detached.
            real: Signals of the same shape.
            lengths: int64 `(b,)`, number of valid steps; None for all.
            update: Number of the update, for the schedule of R1; None leaves it out.
        """
        fake = fake.detach()
        if self.shared:
            # Two passes, so that the codec's backward pass runs through the fake one only.
            fake = fake.requires_grad_()
            on_fake, on_real = self._judge(fake, lengths), self._judge(real, lengths)
            self.judged = fake, on_fake, on_real
        else:
            # One pass over both: half the kernel launches, and the same batch statistics for both.
            twice = None if lengths is None else lengths.repeat(2)
            pairs = [judgment.split() for judgment in self._judge(torch.cat([real, fake]), twice)]
            on_real, on_fake = [real for real, _ in pairs], [fake for _, fake in pairs]
        losses = [_criterion(self.kind, judgment, 1.0) for judgment in on_real]
        losses += [_criterion(self.kind, judgment, -1.0) for judgment in on_fake]
        loss = _mean(losses)
        with torch.no_grad():
            sides = {"real": on_real, "fake": on_fake}
            means = {name: _mean([_average(one.logits, one.valid) for one in side]) for name, side in sides.items()}
        if self.lecam:
            self._follow(means["real"], means["fake"])
            above = [_average(functional.relu(one.logits - self.fake_average).square(), one.valid) for one in on_real]
            below = [_average(functional.relu(self.real_average - one.logits).square(), one.valid) for one in on_fake]
            loss = loss + self.lecam * (_mean(above) + _mean(below))
        if self.r1 and update is not None and (update - self.start) // self.every % self.r1_every == 0:
            means["r1"] = penalty = self._penalize_gradient(real, lengths)
            loss = loss + self.r1_every * self.r1 / 2 * penalty
        return loss, means

    def codec_losses(self, fake: Tensor, real: Tensor, lengths: Tensor | None = None) -> dict[str, Tensor]:
        """Compute the codec's losses before their weights, with gradient at the reconstruction `fake`.

        Feature matching is included if its weight isn't 0. Both losses share one pass over the reconstruction.
        """
        judged, self.judged = self.judged, None
        # If the discriminator isn't trained at this update, there are no outputs to reuse.
        if judged is not None and judged[0].data_ptr() == fake.data_ptr():
            leaf, on_fake, on_real = judged
            losses = self._compute_codec_losses(on_fake, on_real)
            return dict(zip(losses, _Bridge.apply(fake, (leaf, *losses.values())), strict=True))
        # The codec's losses need no gradient of the discriminator's parameters.
        self.discriminator.requires_grad_(False)
        on_real = []
        if self.weights["features"]:
            with torch.no_grad():
                on_real = self._judge(real, lengths)
        losses = self._compute_codec_losses(self._judge(fake, lengths), on_real)
        self.discriminator.requires_grad_(True)
        return losses

    def adapt(self, terms: Tensor, adversarial: Tensor, weight: Tensor) -> Tensor:
        """Compute the factor that scales the adversarial loss to the gradient of the other terms, a detached scalar.

            factor = min(|d terms / d w| / (|d adversarial / d w| + 1e-6), adaptive)    (VQGAN, arXiv 2012.09841, eq. 7)

        The gradients are those of the global batch, so that all processes compute the same factor.

        Args:
            terms: Weighted sum of the other terms of the reconstruction, a scalar.
            adversarial: The codec's adversarial loss, a scalar.
            weight: w, the weight of the decoder's last layer.
        """
        assert self.adaptive is not None
        with torch.autocast(weight.device.type, enabled=False):
            own = [torch.autograd.grad(loss, weight, retain_graph=True)[0] for loss in (terms, adversarial)]
        wanted, found = mean_over_ranks(torch.stack(own).float()).flatten(1).norm(dim=1)
        factor: Tensor = wanted / (found + 1e-6)
        return factor.clamp(max=self.adaptive)

    def _penalize_gradient(self, real: Tensor, lengths: Tensor | None) -> Tensor:
        """Return the mean squared norm of the gradient of each signal's mean logit at the signal."""
        # Fused attention has no second derivative.
        with torch.autocast(real.device.type, enabled=False), sdpa_kernel(SDPBackend.MATH):
            real = real.detach().requires_grad_()
            logits = [valid_means(one.logits, one.valid) for one in self._judge(real, lengths)]
            (gradient,) = torch.autograd.grad(_mean(logits) * len(real), real, create_graph=True)
        return gradient.square().flatten(1).sum(1).mean()

    def _compute_codec_losses(
        self, fake: list[DiscriminatorOutput], real: list[DiscriminatorOutput]
    ) -> dict[str, Tensor]:
        """Compute the codec's losses, whose target for fake logits is real."""
        hinge, kind = self.codec_kind == "hinge", self.codec_kind
        terms = [-_average(one.logits, one.valid) if hinge else _criterion(kind, one, 1.0) for one in fake]
        losses = {"adversarial": self._reduce(terms)}
        if self.weights["features"]:
            pairs = zip(
                [f for one in fake for f in one.features], [f for one in real for f in one.features], strict=True
            )
            losses["features"] = self._reduce([self._difference(*pair) for pair in pairs])
        return losses

    def _judge(self, signal: Tensor, lengths: Tensor | None) -> list[DiscriminatorOutput]:
        judged: list[DiscriminatorOutput] = self.discriminator(_normalize_peak(signal, lengths, self.peak), lengths)
        return judged

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
                # Logits that aren't finite leave the average unchanged.
                average.lerp_(torch.where(value.isfinite(), value, average), 1 - self.lecam_decay)


def _criterion(kind: Kind, judgment: DiscriminatorOutput, side: float) -> Tensor:
    """Compute a discriminator's loss for the target `side`, 1 (real) or -1 (fake)."""
    logits, valid, _ = judgment
    if kind == "hinge":
        return _average(functional.relu(1 - side * logits), valid)
    if kind == "least_squares":
        return _average((logits - (side + 1) / 2).square(), valid)
    return _average(functional.softplus(-side * logits), valid)


def _average(values: Tensor, valid: Tensor | None) -> Tensor:
    """Average `(b, ...)` over each sample's valid positions, then over the batch."""
    return valid_means(values, valid).mean()


class _Bridge(torch.autograd.Function):
    """Routes the gradient of losses computed from `leaf`, a detached alias of `fake`, to `fake`.

    The backward pass computes the gradient at the leaf only. The discriminator's parameters get none from it: their
    gradient is that of the discriminator's loss.
    """

    @staticmethod
    def forward(ctx: Any, fake: Tensor, made: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        # Autograd doesn't track tensors in a tuple, so it won't backpropagate through the discriminator a second time.
        ctx.leaf, *ctx.losses = made
        ctx.set_materialize_grads(False)
        return tuple(loss.detach().clone() for loss in ctx.losses)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor, None]:
        pairs = [(loss, given) for loss, given in zip(ctx.losses, gradients, strict=True) if given is not None]
        losses, given = zip(*pairs, strict=True)
        # The balancer runs a backward pass for each loss.
        (gradient,) = torch.autograd.grad(losses, ctx.leaf, given, retain_graph=True)
        return gradient, None


def _mean(losses: list[Tensor]) -> Tensor:
    return torch.stack(losses).mean()


def _normalize_peak(signal: Tensor, lengths: Tensor | None, peak: float | None) -> Tensor:
    """Subtract each channel's mean over the valid samples of `(b, c, t)` and scale each waveform to a peak."""
    if peak is None:
        return signal
    signal = zero_padding(signal, lengths)
    count = signal.shape[2] if lengths is None else lengths.clamp(min=1)[:, None, None]
    signal = signal - signal.sum(2, keepdim=True) / count
    if lengths is not None:
        signal = signal * prefix_mask(lengths, signal.shape[2])[:, None]
    return signal * (peak / (signal.abs().amax((1, 2), keepdim=True) + 1e-9))
