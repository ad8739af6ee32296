"""What every loss term keeps; `tests/codecs/losses/test_contract.py` runs it over all configurations.

A new term is a `SignalTerm`: a class of one method, `forward(fake, real, lengths)`.
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
    """What the terms of a step compare a reconstruction with.

    Each teacher sees the signal once, when the first term asks.

    Args:
        teachers: By name.
        real: The signal.
        lengths: Its valid steps of the first axis; None for all.
        inside: What was captured in the codec.
        known: Features of the signal that need no teacher any more, by its name.
        captions: What texts say of each signal; none at all where they weren't read.
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
        """Valid steps of each signal's first axis, int64 `(b,)`."""
        if self.lengths is not None:
            return self.lengths
        return torch.full((len(self.real),), self.real.shape[2], device=self.real.device)

    @torch.no_grad()
    def target(self, teacher: str) -> FeatureMap:
        """Return a teacher's features of the signal, or of its caption.

        Raises:
            UserError: Captions are wanted and weren't read.
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
    """A term of the objective.

    Attributes:
        teacher: Name in `objective.teachers` of the network that it needs; None: none.
        at: Module of the codec whose output it reads; None: the reconstruction. The balancer handles only terms of
            the reconstruction.
    """

    teacher: str | None = None
    at: Tap | None = None

    def attend(self, codec: Codec, teachers: Mapping[str, Teacher]) -> None:
        """Make what depends on the codec and on the teacher."""

    def compare(self, fake: Tensor, guidance: Guidance) -> Tensor:
        """Return the loss of a reconstruction, a scalar: what `forward` makes of both."""
        return self(fake, guidance)  # type: ignore[no-any-return]


class SignalTerm(LossTerm, ABC):
    """A term that compares two signals."""

    def compare(self, fake: Tensor, guidance: Guidance) -> Tensor:
        """Return the loss of a reconstruction, a scalar: what `forward` makes of both signals."""
        return self(fake, guidance.real, guidance.valid)  # type: ignore[no-any-return]

    @abstractmethod
    def forward(self, fake: Tensor, real: Tensor, lengths: Tensor) -> Tensor:
        """Return the loss: the mean of the samples' own, a scalar.

        Args:
            fake: The reconstruction, `(b, c, *grid)` in [-1, 1].
            real: The signal, of the same shape.
            lengths: int64 `(b,)`, valid steps of the first axis of the grid; the rest must not count.
        """
