"""What codes cost and how evenly they are used.

Two rates of k tokens: the exact payload, `k * sum(log2(codebook size))` bits, reached by an ideal coder of
unknown codes (`Codec.bits`); and the bytes of plain packing, whole bits for each index. In a codec with run
lengths a repeated token counts once, plus a flag for each position.
"""

import math
from collections.abc import Sequence
from itertools import zip_longest

import torch
from torch import Tensor

from ..distributed import gather_rows
from .metric import Column

__all__ = [
    "BYTES",
    "KEPT",
    "USE",
    "USED",
    "CodeCounts",
    "definitions",
    "entropy",
    "packed_bytes",
    "perplexity",
    "run_flags",
    "usage",
]

DENSE = 1 << 16  # entries up to which a codebook has a counter for each
PENDING = 1 << 20  # codes of a larger codebook that are kept as they are before they are counted

USE = ("usage", "entropy", "perplexity")  # those that only codebooks have

KEPT = (Column("k", "tokens", "{:.0f}"), Column("codebooks", "codebooks", "{:.0f}"))
BYTES = Column("bytes", "bytes", "{:.0f}", label="bytes per {}")
USED = (Column("usage", "used", "{:.1%}"), Column("entropy", "entropy", "{:.2f}"))


def definitions(noun: str, axis: str, counted: bool, runs: bool = False) -> dict[str, str]:
    """Return the definitions of the rate and usage columns, for the header of a table.

    Args:
        noun: Noun for one signal.
        axis: "k" if tokens are kept, "codebooks" if codebooks are.
        counted: Whether there are codebooks.
        runs: Whether a run of equal tokens at a position counts once.
    """
    whole = f"mean payload of one {noun}"
    if axis == "k":
        meanings = {
            "k": "tokens kept, of each block where a clip has blocks; a block that has fewer keeps and pays for those",
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
            "usage": f"share of a codebook's entries seen among {codes}, mean of the kept codebooks",
            "entropy": "bits, of the distribution of a codebook's entries among those codes, mean over kept codebooks",
            "perplexity": "2 ** entropy of a codebook, mean of the kept codebooks",
        }
    return meanings


