"""What the classical codecs have in common."""

from collections.abc import Callable
from typing import NamedTuple

from torch import Tensor

__all__ = ["Classic", "Coded"]


class Coded(NamedTuple):
    """A signal, coded and decoded.

    Attributes:
        file: Bytes of the whole file.
        payload: Bytes of what is coded signal in it.
        back: What a file would hold of the decoded signal, as the original: `(c, *grid)`.
    """

    file: int
    payload: int
    back: Tensor


class Classic(NamedTuple):
    """A classical codec.

    Attributes:
        name: What it is called.
        settings: Qualities to try.
        about: What does the work, its options, and what counts as payload, for the table's header.
        code: Codes a signal `(c, *grid)`, as a file would hold it, at one of the settings, and decodes it.
    """

    name: str
    settings: tuple[int, ...]
    about: str
    code: Callable[[Tensor, int], Coded]
