"""The objective: a weighted sum of named terms, and an adversarial term beside it."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from varitok import UserError

from .adversarial import Adversarial

__all__ = ["Objective"]


class Objective(nn.Module):
    """Sums weighted terms; a term's name is its name in the log and its key in the configuration.

    Args:
        terms: `{name: {"weight": float, "module": Module}}`, where a module compares `(fake, real, lengths)` to a
            scalar. Weight 0 means logged, not trained; None in place of a term removes it.
        adversarial: The adversarial term, or None.

    Raises:
        UserError: A term lacks its weight or its module.
    """

    def __init__(self, terms: Mapping[str, Mapping[str, Any] | None], adversarial: Adversarial | None = None) -> None:
        super().__init__()
        self.weights: dict[str, float] = {}
        self.terms = nn.ModuleDict()
        for name, term in terms.items():
            if term is None:
                continue
            if set(term) != {"weight", "module"}:
                raise UserError(f"objective.terms.{name}: expected `weight` and `module`, got {sorted(term)}")
            self.weights[name] = float(term["weight"])
            self.terms[name] = term["module"]
        self.adversarial = adversarial

    def forward(self, fake: Tensor, real: Tensor, lengths: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """Compare signals `(b, c, *grid)` in [-1, 1], of which the first `lengths` steps are valid.

        Returns:
            The weighted sum, and each term's value before its weight, detached.
        """
        total = fake.new_zeros(())
        values = {}
        for name, module in self.terms.items():
            weight = self.weights[name]
            value = module(fake if weight else fake.detach(), real, lengths)
            values[name] = value.detach()
            if weight:
                total = total + weight * value
        return total, values
