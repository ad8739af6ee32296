"""The adversarial term: a discriminator, its criteria and its timetable. It owns no optimizer."""

from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

from ..processes import mean_over_processes

__all__ = ["Adversarial"]


class Adversarial(nn.Module):
    """A discriminator's loss and what the codec is told by it.

    Training begins at update `start`; for `head_start` updates the discriminator learns alone, then its word to the
    codec grows over `ramp` updates to the full weight. (A discriminator that is heard from its first step on wrecks
    the reconstructions: taming-transformers issue 44.)

    Args:
        discriminator: Signals `(b, c, *grid)` to logits of any shape; large means real.
        kind: "hinge" (arXiv 1705.02894) or "nonsaturating" (arXiv 1406.2661, section 3).
        weight: Full weight of the codec's adversarial loss.
        start: Update at which the discriminator begins to learn.
        head_start: Updates that it learns before the codec hears it.
        ramp: Updates over which the codec's weight grows to `weight`.
        lecam: Weight of the LeCam regularization (arXiv 2104.03310, equation 5); 0 is off.
        lecam_decay: Decay of its moving averages, which are buffers and survive a resume.
    """

    real_average: Tensor
    fake_average: Tensor

    def __init__(
        self,
        discriminator: nn.Module,
        *,
        kind: Literal["hinge", "nonsaturating"] = "hinge",
        weight: float = 0.1,
        start: int = 0,
        head_start: int = 0,
        ramp: int = 0,
        lecam: float = 0.0,
        lecam_decay: float = 0.999,
    ) -> None:
        super().__init__()
        self.discriminator = discriminator
        self.kind = kind
        self.weight = weight
        self.start = start
        self.head_start = head_start
        self.ramp = ramp
        self.lecam = lecam
        self.lecam_decay = lecam_decay
        self.register_buffer("real_average", torch.zeros(()))
        self.register_buffer("fake_average", torch.zeros(()))

    def learns(self, update: int) -> bool:
        """Tell whether the discriminator trains at this update."""
        return update >= self.start

    def heard(self, update: int) -> float:
        """Give the weight of the codec's adversarial loss at this update; 0 means that it need not be computed."""
        since = update - self.start - self.head_start
        if since < 0:
            return 0.0
        return self.weight * min(1.0, (since + 1) / (self.ramp + 1))

    def discriminator_loss(self, fake: Tensor, real: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """Give the discriminator's loss on detached signals `(b, c, *grid)`, and its logits' means to be logged."""
        # One pass over both: half the launches, and the same statistics for both sides.
        logits = self.discriminator(torch.cat([real, fake.detach()]))
        on_real, on_fake = logits.chunk(2)
        if self.kind == "hinge":
            loss = (functional.relu(1 - on_real).mean() + functional.relu(1 + on_fake).mean()) / 2
        else:
            loss = (functional.softplus(-on_real).mean() + functional.softplus(on_fake).mean()) / 2
        means = {"real": on_real.detach().mean(), "fake": on_fake.detach().mean()}
        if self.lecam:
            self._follow(means["real"], means["fake"])
            gap = functional.relu(on_real - self.fake_average).square().mean()
            loss = loss + self.lecam * (gap + functional.relu(self.real_average - on_fake).square().mean())
        return loss, means

    def codec_loss(self, fake: Tensor) -> Tensor:
        """Give the codec's loss, without its weight, on a reconstruction with gradient."""
        logits = self.discriminator(fake)
        loss: Tensor = -logits.mean() if self.kind == "hinge" else functional.softplus(-logits).mean()
        return loss

    def _follow(self, real: Tensor, fake: Tensor) -> None:
        with torch.no_grad():
            means = mean_over_processes(torch.stack([real, fake]).float())
            for average, value in zip((self.real_average, self.fake_average), means, strict=True):
                average.lerp_(value, 1 - self.lecam_decay)
