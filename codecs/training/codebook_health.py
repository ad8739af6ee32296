"""The health of the codes: how much of each book is in use while training goes on, and a word when one collapses."""

import inspect
import logging
import math
from collections.abc import Iterable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ..bottlenecks.composite import Composite
from ..bottlenecks.contract import Bottleneck
from ..distributed import gather_rows, processes, sums_over_processes
from ..masking import prefix_mask
from ..metrics.rate import CodeCounts, entropy

__all__ = ["Health", "remedies"]

_log = logging.getLogger(__name__)

FLOOR = 0.05  # share of the possible perplexity below which a book counts as collapsed
PATIENCE = 3  # readings in a row
RISE = 1.1  # from one reading to the next: a book that grows so is waking up, as many do at the start of a run

# What a bottleneck's argument can do for a collapsed book; the value that it may have already, in which case it can't.
REMEDIES: dict[str, tuple[str, object]] = {
    "initialise": ("initialise=true (k-means of the first batch)", None),
    "revival": ("a larger revival", None),
    "cosine": ("cosine=true", True),
    "entropy": ("a larger entropy", None),
    "codebook_size": ("a smaller codebook_size", None),
    "levels": ("fewer levels", None),
    "bits": ("fewer bits", None),
}


def remedies(bottleneck: Bottleneck) -> list[str]:
    """Say for each book what to change when it collapses: what its own bottleneck's arguments offer."""
    if isinstance(bottleneck, Composite):
        found = [""] * len(bottleneck.book_sizes)
        for part, places in zip(bottleneck.parts, bottleneck.places, strict=True):
            assert isinstance(part, Bottleneck)
            for place, words in zip(places, remedies(part), strict=True):
                found[place] = words
        return found
    return [_remedy(bottleneck)] * len(bottleneck.book_sizes)


def _remedy(bottleneck: Bottleneck) -> str:
    known = inspect.signature(type(bottleneck)).parameters
    offered = [
        words
        for name, (words, done) in REMEDIES.items()
        if name in known and (done is None or getattr(bottleneck, name, None) != done)
    ]
    words = [f"bottleneck: {', '.join(offered)}"] if offered else []
    if "initialise" not in known and "codebook_size" in known:
        words.append("bottleneck=vq_ema (k-means, dead entries replaced)")
    return "; ".join([*words, "codec.unit_latents=true", "a lower optim.codec.lr"])