def packed_bytes(codebook_sizes: Sequence[int], tokens: int, strides: Sequence[int] = ()) -> int:
    """Count the bytes of `tokens` tokens when each index takes `ceil(log2(codebook size))` bits, without a header.

    Args:
        codebook_sizes: Entries of each codebook.
        tokens: Number of tokens.
        strides: Tokens per index of each codebook; 1 if None.
    """
    pairs = zip_longest(codebook_sizes, strides[: len(codebook_sizes)], fillvalue=1)
    return -(-sum(-(-tokens // stride) * (size - 1).bit_length() for size, stride in pairs) // 8)


def run_flags(codes: Tensor) -> tuple[int, float, int]:
    """Count the transmitted codes of a clip if tokens equal to the one before, at the same position, are left out.

    Args:
        codes: int64 `(codebooks, t, h, w)`.

    Returns:
        Tokens that are sent, and the bits of the flags that say which: of an ideal coder that knows how many they are,
        and a bit for each position after the first step.
    """
    frame = math.prod(codes.shape[2:])
    positions = (codes.shape[1] - 1) * frame
    changed = int((codes[:, 1:] != codes[:, :-1]).any(0).sum())
    share = changed / max(1, positions)
    ideal = -sum(positions * p * math.log2(p) for p in (share, 1 - share) if p > 0)
    return frame + changed, ideal, positions


class CodeCounts:
    """Counts how often each entry of each codebook occurs, in codebooks of any size.

    A codebook of up to 2^16 entries has a counter for each, and adding to it doesn't wait for the device. Nothing has
    room for a counter for each of 2^36: a larger codebook's codes are kept, and sorted once in a while.

    Args:
        codebook_sizes: Entries of each codebook.
        device: Where the codes are.
    """

    def __init__(self, codebook_sizes: Sequence[int], device: torch.device | str = "cpu") -> None:
        self.codebook_sizes = tuple(codebook_sizes)
        self.small = [codebook for codebook, size in enumerate(self.codebook_sizes) if size <= DENSE]
        self.starts = [0]
        for codebook in self.small:
            self.starts.append(self.starts[-1] + self.codebook_sizes[codebook])
        # One more, for what isn't valid.
        self.dense = torch.zeros(self.starts[-1] + 1, dtype=torch.int64, device=device)
        self.positions = torch.tensor(self.small, dtype=torch.int64, device=device)
        self.offsets = torch.tensor(self.starts[:-1], dtype=torch.int64, device=device)[:, None]
        large = [codebook for codebook in range(len(self.codebook_sizes)) if codebook not in self.small]
        self.pending: dict[int, list[Tensor]] = {codebook: [] for codebook in large}
        self.waiting = 0
        self.counted = self.dense.new_zeros(0, 3)

    def add(self, codes: Tensor, valid: Tensor | None = None) -> None:
        """Count codes.

        Args:
            codes: int64 `(b, codebooks, n)`.
            valid: bool, `(b, codebooks, n)`, which of them count; all if None.
        """
        if self.small:
            chosen = codes[:, self.positions] + self.offsets
            if valid is not None:
                chosen = torch.where(valid[:, self.positions], chosen, self.starts[-1])
            self.dense.index_add_(0, chosen.flatten(), torch.ones_like(chosen).flatten())
        for codebook, parts in self.pending.items():
            own = codes[:, codebook]
            parts.append((own if valid is None else torch.where(valid[:, codebook], own, -1)).flatten().clone())
            self.waiting += parts[-1].numel()
        if self.waiting > PENDING * len(self.pending):
            self._count()

    def _count(self) -> None:
        """Turn the codes that wait into rows."""
        rows = [self.counted]
        for codebook, parts in self.pending.items():
            if parts:
                entries, counts = torch.unique(torch.cat(parts), return_counts=True)
                rows.append(torch.stack([torch.full_like(entries, codebook), entries, counts], 1)[entries >= 0])
                parts.clear()
        self.waiting = 0
        self.counted = _merge(torch.cat(rows))

    def rows(self) -> Tensor:
        """Return int64 rows `(r, 3)` of codebook, entry and count, only those that occur."""
        self._count()
        rows = [self.counted]
        for codebook, start, end in zip(self.small, self.starts, self.starts[1:], strict=False):
            entries = self.dense[start:end].nonzero()[:, 0]
            rows.append(torch.stack([torch.full_like(entries, codebook), entries, self.dense[start + entries]], 1))
        return torch.cat(rows)

    def gather(self) -> None:
        """Take in what all processes counted, so that each has the whole; every process must call it."""
        rows = gather_rows(self.rows())
        self.dense.zero_()
        self.counted = rows[:0]
        self.include(rows)

    def include(self, rows: Tensor) -> None:
        """Count what another one's `rows` say."""
        for codebook, start in zip(self.small, self.starts, strict=False):
            own = rows[rows[:, 0] == codebook]
            self.dense.index_add_(0, own[:, 1] + start, own[:, 2])
        large = [rows[rows[:, 0] == codebook] for codebook in self.pending]
        self.counted = _merge(torch.cat([self.counted, *large]))

    def codebooks(self) -> list[Tensor]:
        """Return each codebook's counts, int64 `(entries that occur,)`."""
        rows = self.rows()
        return [rows[rows[:, 0] == codebook, 2] for codebook in range(len(self.codebook_sizes))]


def _merge(rows: Tensor) -> Tensor:
    """Add up the counts of rows with the same codebook and entry."""
    keys, which = torch.unique(rows[:, :2], dim=0, return_inverse=True)
    counts = rows.new_zeros(len(keys)).index_add_(0, which, rows[:, 2])
    return torch.cat([keys, counts[:, None]], 1)


def usage(counts: Tensor, size: int | None = None) -> float:
    """Compute the share of a codebook's entries that occur, in [0, 1].

    Args:
        counts: Counts of all entries, or of those that occur.
        size: Entries of the codebook; as many as counts if None.
    """
    return int((counts > 0).sum()) / (len(counts) if size is None else size)


def entropy(counts: Tensor) -> float:
    """Compute the entropy of the entries' distribution, bits in [0, log2(size)]; 0 without counts.

    It is that of the counts, biased low if there are few codes for the size of the codebook.
    """
    share = counts.double() / counts.sum().clamp(min=1)
    return -float(torch.xlogy(share, share).sum()) / torch.log(torch.tensor(2.0, dtype=torch.float64)).item() + 0.0


def perplexity(counts: Tensor) -> float:
    """Compute 2 to the power of the entropy: how many evenly used entries the codes are worth."""
    return float(2 ** entropy(counts))
