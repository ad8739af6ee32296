"""Bitrate of codes, and usage of codebooks.

k tokens have two rates: the exact payload, `k * sum(log2(codebook size))` bits, which is that of an ideal coder of
uniformly distributed codes (`Codec.bits`); and bytes, with whole bits for each index. In a codec with run lengths, a
repeated token counts once, plus a flag for each position.
"""

import math
from collections.abc import Sequence
from itertools import accumulate, pairwise, zip_longest
from typing import NamedTuple

import torch
from torch import Tensor

from ..distributed import exchange_rows, sum_over_ranks, world_size
from .metric import Column

__all__ = [
    "BYTES",
    "KEPT",
    "USE",
    "USED",
    "CodeCounts",
    "Use",
    "definitions",
    "entropy",
    "packed_bytes",
    "run_flags",
]

DENSE = 1 << 16  # largest codebook with a counter for each entry
PENDING = 1 << 20  # codes of a larger codebook that are buffered before they are counted

USE = ("usage", "entropy", "perplexity")  # columns of codecs with codebooks

KEPT = (Column("k", "tokens", "{:.0f}"), Column("codebooks", "codebooks", "{:.0f}"))
BYTES = Column("bytes", "bytes", "{:.0f}", label="bytes per {}")
USED = (Column("usage", "used", "{:.1%}"), Column("entropy", "entropy", "{:.2f}"))


def definitions(noun: str, axis: str, counted: bool, runs: bool = False) -> dict[str, str]:
    """Return the definitions of the rate and usage columns, for the header of a table.

    Args:
        noun: Noun for one signal.
        axis: "k" if a shorter code has fewer tokens, "codebooks" if it has fewer codebooks.
        counted: Whether the codec has codebooks.
        runs: Whether a run of equal tokens at a position counts once.
    """
    whole = f"mean payload of one {noun}"
    if axis == "k":
        meanings = {
            "k": "tokens kept, per block if a clip has blocks; a block with fewer tokens keeps and counts all of them",
            "bits": f"{whole}, exact: k * sum of log2(codebook size) over the codebooks",
            "bytes": f"{whole}, packed in whole bits: ceil(k * sum of ceil(log2(codebook size)) / 8)",
        }
        codes = f"the first k codes of all {noun}s"
    else:
        meanings = {
            "codebooks": "codebooks kept of each token",
            "bits": f"{whole}, exact: its tokens * sum of log2(codebook size) over the kept codebooks",
            "bytes": f"{whole}, packed in whole bits: ceil(its tokens * sum of ceil(log2(codebook size)) / 8)",
        }
        codes = f"the codes of all {noun}s"
        if runs:
            flags = "plus flags that mark repeated tokens, which are left out,"
            meanings["bits"] += f", {flags} n H(share)"
            meanings["bytes"] += f", {flags} by a bit each"
    if counted:
        meanings |= {
            "usage": f"share of a codebook's entries that occur among {codes}, mean over kept codebooks",
            "entropy": "bits, of the distribution of a codebook's entries among those codes, mean over kept codebooks",
            "perplexity": "2 ** entropy of a codebook, mean over kept codebooks",
        }
    return meanings


