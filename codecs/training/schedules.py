"""Schedules over updates, as pure functions: a resumed run has no schedule state to restore."""

import math

__all__ = ["averaging_decay", "warmup_cosine"]


def warmup_cosine(update: int, total: int, warmup: int, final: float) -> float:
    """Return the learning-rate factor: linear warmup over `warmup` updates, then cosine decay from 1 to `final`."""
    if update < warmup:
        return (update + 1) / warmup
    progress = min(1.0, (update - warmup) / max(1, total - warmup))
    return final + (1 - final) * (1 + math.cos(math.pi * progress)) / 2


def averaging_decay(update: int, decay: float) -> float:
    """Return the EMA decay, `min(decay, (1 + update) / (10 + update))`: low at first, to forget initial weights."""
    return min(decay, (1 + update) / (10 + update))
