"""Codebook state updated without gradients (EMA, k-means, annealing), identical on every rank."""

from abc import ABC, abstractmethod

import torch
from torch import Tensor, nn
from torch.nn import functional

from ..distributed import broadcast_from_rank_zero, gather_rows, world_size
from .nearest import nearest

__all__ = ["Annealed", "Gathering", "MovingCodebook", "kmeans"]

SPARE = 16  # tokens per sample kept as replacements of dead entries
PER_ENTRY = 32  # tokens per entry for k-means
GOLDEN = 0.6180339887498949  # golden ratio: shifts the candidates' indices evenly from update to update


class Gathering(nn.Module, ABC):
    """Base of modules that gather statistics in the forward passes of an update and apply them after it.

    `Bottleneck.update` sums the statistics of all codebooks over all ranks in one collective, and calls `advance`.
    They are not a buffer: DistributedDataParallel would overwrite it with that of rank 0.
    """

    @property
    @abstractmethod
    def gathered(self) -> Tensor:
        """Return this rank's statistics, flat float32, of equal length on every rank."""

    @abstractmethod
    def advance(self, total: Tensor) -> None:
        """Apply the sum of `gathered` over all ranks, and reset it."""

    def forget(self) -> None:
        """Reset `gathered` without applying it."""
        self.gathered.zero_()


def kmeans(rows: Tensor, size: int, iterations: int = 10, cosine: bool = False) -> tuple[Tensor, Tensor]:
    """Cluster vectors by Lloyd's algorithm, initialized independently of their order.

    Args:
        rows: `(r, d)` float32, r at least 1; if r is below `size`, duplicates with a small noise are added.
        size: Number of clusters.
        iterations: Number of iterations.
        cosine: Normalize means to unit length (spherical k-means).

    Returns:
        Means `(size, d)` and the number of rows in each cluster, `(size,)`.
    """
    random = torch.Generator().manual_seed(0)
    chosen = _choose(rows, size, random)
    means = rows[chosen]
    double = chosen == torch.cat([chosen.new_full((1,), -1), chosen[:-1]])
    means[double] = _jitter(means[double], random, cosine)
    for _ in range(iterations):
        codes = nearest(rows, means)
        counts = rows.new_zeros(size).index_add_(0, codes, rows.new_ones(len(rows)))
        sums = torch.zeros_like(means).index_add_(0, codes, rows)
        updated = functional.normalize(sums, dim=1) if cosine else sums / counts.clamp(min=1)[:, None]
        means = torch.where((counts > 0)[:, None], updated, means)
    return means, counts