class Health:
    """Collects the codes of training and tells each book's use, the same way for all bottlenecks.

    Adding is a sum that stays on the device; processes are brought together at a reading only. A reading says for
    each book `health/bookI/used`, the share of entries that occurred out of those that could have (as many as the
    book has, or as many as there were codes); `.../entropy`, in bits, of the codes seen, below the true one where they
    are few for the size of the book; `.../perplexity`, 2 to its power. `health/used` and the others are means over
    books; `health/bits_per_token` is the sum of the entropies, what a token with all books says at most, and
    `health/bits_per_position` what the kept codes say of each pixel (times the sample rate: bit/s). Entries that a
    bottleneck replaces are its own metric, `bottleneck/replaced`. `rate/tokens` and `rate/bits` are what was kept of a
    signal, or of a block: tokens of the book that has most, and bits of all books, packed.

    A book whose perplexity stays below a share of what is possible, `(perplexity - 1) / (possible - 1)`, for some
    readings in a row without rising is told to the log, once, with what to change.

    Args:
        bottleneck: Whose codes they are; one without books has no health, and every call does nothing.
        floor: The share.
        patience: The readings.
    """

    def __init__(self, bottleneck: Bottleneck, floor: float = FLOOR, patience: int = PATIENCE) -> None:
        self.book_sizes = tuple(bottleneck.book_sizes)
        self.remedies = remedies(bottleneck) if self.book_sizes else []
        self.floor = floor
        self.patience = patience
        self.low = [0] * len(self.book_sizes)  # readings in a row
        self.last = [math.inf] * len(self.book_sizes)  # perplexities of the last reading
        self.told: set[int] = set()
        self._counts: CodeCounts | None = None
        self._positions: Tensor | int = 0
        self._signals = 0

    def add(self, codes: Tensor, lengths: Tensor, depth: Tensor, positions: Tensor | int) -> None:
        """Take in a training batch.

        Args:
            codes: int64 `(b, books, n)`.
            lengths: int64 `(b,)`, tokens kept.
            depth: int64 `(b,)`, books kept.
            positions: Pixels or samples of all its signals together, without padding.
        """
        if not self.book_sizes:
            return
        if self._counts is None:
            self._counts = CodeCounts(self.book_sizes, codes.device)
        steps, books = prefix_mask(lengths, codes.shape[2]), prefix_mask(depth, codes.shape[1])
        self._counts.add(codes.detach(), books[:, :, None] & steps[:, None])
        self._positions = self._positions + positions
        self._signals += len(lengths)

    def read(self) -> dict[str, float]:
        """Give the numbers of all processes since the last reading, and start anew; every process must call it."""
        if self._counts is None:
            return {}
        counts = self._counts
        if processes() > 1:
            counts.gather()
        positions, signals = self._sizes()
        self._counts, self._positions, self._signals = None, 0, 0
        books = counts.books()
        values: dict[str, float] = {}
        entropies, seen = [entropy(book) for book in books], [int(book.sum()) for book in books]
        measures = {
            "used": [len(book) / max(1, self._possible(place, seen)) for place, book in enumerate(books)],
            "entropy": entropies,
            "perplexity": [2**bits for bits in entropies],
        }
        for name, numbers in measures.items():
            values |= {f"health/book{place}/{name}": number for place, number in enumerate(numbers)}
            values[f"health/{name}"] = sum(numbers) / len(numbers)
        values["health/bits_per_token"] = sum(entropies)
        said = sum(bits * count for bits, count in zip(entropies, seen, strict=True))
        values["health/bits_per_position"] = said / positions if positions else 0.0
        bits = sum(math.log2(size) * count for size, count in zip(self.book_sizes, seen, strict=True))
        values["rate/tokens"] = max(seen) / signals
        values["rate/bits"] = bits / signals
        self._warn(measures["perplexity"], seen)
        return values

    def state(self) -> dict[str, Any]:
        """Give what was added since the last reading, of all processes, and what is remembered of earlier ones."""
        state: dict[str, Any] = {"low": self.low, "last": self.last, "told": sorted(self.told)}
        if self._counts is not None:
            rows = self._counts.rows()
            state |= {"counts": gather_rows(rows).cpu(), "sizes": self._sizes()}
        return state

    def _sizes(self) -> list[int]:
        """Give the numbers of positions and of signals, over all processes."""
        assert self._counts is not None
        mine = torch.tensor([int(self._positions), self._signals], device=self._counts.dense.device)
        sizes: list[int] = sums_over_processes([mine])[0].tolist()
        return sizes

    def restore(self, state: dict[str, Any], process: int, device: torch.device) -> None:
        """Go on from a `state`: the first process with all that was counted, as a reading sums them."""
        self.low, self.last, self.told = list(state["low"]), list(state["last"]), set(state["told"])
        if "counts" in state:
            self._counts, self._positions, self._signals = CodeCounts(self.book_sizes, device), 0, 0
            if process == 0:
                self._counts.include(state["counts"].to(device))
                self._positions, self._signals = state["sizes"]

    def _possible(self, book: int, seen: list[int]) -> int:
        """Count the entries that could have occurred."""
        return min(self.book_sizes[book], seen[book])

    def _warn(self, perplexities: Iterable[float], seen: list[int]) -> None:
        """Tell of the books that have been low for long enough."""
        fallen: dict[str, list[str]] = {}
        for book, perplexity in enumerate(perplexities):
            possible = self._possible(book, seen)
            if possible < 2:  # there is nothing to choose, or nothing was chosen
                continue
            # The least perplexity is 1: in a small book that is a large share of what is possible.
            low = (perplexity - 1) / (possible - 1) < self.floor
            rises = perplexity > RISE * self.last[book]
            self.low[book] = self.low[book] + 1 if low and not rises else 0
            self.last[book] = perplexity
            if self.low[book] >= self.patience and book not in self.told:
                self.told.add(book)
                bits = math.log2(perplexity)
                worth = f"book {book} is worth {perplexity:.1f} of {possible} entries ({bits:.2f} bits)"
                fallen.setdefault(self.remedies[book], []).append(worth)
        if dist.is_available() and dist.is_initialized() and dist.get_rank():
            return
        for words, books in fallen.items():
            _log.warning("codes collapse: %s, %d readings in a row; try %s", ", ".join(books), self.patience, words)
