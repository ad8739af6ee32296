"""Base class of synthetic datasets: each signal is a function of its key, and each epoch has new ones."""

from collections.abc import Mapping
from dataclasses import KW_ONLY, dataclass
from types import MappingProxyType
from typing import Annotated, Any

import numpy as np

from ..batch import Key, SignalDataset, Splits

__all__ = ["SyntheticDataset"]


@dataclass(eq=False, repr=False)
class SyntheticDataset(SignalDataset):
    """A dataset of signals that are generated on access.

    Args:
        length: Signals per epoch.
        seed: Seed of all randomness.
        train: Generate new signals in each epoch; otherwise the same in each, disjoint from the training signals.
    """

    _: KW_ONLY
    length: int = 10_000
    seed: Annotated[int, "[0, inf)"] = 0
    train: bool = True

    def __len__(self) -> int:
        return self.length

    def chance(self, key: Key) -> np.random.Generator:
        """Return the random generator of the signal of `(epoch, index)`.

        Raises:
            IndexError: The index is out of range.
        """
        epoch, index = key
        if not 0 <= index < self.length:
            raise IndexError(f"index {index} of {self.length} signals")
        return np.random.default_rng([self.seed, epoch + 1 if self.train else 0, index])

    @classmethod
    def splits(
        cls, what: str, protocol: str, val_length: int, val: Mapping[str, Any] = MappingProxyType({}), **form: Any
    ) -> Splits:
        """Build both splits with arguments `form`, which `val_length` and `val` override in the validation split.

        `what` describes the signals, with {} for their number; tables print it and `protocol` in their header.
        """
        return Splits(
            cls(train=True, **form),
            cls(train=False, **{**form, **val, "length": val_length}),
            about={"dataset": what.format(val_length) + f", seed {form['seed']}", "protocol": protocol},
        )