def packed_bytes(codebook_sizes: Sequence[int], tokens: int, strides: Sequence[int] = ()) -> int:
    """Return the bytes of packed codes, without a header: `ceil(sum(ceil(tokens / stride) * ceil(log2(size))) / 8)`.

    Args:
        codebook_sizes: Number of entries of each codebook.
        tokens: Number of tokens.
        strides: Tokens per index of each codebook; 1 for codebooks beyond its end.
    """
    pairs = zip_longest(codebook_sizes, strides[: len(codebook_sizes)], fillvalue=1)
    return -(-sum(-(-tokens // stride) * (size - 1).bit_length() for size, stride in pairs) // 8)


def run_flags(codes: Tensor) -> tuple[int, float, int]:
    """Count a clip's transmitted tokens and flag bits if a token that equals the previous one in time is omitted.

    Args:
        codes: int64 `(codebooks, t, h, w)`.

    Returns:
        The number of transmitted tokens; the flags' ideal bits, `n H(share of changed tokens)` for the n positions
        after the first step; and their bits at one each, n.
    """
    frame = math.prod(codes.shape[2:])
    positions = (codes.shape[1] - 1) * frame
    changed = int((codes[:, 1:] != codes[:, :-1]).any(0).sum())
    share = changed / max(1, positions)
    ideal = -sum(positions * p * math.log2(p) for p in (share, 1 - share) if p > 0)
    return frame + changed, ideal, positions


class Use(NamedTuple):
    """Usage of a codebook.

    Attributes:
        entries: Number of entries that occur.
        codes: Number of codes.
        entropy: Entropy of the codes, in bits.
    """

    entries: int
    codes: int
    entropy: float

    @property
    def perplexity(self) -> float:
        """Number of evenly used entries with that entropy."""
        return float(2**self.entropy)


class CodeCounts:
    """Histogram of the code indices of each codebook, or layer of codebooks that share entries, of any size.

    A codebook of up to 2^16 entries has a counter per entry, updated without a device synchronization. Counters for
    2^36 entries wouldn't fit in memory: the codes of larger codebooks are buffered and counted by sorting.

    Processes sum the counters. The entries of larger codebooks are shared out instead: after `gather` a process has the
    counts, over all processes, of its own entries, and `summary` sums over processes. Gathered by each of 64 processes,
    the rows of 50 updates would be a gigabyte.

    Args:
        codebook_sizes: Number of entries of each codebook.
        device: Device of the codes.
        layers: Numbers of consecutive codebooks that are counted together, `Bottleneck.codebook_layers`; 1 each if
            empty.

    Attributes:
        codebook_sizes: Number of entries of each histogram's codebooks.
    """

    def __init__(
        self, codebook_sizes: Sequence[int], device: torch.device | str = "cpu", layers: Sequence[int] = ()
    ) -> None:
        layers = layers or [1] * len(codebook_sizes)
        ends = list(accumulate(layers, initial=0))
        self.codebook_sizes = tuple(codebook_sizes[start] for start in ends[:-1])
        self.small = [codebook for codebook, size in enumerate(self.codebook_sizes) if size <= DENSE]
        self.starts = [0]
        for codebook in self.small:
            self.starts.append(self.starts[-1] + self.codebook_sizes[codebook])
        # One more counter, for invalid codes.
        self.dense = torch.zeros(self.starts[-1] + 1, dtype=torch.int64, device=device)
        self.slices = [slice(*pair) for pair in pairwise(ends)]  # positions of each one's codes
        sizes = [ends[codebook + 1] - ends[codebook] for codebook in self.small]
        positions = [row for codebook in self.small for row in range(*ends[codebook : codebook + 2])]
        self.positions = torch.tensor(positions, dtype=torch.int64, device=device)
        offsets = [start for start, size in zip(self.starts, sizes, strict=False) for _ in range(size)]
        self.offsets = torch.tensor(offsets, dtype=torch.int64, device=device)[:, None]
        large = [codebook for codebook in range(len(self.codebook_sizes)) if codebook not in self.small]
        self.pending: dict[int, list[Tensor]] = {codebook: [] for codebook in large}
        self.waiting = 0
        self.counted = self.dense.new_zeros(0, 3)
        self.shared = False  # whether another process has the rest of a large codebook's entries

    def add(self, codes: Tensor, valid: Tensor | None = None) -> None:
        """Count codes.

        Args:
            codes: int64 `(b, codebooks, n)`.
            valid: bool `(b, codebooks, n)`, mask of the codes to count; all if None.
        """
        if self.small:
            chosen = codes[:, self.positions] + self.offsets
            if valid is not None:
                chosen = torch.where(valid[:, self.positions], chosen, self.starts[-1])
            self.dense.index_add_(0, chosen.flatten(), torch.ones_like(chosen).flatten())
        for codebook, parts in self.pending.items():
            at = self.slices[codebook]
            own = codes[:, at]
            parts.append((own if valid is None else torch.where(valid[:, at], own, -1)).flatten().clone())
            self.waiting += parts[-1].numel()
        if self.waiting > PENDING * len(self.pending):
            self._count()

    def _count(self) -> None:
        """Count the buffered codes."""
        rows = [self.counted]
        for codebook, parts in self.pending.items():
            if parts:
                entries, counts = torch.unique(torch.cat(parts), return_counts=True)
                rows.append(torch.stack([torch.full_like(entries, codebook), entries, counts], 1)[entries >= 0])
                parts.clear()
        self.waiting = 0
        self.counted = _merge(torch.cat(rows))

    def rows(self) -> Tensor:
        """Return the entries that occur, int64 `(r, 3)`: codebook, entry and count."""
        self._count()
        rows = [self.counted]
        for codebook, start, end in zip(self.small, self.starts, self.starts[1:], strict=False):
            entries = self.dense[start:end].nonzero()[:, 0]
            rows.append(torch.stack([torch.full_like(entries, codebook), entries, self.dense[start + entries]], 1))
        return torch.cat(rows)

    def gather(self) -> None:
        """Sum the counts over all processes; a collective, which every process must call."""
        (self.dense,) = sum_over_ranks([self.dense])
        if self.pending:
            self._count()
            self.counted = _merge(exchange_rows(self.counted, self.counted[:, 1] % world_size()))
            self.shared = world_size() > 1

    def include(self, rows: Tensor) -> None:
        """Add the counts of another histogram's `rows()`."""
        for codebook, start in zip(self.small, self.starts, strict=False):
            own = rows[rows[:, 0] == codebook]
            self.dense.index_add_(0, own[:, 1] + start, own[:, 2])
        large = [rows[rows[:, 0] == codebook] for codebook in self.pending]
        self.counted = _merge(torch.cat([self.counted, *large]))

    def codebooks(self) -> list[Tensor]:
        """Return each codebook's counts of the entries that occur, int64 `(r,)`."""
        rows = self.rows()
        return [rows[rows[:, 0] == codebook, 2] for codebook in range(len(self.codebook_sizes))]

    def summary(self) -> list[Use]:
        """Return the usage of each codebook; if `shared`, a collective."""
        found = self.codebooks()
        numbers = torch.tensor([[len(counts), int(counts.sum())] for counts in found], device=self.dense.device)
        if self.shared:
            numbers = self._add_shares(numbers)
        totals = numbers[:, 1].tolist()
        bits = torch.tensor([entropy(*pair) for pair in zip(found, totals, strict=True)], dtype=torch.float64)
        if self.shared:
            bits = self._add_shares(bits.to(self.dense.device))
        return [Use(size, total, bit) for (size, total), bit in zip(numbers.tolist(), bits.tolist(), strict=True)]

    def _add_shares(self, values: Tensor) -> Tensor:
        """Sum the values of large codebooks over processes; those of the others are complete."""
        (sums,) = sum_over_ranks([values])
        large = list(self.pending)
        values[large] = sums[large]
        return values


def _merge(rows: Tensor) -> Tensor:
    """Sum the counts of rows `(r, 3)` with the same codebook and entry."""
    keys, which = torch.unique(rows[:, :2], dim=0, return_inverse=True)
    counts = rows.new_zeros(len(keys)).index_add_(0, which, rows[:, 2])
    return torch.cat([keys, counts[:, None]], 1)


def entropy(counts: Tensor, total: int | None = None) -> float:
    """Compute the entropy of code usage, `-sum p log2 p`, in bits in [0, log2(size)]; 0 without counts.

    This plug-in estimate is biased low if there are few codes for the size of the codebook.

    Args:
        counts: Counts of all entries, or of those that occur; or of some of these, whose terms are summed.
        total: Sum of all counts; that of `counts` if None.
    """
    share = counts.double() / (counts.sum() if total is None else torch.tensor(total)).clamp(min=1)
    return -float(torch.xlogy(share, share).sum()) / torch.log(torch.tensor(2.0, dtype=torch.float64)).item() + 0.0
