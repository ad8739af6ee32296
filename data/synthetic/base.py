"""What data sets made from nothing share: an epoch of new signals after another, each a function of its key."""

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

import numpy as np

from varitok import require_min

from ..batch import Key, SignalDataset, Splits

__all__ = ["SyntheticDataset"]


class SyntheticDataset(SignalDataset):
    """An endless data set.

    Args:
        length: Signals of an epoch.
        seed: Seed of all chance.
        train: Each epoch has new signals; otherwise all have the same ones, and none of training's.

    Raises:
        UserError: A number is out of range.
    """

    def __init__(self, length: int, seed: int, train: bool) -> None:
        require_min({"data.length": (length, 1), "data.seed": (seed, 0)})
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

    @classmethod
    def splits(
        cls,
        length: int,
        val_length: int,
        what: str,
        protocol: str,
        seed: int,
        val: Mapping[str, Any] = MappingProxyType({}),
        **form: Any,
    ) -> Splits:
        """Make both splits, of so many signals; `val` changes the form of the second.

        `what` signals are, with {} for their number, and the protocol stand above a table.
        """
        require_min({"data.val_length": (val_length, 1)})
        return Splits(
            cls(length=length, seed=seed, train=True, **form),
            cls(length=val_length, seed=seed, train=False, **{**form, **val}),
            about={"dataset": what.format(val_length) + f", seed {seed}", "protocol": protocol},
        )
