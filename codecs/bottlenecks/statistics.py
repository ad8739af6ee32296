"""Codebook state updated without gradients (EMA, k-means, annealing), identical on every rank."""

from abc import ABC, abstractmethod
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional

from ..distributed import broadcast_from_rank_zero, gather_rows, gather_stacked, rank, sum_over_ranks, world_size
from .nearest import nearest

__all__ = ["Annealed", "Gathering", "MovingCodebook", "kmeans", "replace_dead"]

SPARE = 16  # tokens per sample kept as replacements of dead entries
SLOTS = 1 << 12  # of a rank's replacements, all ranks', and of entries replaced by an update
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
    random = torch.Generator(rows.device).manual_seed(0)
    chosen = _project(rows, random).argsort()[torch.arange(size, device=rows.device) * len(rows) // size]
    double = chosen == torch.cat([chosen.new_full((1,), -1), chosen[:-1]])
    means = _jitter(rows[chosen], double, random, cosine)
    for _ in range(iterations):
        codes = nearest(rows, means)
        counts = rows.new_zeros(size).index_add_(0, codes, rows.new_ones(len(rows)))
        sums = torch.zeros_like(means).index_add_(0, codes, rows)
        updated = functional.normalize(sums, dim=1) if cosine else sums / counts.clamp(min=1)[:, None]
        means = torch.where((counts > 0)[:, None], updated, means)
    return means, counts


def _project(rows: Tensor, random: torch.Generator) -> Tensor:
    """Return the component of rows `(r, d)` along a random direction, which orders them whatever their own order."""
    return rows @ torch.randn(rows.shape[1], generator=random, device=rows.device)


def _jitter(rows: Tensor, chosen: Tensor, random: torch.Generator, cosine: bool) -> Tensor:
    """Add noise of 1 % of their root mean square to the chosen rows: rounding would decide between equal entries."""
    power = torch.where(chosen[:, None], rows.square(), 0).sum() / (chosen.sum().clamp(min=1) * rows.shape[1])
    moved = rows + torch.randn(rows.shape, generator=random, device=rows.device) * (0.01 * power.sqrt())
    return torch.where(chosen[:, None], functional.normalize(moved, dim=1) if cosine else moved, rows)


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
        self.register_buffer("replaced", torch.zeros(()), persistent=False)  # entries replaced by the last update
        self.start_gathering(not kmeans_init)

    def start_gathering(self, ready: bool) -> None:
        """Set what isn't part of the state; `ready` is the value of `initialised`."""
        self.ready = ready  # needs no synchronization with the device
        self.seed: int | None = None  # such a copy of `age`; None: to be read
        self.flat: Tensor | None = None
        self.spare: list[tuple[Tensor, Tensor]] = []  # candidates for dead entries, and which are valid

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
            count = -(-PER_ENTRY * size // (len(latents) * world_size()))
            rows, there = _spread(latents, valid, min(count, latents.shape[1]), self.age)
            rows = gather_rows(rows[there])
            if not len(rows):  # no rank has a valid latent: wait for the next batch
                return
            means, counts = kmeans(rows, size, cosine=self.cosine)
            # An empty cluster gets count 1, or the next average would move it to 0.
            counts = broadcast_from_rank_zero(counts.clamp(min=1))
            self.replace(torch.ones_like(counts, dtype=torch.bool), broadcast_from_rank_zero(means), counts)
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
            rows, there = _spread(latents, valid, SPARE, self.age)
            self.spare.append((rows.flatten(0, 1), there.flatten()))  # (b, SPARE) -> (b * SPARE)

    @torch.no_grad()
    def advance(self, total: Tensor) -> None:
        """Update the averages by the statistics of all ranks; `replace_dead` comes after it."""
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
        self.seed = None if self.seed is None else self.seed + 1
        self.gathered.zero_()

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

    def replace(self, where: Tensor, entries: Tensor, counts: Tensor) -> None:
        """Replace the entries in `where`, bool `(K,)`, by those of `(K, d)`, with counts `(K,)` or a scalar."""
        self.entries.copy_(torch.where(where[:, None], entries, self.entries))
        self.counts.copy_(torch.where(where, counts, self.counts))
        self.sums.copy_(torch.where(where[:, None], self.entries * self.counts[:, None], self.sums))

    def _load_from_state_dict(self, *args: object) -> None:
        super()._load_from_state_dict(*args)
        self.ready, self.seed = False, None  # until they are read again


def _spread(latents: Tensor, valid: Tensor, count: int, age: Tensor) -> tuple[Tensor, Tensor]:
    """Select evenly spaced valid tokens of each sample, however the batch is divided among ranks.

    Returns:
        Tokens `(b, count, d)`, and bool `(b, count)`, False where a sample has no further one.
    """
    lengths = valid.sum(1, keepdim=True)
    shift = (age.double() * GOLDEN).frac()
    steps = torch.arange(count, device=latents.device)
    indices = ((steps + shift) / count * lengths).long().clamp(max=latents.shape[1] - 1)
    rows = latents.gather(1, indices[..., None].expand(-1, -1, latents.shape[2]))
    # Keep each token of a sample shorter than `count` only once.
    first = torch.cat([torch.ones_like(indices[:, :1], dtype=torch.bool), indices.diff(dim=1) > 0], 1)
    return rows, first & (lengths > 0)


@torch.no_grad()
def replace_dead(codebooks: Sequence[MovingCodebook]) -> None:
    """Replace the dead entries of codebooks by latents of all ranks, in two collectives for all codebooks together.

    No step waits for the device, since all shapes are fixed: which entries are dead, how many, and who gets which
    latent stays there. On a CPU, where reading costs nothing, codebooks without a dead entry are skipped.
    """
    found = [_Replacement(codebook) for codebook in codebooks]
    found = [each for each in found if each.due]
    keys = gather_stacked([each.keys for each in found])
    rows = sum_over_ranks([each.choose(ranked) for each, ranked in zip(found, keys, strict=True)])
    for each, chosen in zip(found, rows, strict=True):
        each.apply(chosen)


class _Replacement:
    """Replacement of a codebook's dead entries by candidates, evenly ranked along a random direction.

    Attributes:
        due: Whether anything may have to be replaced, the same on all ranks.
        keys: Components of this rank's candidates along that direction, `(slots,)`, infinite for missing ones.
    """

    def __init__(self, codebook: MovingCodebook) -> None:
        self.codebook = codebook
        least, self.count = codebook._limits()
        self.dead = codebook.counts < least
        spare, codebook.spare = codebook.spare, []
        codebook.replaced.zero_()
        many = world_size() > 1  # all ranks take part
        self.due = (many or len(spare) > 0) and (self.dead.device.type != "cpu" or bool(self.dead.any()))
        if not self.due:
            return
        if codebook.seed is None:
            codebook.seed = int(codebook.age)
        self.random = torch.Generator(self.dead.device).manual_seed(codebook.seed)
        self.rows = torch.cat([*(rows for rows, _ in spare), codebook.entries[:0]])
        there = torch.cat([*(valid for _, valid in spare), self.dead[:0]])
        self.keys = torch.where(there, _project(self.rows, self.random), torch.inf)
        if many:  # a batch may have fewer samples on one of them
            missing = SLOTS - len(self.keys)
            self.keys = functional.pad(self.keys, (0, missing), value=torch.inf)
            self.rows = functional.pad(self.rows, (0, 0, 0, missing))

    def choose(self, keys: Tensor) -> Tensor:
        """Return the candidates chosen from the keys of all ranks, `(ranks, slots)`: zeros for another rank's."""
        flat = keys.flatten()
        slots, most = keys.shape[1], min(len(self.dead), SLOTS)
        have = (flat < torch.inf).sum()
        self.number = torch.minimum(self.dead.sum(), have).clamp(max=most)
        self.places = torch.arange(most, device=flat.device)
        ranked = (self.places * have // self.number.clamp(min=1)).clamp(max=len(flat) - 1)
        chosen = flat.argsort()[ranked]
        return torch.where((chosen // slots == rank())[:, None], self.rows[chosen % slots], 0)

    def apply(self, rows: Tensor) -> None:
        """Replace the first dead entries by the chosen candidates."""
        rows = _jitter(rows, self.places < self.number, self.random, self.codebook.cosine)
        place = self.dead.cumsum(0) - 1
        where = self.dead & (place < self.number)
        self.codebook.replace(where, rows[place.clamp(0, len(rows) - 1)], self.count)
        self.codebook.replaced.copy_(self.number)


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
