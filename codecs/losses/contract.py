"""Interface of loss terms; `tests/codecs/losses/test_contract.py` tests it with all configurations.

A new term is a `SignalTerm` with one method, `forward(fake, real, lengths)`.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from functools import cached_property

import torch
from torch import Tensor, nn

from varitok import UserError
from varitok.data.feature_map import FeatureMap
from varitok.data.teachers.base import Teacher
from varitok.data.teachers.text import TextTransformer

from ..codec import Codec
from .feature_hooks import Tap

__all__ = ["Guidance", "LossTerm", "SignalTerm"]


class Guidance:
    """Targets of the loss terms of one training step.

    Each teacher runs at most once per step, when the first term needs its features.

    Args:
        teachers: Teachers by name.
        real: Signals `(b, c, *grid)`.
        lengths: int64 `(b,)`, valid steps of the first axis; None for all.
        inside: Feature maps captured in the codec, by tap.
        known: Precomputed teacher features of the signals, by the teacher's name.
        captions: Caption of each signal; empty if captions weren't loaded.
    """

    def __init__(
        self,
        teachers: Mapping[str, Teacher],
        real: Tensor,
        lengths: Tensor | None,
        inside: Mapping[Tap, FeatureMap],
        known: Mapping[str, FeatureMap],
        captions: Sequence[str] = (),
    ) -> None:
        self.teachers = teachers
        self.real = real
        self.lengths = lengths
        self.inside = inside
        self.captions = captions
        self._known = dict(known)

    @cached_property
    def valid(self) -> Tensor:
        """Number of valid steps of each signal's first axis, int64 `(b,)`."""
        if self.lengths is not None:
            return self.lengths
        return torch.full((len(self.real),), self.real.shape[2], device=self.real.device)

    @torch.no_grad()
    def target(self, teacher: str) -> FeatureMap:
        """Return a teacher's features of the signals, or of their captions.

        Raises:
            UserError: The teacher reads captions, and none were loaded.
        """
        if teacher not in self._known:
            network = self.teachers[teacher]
            if not isinstance(network, TextTransformer):
                self._known[teacher] = network(self.real, self.lengths)
            elif len(self.captions) == len(self.real):
                self._known[teacher] = network.read(self.captions, self.real.device)
            else:
                raise UserError(f"objective.teachers.{teacher} reads captions; give loader.captions=true")
        return self._known[teacher]


class LossTerm(nn.Module):
    """A loss term of the objective.

    Attributes:
        teacher: Name in `objective.teachers` of the teacher that it needs, or None.
        at: Module of the codec whose output it reads; None for a term of the reconstruction. Only the latter are
            balanced.
    """

    teacher: str | None = None
    at: Tap | None = None

    def bind(self, codec: Codec, teachers: Mapping[str, Teacher]) -> None:
        """Build submodules whose shape depends on the codec and the teachers."""

    def compare(self, fake: Tensor, guidance: Guidance) -> Tensor:
        """Return the loss of a reconstruction `fake`, a scalar: `forward(fake, guidance)`."""
        return self(fake, guidance)  # type: ignore[no-any-return]


class SignalTerm(LossTerm, ABC):
    """A loss between a reconstruction and its signal."""

    def compare(self, fake: Tensor, guidance: Guidance) -> Tensor:
        """Return the loss of a reconstruction `fake`, a scalar: `forward(fake, real, lengths)`."""
        return self(fake, guidance.real, guidance.valid)  # type: ignore[no-any-return]

    @abstractmethod
    def forward(self, fake: Tensor, real: Tensor, lengths: Tensor) -> Tensor:
        """Return the mean of the samples' losses, a scalar.

        Args:
            fake: Reconstructions, `(b, c, *grid)` in [-1, 1].
            real: Signals of the same shape.
            lengths: int64 `(b,)`, valid steps of the grid's first axis; padding after them must not affect the loss.
        """
