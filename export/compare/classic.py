"""The base class of classical codecs."""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, NamedTuple

from torch import Tensor

__all__ = ["ClassicalCodec", "Coded"]


class Coded(NamedTuple):
    """The sizes of an encoded signal, and its reconstruction.

    Attributes:
        file: Size of the whole file, in bytes.
        payload: Size of the coded signal in it, in bytes.
        back: Reconstruction `(c, *grid)` with the values that a file would have, in the original's format.
    """

    file: int
    payload: int
    back: Tensor


@dataclass(frozen=True)
class ClassicalCodec(ABC):
    """A classical codec.

    Attributes:
        name: Name in tables and figures.
        encoder: Name of the encoder in its library.
        settings: Qualities to measure.
        options: Further options of the encoder.
        counted: Definition of the payload, for the table's header.
    """

    name: str
    encoder: str
    settings: tuple[int, ...]
    options: dict[str, Any]
    counted: str

    @property
    def about(self) -> str:
        """Encoder, options and payload, for the table's header."""
        return f"{self.encoder}, {self.options}; payload: {self.counted}"

    @abstractmethod
    def obstacle(self, rate: float, channels: int) -> str:
        """Return why the codec can't code signals of a sample or frame rate on this machine; empty if it can."""

    @abstractmethod
    def code(self, signal: Tensor, setting: int, rate: float = 0) -> Coded:
        """Encode a signal at one of the settings, and decode it.

        Args:
            signal: Signal `(c, *grid)` with the values that a file would have.
            setting: One of `settings`.
            rate: Sample rate or frame rate of the signal; 0 if it has none.
        """
