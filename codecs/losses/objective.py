"""The objective: a weighted sum of named terms, and an adversarial term beside it."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from varitok import UserError

from .adversarial import Adversarial
from .balancer import Balancer

__all__ = ["Objective"]


class Objective(nn.Module):
    """Sums weighted terms; a term's name is its name in the log and its key in the configuration.

    Args:
        terms: `{name: {"weight": float, "module": Module}}`, where a module compares `(fake, real, lengths)` to a
            scalar. Weight 0 means logged, not trained; None in place of a term removes it.
        adversarial: The adversarial term, or None. Its losses are named "adversarial" and "features".
        balancer: Makes weights shares of the gradient; None sums the terms.

    Raises:
        UserError: A term lacks its weight or its module, or has one of the adversarial term's names.
    """

    def __init__(
        self,
        terms: Mapping[str, Mapping[str, Any] | None],
        adversarial: Adversarial | None = None,
        balancer: Balancer | None = None,
    ) -> None:
        super().__init__()
        self.weights: dict[str, float] = {}
        self.terms = nn.ModuleDict()
        for name, term in terms.items():
            if term is None:
                continue
            if set(term) != {"weight", "module"}:
                raise UserError(f"objective.terms.{name}: expected `weight` and `module`, got {sorted(term)}")
            if adversarial and name in adversarial.weights:
                raise UserError(f"objective.terms.{name}: the adversarial term has a loss of this name")
            self.weights[name] = float(term["weight"])
            self.terms[name] = term["module"]
        self.adversarial = adversarial
        self.balancer = balancer
        if balancer:
            balancer.follow([*self.weights, *(adversarial.weights if adversarial else ())])

    def forward(
        self, fake: Tensor, real: Tensor, lengths: Tensor | None, update: int | None = None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Compare signals `(b, c, *grid)` in [-1, 1], of which the first `lengths` steps are valid.

        Args:
            fake: The reconstruction.
            real: The signal.
            lengths: int64 `(b,)`; None for all, which spares the discriminator its masks.
            update: Number of the update, which decides how much of the discriminator is heard; None leaves it out.

        Returns:
            The weighted sum, or what the balancer makes of it, and each term's value before its weight, detached.
        """
        weights = {name: weight for name, weight in self.weights.items() if weight}
        values = {}
        valid = torch.full((len(real),), real.shape[2], device=real.device) if lengths is None else lengths
        for name, term in self.terms.items():
            values[name] = term(fake if name in weights else fake.detach(), real, valid)
        heard = self.adversarial.heard(update) if self.adversarial and update is not None else {}
        if self.adversarial and heard:
            values |= self.adversarial.codec_losses(fake, real, lengths)
            weights |= heard
        trained = {name: values[name] for name in values if name in weights}
        if self.balancer and trained:
            total = self.balancer(trained, weights, fake)
        else:
            total = fake.new_zeros(())
            for name, value in trained.items():
                total = total + weights[name] * value
        return total, {name: value.detach() for name, value in values.items()}
