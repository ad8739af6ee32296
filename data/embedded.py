"""What data sets made from nothing share: an epoch of new signals after another, each a function of its key."""

from collections.abc import Mapping

import numpy as np
from torch import Tensor
from torch.utils.data import Dataset

from varitok import UserError

from .batch import Key

__all__ = ["Embedded", "at_least"]


def at_least(numbers: Mapping[str, tuple[float, float]]) -> None:
    """Check numbers of a configuration against the least that they may be.

    Args:
        numbers: The number and its least, by its name below `data`.

    Raises:
        UserError: One is too small.
    """
    for name, (value, least) in numbers.items():
        if not value >= least:
            raise UserError(f"data.{name}={value}: must be at least {least}")


class Embedded(Dataset[Tensor]):
    """An endless data set.

    Args:
        length: Signals of an epoch.
        seed: Seed of all chance.
        train: Each epoch has new signals; otherwise all have the same ones, and none of training's.

    Raises:
        UserError: A number is out of range.
    """

    def __init__(self, length: int, seed: int, train: bool) -> None:
        at_least({"length": (length, 1), "seed": (seed, 0)})
        self.length = length
        self.seed = seed
        self.train = train

    def __len__(self) -> int:
        """Count the signals of an epoch."""
        return self.length

    def chance(self, key: Key) -> np.random.Generator:
        """Give the source of all chance in the signal of `(epoch, index)`.

        Raises:
            IndexError: There is no such index.
        """
        epoch, index = key
        if not 0 <= index < self.length:
            raise IndexError(f"index {index} of {self.length} signals")
        return np.random.default_rng([self.seed, epoch + 1 if self.train else 0, index])
