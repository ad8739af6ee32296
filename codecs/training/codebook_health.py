"""The health of the codes: how much of each codebook is in use while training, and a warning when one collapses."""

import inspect
import logging
import math
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ..bottlenecks.composite import Composite
from ..bottlenecks.contract import Bottleneck
from ..distributed import gather_rows, sum_over_ranks, world_size
from ..masking import prefix_mask
from ..metrics.rate import CodeCounts, entropy

__all__ = ["CodebookHealth", "remedies"]

_log = logging.getLogger(__name__)

FLOOR = 0.05  # share of the possible perplexity below which a codebook counts as collapsed
PATIENCE = 3  # readings in a row
RISE = 1.1  # from one reading to the next: a codebook that grows so is waking up, as many do at the start of a run

# What a bottleneck's argument can do for a collapsed codebook; the value that it may have already, in which case it
# can't.
REMEDIES: dict[str, tuple[str, object]] = {
    "kmeans_init": ("kmeans_init=true (k-means of the first batch)", None),
    "revival": ("a larger revival", None),
    "cosine": ("cosine=true", True),
    "entropy": ("a larger entropy", None),
    "codebook_size": ("a smaller codebook_size", None),
    "levels": ("fewer levels", None),
    "bits": ("fewer bits", None),
}


def remedies(bottleneck: Bottleneck) -> list[str]:
    """List for each codebook the changes against collapse that its bottleneck's arguments offer."""
    if isinstance(bottleneck, Composite):
        found = [""] * len(bottleneck.codebook_sizes)
        for part, positions in zip(bottleneck.parts, bottleneck.positions, strict=True):
            assert isinstance(part, Bottleneck)
            for index, words in zip(positions, remedies(part), strict=True):
                found[index] = words
        return found
    return [_remedy(bottleneck)] * len(bottleneck.codebook_sizes)


def _remedy(bottleneck: Bottleneck) -> str:
    known = inspect.signature(type(bottleneck)).parameters
    offered = [
        words
        for name, (words, done) in REMEDIES.items()
        if name in known and (done is None or getattr(bottleneck, name, None) != done)
    ]
    words = [f"bottleneck: {', '.join(offered)}"] if offered else []
    if "kmeans_init" not in known and "codebook_size" in known:
        words.append("bottleneck=vq_ema (k-means, dead entries replaced)")
    return "; ".join([*words, "codec.unit_latents=true", "a lower optim.codec.lr"])