def _choose(rows: Tensor, count: int, random: torch.Generator) -> Tensor:
    """Return indices, int64 `(count,)`, of rows evenly ranked along a random direction, whatever the rows' order."""
    order = (rows @ torch.randn(rows.shape[1], generator=random).to(rows.device)).argsort()
    return order[torch.arange(count, device=rows.device) * len(rows) // max(count, 1)]


def _jitter(rows: Tensor, random: torch.Generator, cosine: bool) -> Tensor:
    """Add noise of 1 % of the vectors' root mean square, since rounding would decide between equal entries."""
    if not len(rows):
        return rows
    moved = rows + torch.randn(rows.shape, generator=random).to(rows.device) * (0.01 * rows.square().mean().sqrt())
    return functional.normalize(moved, dim=1) if cosine else moved


class MovingCodebook(Gathering):
    """Codebook of EMAs of the latents assigned to each entry (VQ-VAE, arXiv 1711.00937, appendix A).

    `N_k = decay N_k + (1 - decay) n_k`, `m_k = decay m_k + (1 - decay) sum(z)`, `e_k = m_k / N_k`. `advance` applies
    them once per update. Only forward passes in training with gradients are counted, not those for a discriminator.

    An entry whose count `N_k` falls below `revival` times the mean count is dead. It is replaced by a latent of the
    update's batches, in entry, sum and count alike, or the next average would undo it (Jukebox, arXiv 2005.00341,
    section 3.2, with a relative threshold). Counts are summed over ranks, so that all ranks take the same branch.

    Args:
        size: Entries, K.
        dim: Width of an entry.
        decay: EMA decay per update; 1: plain sums, in which all tokens have equal weight (mini-batch k-means).
        revival: Fraction of uniform usage, `total / K`, below which an entry is dead; 0: never.
        kmeans_init: Initialize by k-means of the first batch of all ranks.
        cosine: Normalize entries to unit length.
    """

    entries: Tensor
    counts: Tensor
    sums: Tensor
    initialised: Tensor
    age: Tensor
    replaced: Tensor
    smoothing = 1e-5  # Laplace smoothing of counts, as in the reference implementation of VQ-VAE

    def __init__(self, size: int, dim: int, decay: float, revival: float, kmeans_init: bool, cosine: bool) -> None:
        super().__init__()
        self.decay = decay
        self.revival = revival
        self.cosine = cosine
        entries = torch.randn(size, dim)
        entries = functional.normalize(entries, dim=1) if cosine else entries / dim**0.5
        self.register_buffer("entries", entries)
        self.register_buffer("counts", torch.ones(size))
        self.register_buffer("sums", entries.clone())
        # A buffer, so that a resumed run doesn't repeat k-means.
        self.register_buffer("initialised", torch.tensor(not kmeans_init))
        self.register_buffer("age", torch.zeros((), dtype=torch.int64))
        self.ready = not kmeans_init  # copy of `initialised` that needs no synchronization with the device
        self.register_buffer("replaced", torch.zeros(()), persistent=False)  # entries replaced by the last update
        self.flat: Tensor | None = None
        self.spare: list[Tensor] = []  # candidates for dead entries

    def start_from(self, entries: Tensor) -> None:
        """Take over entries `(K, d)`, each with a count of 1."""
        self.entries.copy_(entries)
        self.sums.copy_(entries)
        self.counts.fill_(1)
        self.initialised.fill_(True)
        self.ready = True

    @property
    def gathered(self) -> Tensor:
        """Return sums `(K + 1, d)` and counts `(K + 1,)` of latents per entry, flattened; the last is of padding."""
        size, dim = self.entries.shape
        if self.flat is None or self.flat.device != self.entries.device:
            self.flat = self.entries.new_zeros((size + 1) * (dim + 1))
        return self.flat

    def _split(self, flat: Tensor) -> tuple[Tensor, Tensor]:
        size, dim = self.entries.shape
        sums, counts = torch.split(flat, [(size + 1) * dim, size + 1])
        return sums.view(size + 1, dim), counts

    @torch.no_grad()
    def prepare(self, latents: Tensor, valid: Tensor) -> None:
        """Initialize by k-means of the valid latents `(b, n, d)` of all ranks, unless already done."""
        if self.ready:
            return
        if not bool(self.initialised):
            size = len(self.entries)
            rows = gather_rows(_spread(latents, valid, -(-PER_ENTRY * size // (len(latents) * world_size())), self.age))
            if not len(rows):  # no rank has a valid latent: wait for the next batch
                return
            means, counts = kmeans(rows, size, cosine=self.cosine)
            # An empty cluster gets count 1, or the next average would move it to 0.
            self._set(slice(None), broadcast_from_rank_zero(means), broadcast_from_rank_zero(counts.clamp(min=1)))
            self.initialised.fill_(True)
        self.ready = True

    @torch.no_grad()
    def gather(self, latents: Tensor, codes: Tensor, valid: Tensor) -> None:
        """Add the valid latents `(b, n, d)` with their codes `(b, n)` to the update's statistics."""
        sums, counts = self._split(self.gathered)
        chosen = torch.where(valid, codes, len(self.entries)).flatten()  # (b, n) -> (b * n)
        sums.index_add_(0, chosen, latents.reshape(len(chosen), -1))  # (b, n, d) -> (b * n, d)
        counts.index_add_(0, chosen, counts.new_ones(len(chosen)))
        if self.revival:
            self.spare.append(_spread(latents, valid, SPARE, self.age))

    @torch.no_grad()
    def advance(self, total: Tensor) -> None:
        """Update the averages by the statistics of all ranks, and replace dead entries."""
        sums, counts = (part[:-1] for part in self._split(total))
        if self.decay == 1:
            self.counts.add_(counts)
            self.sums.add_(sums)
        else:
            # Without valid tokens on any rank the averages don't decay.
            weight = torch.where(counts.sum() > 0, 1 - self.decay, 0.0)
            self.counts.lerp_(counts, weight)
            self.sums.lerp_(sums, weight)
        # Without valid tokens the entries stay bit-identical.
        self.entries.copy_(torch.where(counts.sum() > 0, self._means(), self.entries))
        self.age += 1
        self.gathered.zero_()
        if self.revival:
            self._revive()

    def forget(self) -> None:
        """Drop the gathered statistics and candidates."""
        super().forget()
        self.spare = []

    def _means(self) -> Tensor:
        if self.cosine:
            return functional.normalize(self.sums, dim=1)
        whole, smoothing = self.counts.sum(), self.smoothing
        return self.sums / ((self.counts + smoothing) / (whole + len(self.counts) * smoothing) * whole)[:, None]

    def _limits(self) -> tuple[Tensor, Tensor]:
        """Return the count below which an entry is dead, and the count of its replacement; scalars."""
        even = self.counts.mean()
        return self.revival * even, even

    def _revive(self) -> None:
        least, count = self._limits()
        dead = (self.counts < least).nonzero()[:, 0]
        spare, self.spare = self.spare, []
        self.replaced.zero_()
        if not len(dead):
            return
        rows = gather_rows(torch.cat([*spare, self.entries[:0]]))
        dead = dead[: len(rows)]
        random = torch.Generator().manual_seed(int(self.age))
        revived = rows[_choose(rows, len(dead), random)]
        self._set(dead, _jitter(revived, random, self.cosine), count.expand(len(dead)))
        self.replaced.fill_(len(dead))

    def _set(self, where: Tensor | slice, entries: Tensor, counts: Tensor) -> None:
        self.entries[where] = entries
        self.counts[where] = counts
        self.sums[where] = entries * counts[:, None]

    def _load_from_state_dict(self, *args: object) -> None:
        super()._load_from_state_dict(*args)
        self.ready = False  # until `prepare` reads `initialised`


def _spread(latents: Tensor, valid: Tensor, count: int, age: Tensor) -> Tensor:
    """Select up to `count` evenly spaced valid tokens of each sample, however the batch is divided among ranks."""
    lengths = valid.sum(1, keepdim=True)
    shift = (age.double() * GOLDEN).frac()
    steps = torch.arange(min(count, latents.shape[1]), device=latents.device)
    indices = ((steps + shift) / len(steps) * lengths).long().clamp(max=latents.shape[1] - 1)
    rows = latents.gather(1, indices[..., None].expand(-1, -1, latents.shape[2]))
    # Keep each token of a sample shorter than `count` only once.
    first = torch.cat([torch.ones_like(indices[:, :1], dtype=torch.bool), indices.diff(dim=1) > 0], 1)
    return rows[first & (lengths > 0)]


class Annealed(Gathering):
    """Scalar that changes linearly from `start` to `end` and then stays.

    Args:
        start: Initial value.
        end: Final value.
        updates: Number of updates until `end`.
    """

    passed: Tensor

    def __init__(self, start: float, end: float, updates: int) -> None:
        super().__init__()
        self.start, self.end, self.updates = start, end, updates
        self.register_buffer("passed", torch.zeros(()))

    @property
    def gathered(self) -> Tensor:
        """Return an empty tensor: updates are counted, nothing is gathered."""
        return self.passed.new_zeros(0)

    def advance(self, total: Tensor) -> None:
        """Count an update."""
        self.passed += 1

    @property
    def value(self) -> Tensor:
        """Return the current value, a scalar."""
        return self.start + (self.end - self.start) * (self.passed / max(self.updates, 1)).clamp(max=1)
