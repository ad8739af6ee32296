"""Wall-clock times and memory of work on a device."""

import gc
import statistics
import time
from collections.abc import Callable, Mapping

import torch

__all__ = ["medians", "peak_memory", "synchronize"]


def synchronize(device: str) -> None:
    """Wait until the device has done all that was launched."""
    if device == "cuda":
        torch.cuda.synchronize()


def medians(runs: Mapping[str, Callable[[], object]], device: str, rounds: int) -> dict[str, float]:
    """Time calls in turn after an untimed round; return medians in milliseconds by name."""
    found: dict[str, list[float]] = {name: [] for name in runs}
    for count in range(rounds + 1):
        for name, run in runs.items():
            synchronize(device)
            began = time.perf_counter()
            run()
            synchronize(device)
            if count:
                found[name].append(1000 * (time.perf_counter() - began))
    return {name: statistics.median(times) for name, times in found.items()}


def peak_memory(run: Callable[[], object]) -> float:
    """Return the peak of the GPU's memory in a call, above that before it, in GiB."""
    gc.collect()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    run()
    return (torch.cuda.max_memory_allocated() - before) / 2**30