class CodebookHealth:
    """Collects the codes of training and computes each codebook's usage, the same way for all bottlenecks.

    Adding is a sum that stays on the device; processes communicate at a reading only. A reading has for
    each codebook `health/codebookI/used`, the share of entries that occurred out of those that could have (as many as
    the codebook has, or as many as there were codes); `.../entropy`, in bits, of these codes, biased low
    if they are few for the size of the codebook; `.../perplexity`, 2 to its power. `health/used` and the others are
    means over codebooks; `health/bits_per_token` is the sum of the entropies, an upper bound on the information of a
    token, and `health/bits_per_position` that of the kept codes per pixel (times the sample rate: bit/s). Replaced
    entries are the bottleneck's own metric, `bottleneck/replaced`. `rate/tokens` and `rate/bits` are the kept length
    of a signal or block: tokens of the codebook that has most, and bits of all codebooks, packed.

    A codebook whose share of the possible perplexity, `(perplexity - 1) / (possible - 1)`, stays below `FLOOR` for
    `PATIENCE` readings in a row without rising is reported once, with remedies.

    Args:
        bottleneck: Whose codes they are; one without codebooks has no health, and every call does nothing.
    """

    def __init__(self, bottleneck: Bottleneck) -> None:
        self.codebook_sizes = tuple(bottleneck.codebook_sizes)
        self.remedies = remedies(bottleneck) if self.codebook_sizes else []
        self.low = [0] * len(self.codebook_sizes)  # readings in a row
        self.last = [math.inf] * len(self.codebook_sizes)  # perplexities of the last reading
        self.told: set[int] = set()
        self._counts: CodeCounts | None = None
        self._positions: Tensor | int = 0
        self._signals = 0

    def add(self, codes: Tensor, lengths: Tensor, n_codebooks: Tensor, positions: Tensor | int) -> None:
        """Take in a training batch.

        Args:
            codes: int64 `(b, codebooks, n)`.
            lengths: int64 `(b,)`, tokens kept.
            n_codebooks: int64 `(b,)`, codebooks kept.
            positions: Pixels or samples of all its signals together, without padding.
        """
        if not self.codebook_sizes:
            return
        if self._counts is None:
            self._counts = CodeCounts(self.codebook_sizes, codes.device)
        steps, kept = prefix_mask(lengths, codes.shape[2]), prefix_mask(n_codebooks, codes.shape[1])
        self._counts.add(codes.detach(), kept[:, :, None] & steps[:, None])
        self._positions = self._positions + positions
        self._signals += len(lengths)

    def read(self) -> dict[str, float]:
        """Return the values of all processes since the last reading, and reset; every process must call it."""
        if self._counts is None:
            return {}
        counts = self._counts
        if world_size() > 1:
            counts.gather()
        positions, signals = self._sizes()
        self._counts, self._positions, self._signals = None, 0, 0
        codebooks = counts.codebooks()
        values: dict[str, float] = {}
        entropies, seen = [entropy(codebook) for codebook in codebooks], [int(codebook.sum()) for codebook in codebooks]
        # The entries that could have occurred.
        possible = [min(size, count) for size, count in zip(self.codebook_sizes, seen, strict=True)]
        measures = {
            "used": [len(codebook) / max(1, most) for codebook, most in zip(codebooks, possible, strict=True)],
            "entropy": entropies,
            "perplexity": [2**bits for bits in entropies],
        }
        for name, numbers in measures.items():
            values |= {f"health/codebook{index}/{name}": number for index, number in enumerate(numbers)}
            values[f"health/{name}"] = sum(numbers) / len(numbers)
        values["health/bits_per_token"] = sum(entropies)
        said = sum(bits * count for bits, count in zip(entropies, seen, strict=True))
        values["health/bits_per_position"] = said / positions if positions else 0.0
        bits = sum(math.log2(size) * count for size, count in zip(self.codebook_sizes, seen, strict=True))
        values["rate/tokens"] = max(seen) / signals
        values["rate/bits"] = bits / signals
        self._warn(measures["perplexity"], possible)
        return values

    def state(self) -> dict[str, Any]:
        """Return the sums since the last reading, of all processes, and the memory of earlier readings."""
        state: dict[str, Any] = {"low": self.low, "last": self.last, "told": sorted(self.told)}
        if self._counts is not None:
            rows = self._counts.rows()
            state |= {"counts": gather_rows(rows).cpu(), "sizes": self._sizes()}
        return state

    def _sizes(self) -> list[int]:
        """Return the numbers of positions and of signals, over all processes."""
        assert self._counts is not None
        mine = torch.tensor([int(self._positions), self._signals], device=self._counts.dense.device)
        sizes: list[int] = sum_over_ranks([mine])[0].tolist()
        return sizes

    def restore(self, state: dict[str, Any], process: int, device: torch.device) -> None:
        """Go on from a `state`: the first process with all that was counted, as a reading sums them."""
        self.low, self.last, self.told = list(state["low"]), list(state["last"]), set(state["told"])
        if "counts" in state:
            self._counts, self._positions, self._signals = CodeCounts(self.codebook_sizes, device), 0, 0
            if process == 0:
                self._counts.include(state["counts"].to(device))
                self._positions, self._signals = state["sizes"]

    def _warn(self, perplexities: list[float], entries: list[int]) -> None:
        """Warn about codebooks that have been low for several readings."""
        fallen: dict[str, list[str]] = {}
        for codebook, (perplexity, possible) in enumerate(zip(perplexities, entries, strict=True)):
            if possible < 2:  # there is nothing to choose, or nothing was chosen
                continue
            # The least perplexity is 1, in a small codebook a large share of the possible one.
            low = (perplexity - 1) / (possible - 1) < FLOOR
            rises = perplexity > RISE * self.last[codebook]
            self.low[codebook] = self.low[codebook] + 1 if low and not rises else 0
            self.last[codebook] = perplexity
            if self.low[codebook] >= PATIENCE and codebook not in self.told:
                self.told.add(codebook)
                bits = math.log2(perplexity)
                worth = f"codebook {codebook} is worth {perplexity:.1f} of {possible} entries ({bits:.2f} bits)"
                fallen.setdefault(self.remedies[codebook], []).append(worth)
        if dist.is_available() and dist.is_initialized() and dist.get_rank():
            return
        for words, codebooks in fallen.items():
            _log.warning("codes collapse: %s, %d readings in a row; try %s", ", ".join(codebooks), PATIENCE, words)
