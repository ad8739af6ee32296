"""How fast a run is, and whether its data keep up."""

import logging
import time

from ...distributed import world_size

__all__ = ["Throughput"]

_log = logging.getLogger(__name__)

PATIENCE = 5.0  # seconds between two readings before their shares mean anything
WAITING = 0.25  # share of the time at which it is said


class Throughput:
    """Measures signals a second, and the share of the time that a run waits for its next batch.

    Evaluations and savings don't count as waiting. The start of a loader's workers isn't counted at all.
    """

    def __init__(self) -> None:
        self._began: float | None = None  # start of the current interval
        self._left: float | None = None  # when the last batch was done with
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
        """Take note that a batch is done with, and the next one wanted."""
        self._left = time.perf_counter()

    def read(self) -> dict[str, float]:
        """Return signals a second, of all processes, and this one's share of waiting, since the last reading.

        Where much of the time goes into waiting, it is said, once.
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
