"""A buffer of scalars between log readings."""

from typing import Any

import torch
from torch import Tensor

from ...distributed import gather_rows, mean_over_ranks, world_size

__all__ = ["ScalarBuffer"]


class ScalarBuffer:
    """Running sums of scalars on the device, read as means every `every` steps.

    Ten `self.log` calls take about 5 ms per step. Adding to sums on the device takes microseconds, and needs only one
    device-to-host copy in `every` steps.

    Args:
        every: Steps between two readings.
    """

    def __init__(self, every: int) -> None:
        self.every = every
        self._sums: dict[str, Tensor] = {}
        self._counts: dict[str, int] = {}

    def add(self, values: dict[str, Tensor]) -> None:
        """Add detached scalars."""
        for name, value in values.items():
            if name in self._sums:
                self._sums[name] += value.detach()
                self._counts[name] += 1
            else:
                self._sums[name] = value.detach().float().clone()
                self._counts[name] = 1

    def read(self) -> dict[str, float]:
        """Return the means over steps and processes since the last reading, and reset."""
        if not self._sums:
            return {}
        means = torch.stack([total / self._counts[name] for name, total in self._sums.items()])
        values = dict(zip(self._sums, mean_over_ranks(means).tolist(), strict=True))
        self._sums, self._counts = {}, {}
        return values

    def state(self) -> dict[str, Any]:
        """Return the sums since the last reading, one row per process; every process must call it."""
        if not self._sums:
            return {}
        rows = gather_rows(torch.stack(list(self._sums.values()))[None])
        return {"names": list(self._sums), "counts": list(self._counts.values()), "sums": rows.cpu()}

    def restore(self, state: dict[str, Any], process: int, device: torch.device) -> None:
        """Restore a `state`: this process's sums, or the mean over processes if their number has changed."""
        if not state:
            return
        rows = state["sums"].to(device)
        own = rows[process] if len(rows) == world_size() else rows.mean(0)
        self._sums = dict(zip(state["names"], own.clone(), strict=True))
        self._counts = dict(zip(state["names"], state["counts"], strict=True))
