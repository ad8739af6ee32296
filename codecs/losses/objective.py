"""The training objective: a weighted sum of named loss terms and an optional adversarial loss."""

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from types import MappingProxyType
from typing import Annotated, Any

import torch
from torch import Tensor, nn

from varitok import UserError
from varitok.data.feature_map import FeatureMap
from varitok.data.teachers.base import Teacher

from ..codec import Codec
from ..conversion import convert
from ..unregistered import FrozenModules
from .adversarial import Adversarial
from .balancer import Balancer
from .contract import Guidance, LossTerm
from .feature_hooks import Tap

__all__ = ["Objective"]

Weight = Annotated[float, "[0, inf)", "0 only logs the term"]


class Objective(nn.Module):
    """Weighted sum of loss terms: `loss = sum_i weight_i * loss_i`.

    A term's name is its key in the configuration and its name in the log.

    Args:
        terms: `{name: {"weight": float, "module": LossTerm}}`. A term of weight 0 is logged but not trained; None
            removes a term.
        adversarial: Adversarial loss, or None. Its losses are named "adversarial" and "features", and its adaptive
            factor "adversarial_factor".
        balancer: Turns weights into shares of the gradient; None sums the terms. Terms of the codec's features, rather
            than of its reconstruction, are summed unbalanced.
        teachers: Frozen networks that terms compare with, by name.

    Raises:
        UserError: A term has no weight or module, isn't a `LossTerm`, has the name of an adversarial loss, or names an
            unknown teacher; an adaptive weight is combined with the balancer, or has no term to adapt to.
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
            if not isinstance(term, Mapping) or set(term) != {"weight", "module"}:
                found = sorted(term) if isinstance(term, Mapping) else term
                raise UserError(f"objective.terms.{name}: expected `weight` and `module`, got {found}")
            if adversarial and name in adversarial.weights:
                raise UserError(f"objective.terms.{name}: the adversarial term has a loss of this name")
            self.weights[name] = convert(term["weight"], Weight, f"objective.terms.{name}.weight")
            self._terms[name] = module = term["module"]
            if not isinstance(module, LossTerm):
                raise UserError(f"objective.terms.{name}: {type(module).__name__} is not a loss term")
            if module.teacher is not None and module.teacher not in self.teachers.networks:
                known = ", ".join(self.teachers.networks) or "none"
                raise UserError(f"objective.terms.{name}: objective.teachers has no {module.teacher!r}; it has {known}")
        self.terms = nn.ModuleDict(self._terms)
        self.adversarial = adversarial
        self.balancer = balancer
        self.last: list[nn.Parameter] = []  # the weight of the decoder's last layer, for the adaptive weight
        # Terms without a gradient at the reconstruction can't be balanced.
        self.beside = {name for name, term in self._terms.items() if term.at is not None}
        if adversarial and adversarial.adaptive is not None:
            if balancer:
                raise UserError(
                    "objective.adversarial.adaptive: not with a balancer, which weighs all terms; give null"
                )
            if not any(weight for name, weight in self.weights.items() if name not in self.beside):
                raise UserError("objective.adversarial.adaptive: needs a term of the reconstruction with a weight")
        if balancer:
            balancer.track(
                [
                    *(name for name in self.weights if name not in self.beside),
                    *(adversarial.weights if adversarial else ()),
                ]
            )

    def bind(self, codec: Codec) -> None:
        """Build the submodules of terms that read the codec's features; freeze terms of weight 0.

        Raises:
            UserError: The codec has no such module, or an adaptive weight needs the last layer of a frozen decoder.
        """
        if self.adversarial and self.adversarial.adaptive is not None:
            self.last = [_last_weight(codec)]  # in a list, since it is a parameter of the codec alone
        for name, term in self._terms.items():
            term.bind(codec, self.teachers.networks)
            term.requires_grad_(bool(self.weights[name]))

    @property
    def taps(self) -> list[Tap]:
        """Modules of the codec whose outputs the terms read."""
        return [term.at for term in self._terms.values() if term.at is not None]

    def guidance(
        self,
        real: Tensor,
        lengths: Tensor | None,
        inside: Mapping[Tap, FeatureMap] = MappingProxyType({}),
        known: Mapping[str, FeatureMap] = MappingProxyType({}),
        captions: Sequence[str] = (),
    ) -> Guidance:
        """Return the targets of a step's terms; see `Guidance`."""
        return Guidance(self.teachers.networks, real, lengths, inside, known, captions)

    def forward(
        self,
        fake: Tensor,
        real: Tensor,
        lengths: Tensor | None,
        update: int | None = None,
        guidance: Guidance | None = None,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Compute the loss of reconstructions.

        Args:
            fake: Reconstructions `(b, c, *grid)` in [-1, 1].
            real: Signals of the same shape.
            lengths: int64 `(b,)`, number of valid steps; None for all, without masks in the discriminator.
            update: Number of the update, for the schedule of the adversarial loss; None leaves that loss out.
            guidance: Targets of the terms; None if no term reads the codec's features or captions.

        Returns:
            The weighted (or balanced) sum, and each term's unweighted value, detached.
        """
        weights: dict[str, Any] = {name: weight for name, weight in self.weights.items() if weight}
        values = {}
        guidance = guidance or self.guidance(real, lengths)
        for name, term in self._terms.items():
            with nullcontext() if name in weights else torch.no_grad():
                values[name] = term.compare(fake, guidance)
        loss_weights = self.adversarial.loss_weights(update) if self.adversarial and update is not None else {}
        if self.adversarial and loss_weights:
            losses = self.adversarial.codec_losses(fake, real, lengths)
            weights |= loss_weights
            if self.last and "adversarial" in loss_weights and fake.requires_grad:
                terms = [weights[name] * values[name] for name in values if name in weights and name not in self.beside]
                factor = self.adversarial.adapt(torch.stack(terms).sum(), losses["adversarial"], self.last[0])
                weights["adversarial"] *= factor
                losses["adversarial_factor"] = factor
            values |= losses
        summed = {name: values[name] for name in values if name in weights}
        total = fake.new_zeros(())
        if self.balancer:
            balanced = {name: summed.pop(name) for name in list(summed) if name not in self.beside}
            total = self.balancer(balanced, weights, fake) if balanced else total
        for name, value in summed.items():
            total = total + weights[name] * value
        return total, {name: value.detach() for name, value in values.items()}


def _last_weight(codec: Codec) -> nn.Parameter:
    """Return the weight of a decoder's last layer, the last of its matrices.

    Raises:
        UserError: The decoder is frozen.
    """
    weight = [parameter for parameter in codec.decoder.parameters() if parameter.ndim > 1][-1]
    if not weight.requires_grad:
        raise UserError("objective.adversarial.adaptive: needs the decoder's last layer, which is frozen; give null")
    return weight
