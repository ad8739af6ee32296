"""What data sets made from nothing share: an epoch of new signals after another, each a function of its key."""

import numpy as np
from torch import Tensor
from torch.utils.data import Dataset

from varitok import at_least

from ..batch import Key

__all__ = ["Embedded"]


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
        at_least({"data.length": (length, 1), "data.seed": (seed, 0)})
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
