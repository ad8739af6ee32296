"""The objective: a weighted sum of named terms, and an adversarial term beside it."""

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn

from varitok import UserError
from varitok.data.feature_map import FeatureMap
from varitok.data.teachers.base import Teacher

from ..codec import Codec
from ..unregistered import FrozenModules
from .adversarial import Adversarial
from .balancer import Balancer
from .contract import Guidance, LossTerm
from .feature_hooks import Tap

__all__ = ["Objective"]


class Objective(nn.Module):
    """Sums weighted terms; a term's name is its name in the log and its key in the configuration.

    Args:
        terms: `{name: {"weight": float, "module": LossTerm}}`. Weight 0 means logged, not trained; None in place of
            a term removes it.
        adversarial: The adversarial term, or None. Its losses are named "adversarial" and "features".
        balancer: Makes weights shares of the gradient; None sums the terms. Terms that look into the codec, not at its
            reconstruction, are added as they are.
        teachers: Frozen networks that guide terms, by name.

    Raises:
        UserError: A term lacks its weight or its module, is none, has one of the adversarial term's names, or a
            teacher that isn't there.
    """

    def __init__(
        self,
        terms: Mapping[str, Mapping[str, Any] | None],
        adversarial: Adversarial | None = None,
        balancer: Balancer | None = None,
        teachers: Mapping[str, Teacher] | None = None,
    ) -> None:
        super().__init__()
        self.teachers = FrozenModules(teachers or {})
        self.weights: dict[str, float] = {}
        self._terms: dict[str, LossTerm] = {}
        for name, term in terms.items():
            if term is None:
                continue
            if set(term) != {"weight", "module"}:
                raise UserError(f"objective.terms.{name}: expected `weight` and `module`, got {sorted(term)}")
            if adversarial and name in adversarial.weights:
                raise UserError(f"objective.terms.{name}: the adversarial term has a loss of this name")
            self.weights[name] = float(term["weight"])
            self._terms[name] = module = term["module"]
            if not isinstance(module, LossTerm):
                raise UserError(f"objective.terms.{name}: {type(module).__name__} is no loss term")
            if module.teacher is not None and module.teacher not in self.teachers.networks:
                known = ", ".join(self.teachers.networks) or "none"
                raise UserError(f"objective.terms.{name}: objective.teachers has no {module.teacher!r}; it has {known}")
        self.terms = nn.ModuleDict(self._terms)
        self.adversarial = adversarial
        self.balancer = balancer
        # Other terms have no gradient at the reconstruction, which the balancer divides by.
        self.beside = {name for name, term in self._terms.items() if term.at is not None}
        if balancer:
            balancer.follow(
                [
                    *(name for name in self.weights if name not in self.beside),
                    *(adversarial.weights if adversarial else ()),
                ]
            )

    def attend(self, codec: Codec) -> None:
        """Let terms that look into the codec make what they need for that.

        Raises:
            UserError: There is no such place in the codec.
        """
        for name, term in self._terms.items():
            term.attend(codec, self.teachers.networks)
            term.requires_grad_(bool(self.weights[name]))

    @property
    def taps(self) -> list[Tap]:
        """Where in the codec its terms look."""
        return [term.at for term in self._terms.values() if term.at is not None]

    def guidance(
        self,
        real: Tensor,
        lengths: Tensor | None,
        inside: Mapping[Tap, FeatureMap] = MappingProxyType({}),
        known: Mapping[str, FeatureMap] = MappingProxyType({}),
        captions: Sequence[str] = (),
    ) -> Guidance:
        """Return what its terms compare with in a step; see `Guidance`."""
        return Guidance(self.teachers.networks, real, lengths, inside, known, captions)

    def forward(
        self,
        fake: Tensor,
        real: Tensor,
        lengths: Tensor | None,
        update: int | None = None,
        guidance: Guidance | None = None,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Compare signals `(b, c, *grid)` in [-1, 1] with `lengths` valid steps.

        Args:
            fake: The reconstruction.
            real: The signal.
            lengths: int64 `(b,)`; None for all, which spares the discriminator its masks.
            update: Number of the update, which decides how much of the discriminator is heard; None leaves it out.
            guidance: What terms compare with; None if none looks into the codec or reads captions.

        Returns:
            The weighted sum, or what the balancer makes of it, and each term's value before its weight, detached.
        """
        weights = {name: weight for name, weight in self.weights.items() if weight}
        values = {}
        guidance = guidance or self.guidance(real, lengths)
        for name, term in self._terms.items():
            with nullcontext() if name in weights else torch.no_grad():
                values[name] = term.compare(fake, guidance)
        loss_weights = self.adversarial.loss_weights(update) if self.adversarial and update is not None else {}
        if self.adversarial and loss_weights:
            values |= self.adversarial.codec_losses(fake, real, lengths)
            weights |= loss_weights
        summed = {name: values[name] for name in values if name in weights}
        total = fake.new_zeros(())
        if self.balancer:
            balanced = {name: summed.pop(name) for name in list(summed) if name not in self.beside}
            total = self.balancer(balanced, weights, fake) if balanced else total
        for name, value in summed.items():
            total = total + weights[name] * value
        return total, {name: value.detach() for name, value in values.items()}
