"""What classical codecs have in common."""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, NamedTuple

from torch import Tensor

__all__ = ["ClassicalCodec", "Coded"]


class Coded(NamedTuple):
    """A signal, coded and decoded.

    Attributes:
        file: Bytes of the whole file.
        payload: Bytes of the coded signal in it.
        back: The decoded signal as a file would hold it, in the original's format: `(c, *grid)`.
    """

    file: int
    payload: int
    back: Tensor


@dataclass(frozen=True)
class ClassicalCodec(ABC):
    """A classical codec.

    Attributes:
        name: What it is called.
        encoder: The library's name of it.
        settings: Qualities to try.
        options: Further settings of the encoder's.
        counted: What counts as payload, for the table's header.
    """

    name: str
    encoder: str
    settings: tuple[int, ...]
    options: dict[str, Any]
    counted: str

    @property
    def about(self) -> str:
        """What does the work, its options, and what counts as payload, for the table's header."""
        return f"{self.encoder}, {self.options}; payload: {self.counted}"

    @abstractmethod
    def accepts(self, rate: float, channels: int) -> bool:
        """Return whether this machine has it, and it takes signals of that sample rate or frame rate and channels."""

    @abstractmethod
    def code(self, signal: Tensor, setting: int, rate: float = 0) -> Coded:
        """Code a signal `(c, *grid)`, as a file would hold it, at one of the settings, and decode it.

        Args:
            signal: The signal.
            setting: One of `settings`.
            rate: Its sample rate or frame rate; 0 if it has none.
        """
