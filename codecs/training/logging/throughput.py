"""Throughput of a run, and the share of time it waits for data."""

import logging
import time

from ...distributed import world_size

__all__ = ["Throughput"]

_log = logging.getLogger(__name__)

PATIENCE = 5.0  # seconds between two readings below which the share is too noisy for the warning
WAITING = 0.25  # share of waiting above which a warning is logged


class Throughput:
    """A meter of samples per second, and of the share of time that a run waits for its next batch.

    Evaluations and checkpoints don't count as waiting. The startup of the loader's workers isn't counted at all.
    """

    def __init__(self) -> None:
        self._began: float | None = None  # start of the current interval
        self._left: float | None = None  # end of the last batch
        self._waited = 0.0
        self._signals = 0
        self._said = False

    def arrive(self, signals: int) -> None:
        """Record that a batch of `signals` samples has arrived."""
        now = time.perf_counter()
        if self._began is None:
            self._began = now
        elif self._left is not None:
            self._waited += now - self._left
        self._signals += signals

    def leave(self) -> None:
        """Record that a batch is finished, and that the loop waits for the next one."""
        self._left = time.perf_counter()

    def read(self) -> dict[str, float]:
        """Return samples per second of all processes and this one's share of waiting, since the last reading.

        A large share is logged as a warning, once.
        """
        if self._began is None:
            return {}
        now = time.perf_counter()
        elapsed = max(now - self._began, 1e-9)
        values = {"speed/samples": world_size() * self._signals / elapsed, "speed/waiting": self._waited / elapsed}
        if values["speed/waiting"] > WAITING and elapsed > PATIENCE and not self._said:
            self._said = True
            _log.warning(
                "training waits for data %.0f %% of its time: give more loader.workers, or shards of small files",
                100 * values["speed/waiting"],
            )
        self._began, self._waited, self._signals = now, 0.0, 0
        return values
