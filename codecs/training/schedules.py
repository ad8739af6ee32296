"""What changes with the number of updates: pure functions, so that a resume has nothing to restore."""

import math

__all__ = ["averaging_decay", "warmup_cosine"]


def warmup_cosine(update: int, total: int, warmup: int, final: float) -> float:
    """Return the factor on the learning rate: a linear rise over `warmup` updates, then half a cosine to `final`."""
    if update < warmup:
        return (update + 1) / warmup
    progress = min(1.0, (update - warmup) / max(1, total - warmup))
    return final + (1 - final) * (1 + math.cos(math.pi * progress)) / 2


def averaging_decay(update: int, decay: float) -> float:
    """Return the decay of the parameters' moving average: small at first, so that the start is soon forgotten."""
    return min(decay, (1 + update) / (10 + update))
