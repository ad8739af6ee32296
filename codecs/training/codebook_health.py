"""Codebook health: usage, entropy and perplexity of each codebook in training, and a warning on collapse."""

import inspect
import logging
import math
from operator import mul, truediv
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ..bottlenecks.composite import Composite
from ..bottlenecks.contract import Bottleneck
from ..bottlenecks.hierarchy import Hierarchy
from ..distributed import gather_rows, sum_over_ranks, world_size
from ..masking import prefix_mask
from ..metrics.rate import CodeCounts

__all__ = ["CodebookHealth", "remedies"]

_log = logging.getLogger(__name__)

FLOOR = 0.05  # share of the possible perplexity below which a codebook counts as collapsed
PATIENCE = 3  # readings in a row below `FLOOR` before the warning
RISE = 1.1  # ratio of perplexities of two readings above which a codebook recovers, as many do at the start of a run

# Remedies for a collapsed codebook by argument of its bottleneck, each with the value that makes it inapplicable.
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
    """List for each layer of codebooks the remedies against collapse that its bottleneck's arguments offer."""
    if isinstance(bottleneck, Hierarchy):
        return [_remedy(level) for level in bottleneck.levels]  # type: ignore[arg-type]
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
    """Code counts of training batches, and each codebook's usage, computed alike for all bottlenecks.

    Counts are summed on the device; processes communicate at a reading only. A reading has these values:

        health/codebookI/used         distinct codes / possible; possible = min(codebook size, number of codes)
        health/codebookI/entropy      H = -sum p log2 p, in bits; biased low if there are few codes
        health/codebookI/perplexity   2^H
        health/used, entropy, ...     means over codebooks; in a hierarchy a layer counts as one
        health/bits_per_token         sum of entropies, an upper bound on a token's information
        health/bits_per_position      entropy of the kept codes per pixel or audio sample (x sample rate: bit/s)
        rate/tokens, rate/bits        kept tokens (of the codebook with most) and packed bits, per signal or block

    A codebook is reported once, with remedies, if `(perplexity - 1) / (possible - 1)` stays below `FLOOR` for
    `PATIENCE` readings in a row without rising. Replaced entries are the bottleneck's metric, `bottleneck/replaced`.

    Args:
        bottleneck: Bottleneck whose codes are counted; if it has no codebooks, every call does nothing.
    """

    def __init__(self, bottleneck: Bottleneck) -> None:
        self.codebook_sizes = tuple(bottleneck.codebook_sizes)
        self.layers = bottleneck.codebook_layers
        self.remedies = remedies(bottleneck) if self.codebook_sizes else []
        self.low = [0] * len(self.layers)  # readings in a row
        self.last = [math.inf] * len(self.layers)  # perplexities of the last reading
        self.warned: set[int] = set()
        self._counts: CodeCounts | None = None
        self._positions: Tensor | int = 0
        self._signals = 0

    def add(self, codes: Tensor, lengths: Tensor, n_codebooks: Tensor, positions: Tensor | int) -> None:
        """Count the codes of a training batch.

        Args:
            codes: int64 `(b, codebooks, n)`.
            lengths: int64 `(b,)`, tokens kept.
            n_codebooks: int64 `(b,)`, codebooks kept.
            positions: Pixels or audio samples of the whole batch, without padding.
        """
        if not self.codebook_sizes:
            return
        if self._counts is None:
            self._counts = CodeCounts(self.codebook_sizes, codes.device, self.layers)
        steps, kept = prefix_mask(lengths, codes.shape[2]), prefix_mask(n_codebooks, codes.shape[1])
        self._counts.add(codes.detach(), kept[:, :, None] & steps[:, None])
        self._positions = self._positions + positions
        self._signals += len(lengths)

    def read(self) -> dict[str, float]:
        """Return the values since the last reading, over all processes, and reset; every process must call it."""
        if self._counts is None:
            return {}
        counts = self._counts
        if world_size() > 1:
            counts.gather()
        positions, signals = self._sizes()
        self._counts, self._positions, self._signals = None, 0, 0
        codebooks = counts.summary()
        values: dict[str, float] = {}
        entropies, seen = [codebook.entropy for codebook in codebooks], [codebook.codes for codebook in codebooks]
        # Number of entries that could have occurred.
        possible = [min(size, count) for size, count in zip(counts.codebook_sizes, seen, strict=True)]
        measures = {
            "used": [codebook.entries / max(1, most) for codebook, most in zip(codebooks, possible, strict=True)],
            "entropy": entropies,
            "perplexity": [codebook.perplexity for codebook in codebooks],
        }
        for name, numbers in measures.items():
            values |= {f"health/codebook{index}/{name}": number for index, number in enumerate(numbers)}
            values[f"health/{name}"] = sum(numbers) / len(numbers)
        values["health/bits_per_token"] = sum(map(mul, entropies, self.layers))
        said = sum(bits * count for bits, count in zip(entropies, seen, strict=True))
        values["health/bits_per_position"] = said / positions if positions else 0.0
        bits = sum(math.log2(size) * count for size, count in zip(counts.codebook_sizes, seen, strict=True))
        values["rate/tokens"] = max(map(truediv, seen, self.layers)) / signals
        values["rate/bits"] = bits / signals
        self._warn(measures["perplexity"], possible)
        return values

    def state(self) -> dict[str, Any]:
        """Return the sums since the last reading, over all processes, and the history for the warning."""
        state: dict[str, Any] = {"low": self.low, "last": self.last, "told": sorted(self.warned)}
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
        """Restore a `state`; rank 0 gets all counts, since a reading sums over processes."""
        if len(state["low"]) != len(self.layers):  # of a version that counted the codebooks of a layer apart
            return
        self.low, self.last, self.warned = list(state["low"]), list(state["last"]), set(state["told"])
        if "counts" in state:
            self._counts, self._positions, self._signals = CodeCounts(self.codebook_sizes, device, self.layers), 0, 0
            if process == 0:
                self._counts.include(state["counts"].to(device))
                self._positions, self._signals = state["sizes"]

    def _warn(self, perplexities: list[float], entries: list[int]) -> None:
        """Warn about codebooks whose perplexity has been low for several readings."""
        fallen: dict[str, list[str]] = {}
        for codebook, (perplexity, possible) in enumerate(zip(perplexities, entries, strict=True)):
            if possible < 2:  # a codebook of one entry, or at most one code
                continue
            # The minimum perplexity is 1, which is a large share of the possible one in a small codebook.
            low = (perplexity - 1) / (possible - 1) < FLOOR
            rises = perplexity > RISE * self.last[codebook]
            self.low[codebook] = self.low[codebook] + 1 if low and not rises else 0
            self.last[codebook] = perplexity
            if self.low[codebook] >= PATIENCE and codebook not in self.warned:
                self.warned.add(codebook)
                bits = math.log2(perplexity)
                worth = f"codebook {codebook} is worth {perplexity:.1f} of {possible} entries ({bits:.2f} bits)"
                fallen.setdefault(self.remedies[codebook], []).append(worth)
        if dist.is_available() and dist.is_initialized() and dist.get_rank():
            return
        for words, codebooks in fallen.items():
            _log.warning("codes collapse: %s, %d readings in a row; try %s", ", ".join(codebooks), PATIENCE, words)
