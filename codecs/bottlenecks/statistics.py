"""What a bottleneck learns by other means than a gradient, the same on every process."""

from abc import ABC, abstractmethod

import torch
from torch import Tensor, nn
from torch.nn import functional

from ..distributed import broadcast_from_rank_zero, gather_rows, world_size
from .nearest import nearest

__all__ = ["Annealed", "Gathering", "MovingCodebook", "kmeans"]

SPARE = 16  # tokens of each sample that are kept as candidates for dead entries
PER_ENTRY = 32  # tokens for each entry that k-means looks at
GOLDEN = 0.6180339887498949  # shifts the candidates' indices from one update to the next, evenly


class Gathering(nn.Module, ABC):
    """Something that gathers numbers in the forwards of an update and applies them after it.

    `Bottleneck.update` sums what all processes gathered, for all codebooks in one collective, and calls `advance`. What
    is gathered is no buffer: DistributedDataParallel would overwrite it with the first process's.
    """

    @property
    @abstractmethod
    def gathered(self) -> Tensor:
        """Float32, flat; of the same length on every process."""

    @abstractmethod
    def advance(self, total: Tensor) -> None:
        """Apply the sum of `gathered` over all processes, and begin anew."""

    def forget(self) -> None:
        """Begin anew without it."""
        self.gathered.zero_()


def kmeans(rows: Tensor, size: int, iterations: int = 10, cosine: bool = False) -> tuple[Tensor, Tensor]:
    """Cluster vectors by Lloyd's algorithm, the same way for the same vectors in whatever order.

    Args:
        rows: `(r, d)` float32, r at least 1; where r is below `size`, the rest begins close to the others.
        size: Clusters.
        iterations: Rounds.
        cosine: Means are scaled to unit length (spherical k-means).

    Returns:
        Means `(size, d)` and the rows in each `(size,)`.
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
    """Choose rows evenly along a random direction: the same ones in whatever order they come; int64 `(count,)`."""
    order = (rows @ torch.randn(rows.shape[1], generator=random).to(rows.device)).argsort()
    return order[torch.arange(count, device=rows.device) * len(rows) // max(count, 1)]


def _jitter(rows: Tensor, random: torch.Generator, cosine: bool) -> Tensor:
    """Move vectors by a hundredth of their size: between equal entries, rounding would decide."""
    if not len(rows):
        return rows
    moved = rows + torch.randn(rows.shape, generator=random).to(rows.device) * (0.01 * rows.square().mean().sqrt())
    return functional.normalize(moved, dim=1) if cosine else moved


class MovingCodebook(Gathering):
    """A codebook of moving averages of the latents that chose each entry (VQ-VAE, arXiv 1711.00937, appendix A).

    Statistics are gathered in training with gradients on, and applied by `advance`, once an update: a forward in
    evaluation or without gradient, as for a discriminator's turn, leaves no trace. Entries whose running count falls
    below a share of even use are replaced by latents of the update's batches; embedding, sum and count together, or the
    next average would undo it (Jukebox, arXiv 2005.00341, section 3.2, with a relative threshold). What is dead is
    decided from the summed counts, so that all processes take the same branch.

    Args:
        size: Entries, K.
        dim: Width of an entry.
        decay: Decay of the averages, for each update; 1: nothing is forgotten, and all tokens count equally (mini-batch
            k-means).
        revival: Share of even use, `total / K`, below which an entry is dead; 0: never.
        kmeans_init: Begin as the k-means of the first batch, over all processes.
        cosine: Entries have unit length.
    """

    entries: Tensor
    counts: Tensor
    sums: Tensor
    initialised: Tensor
    age: Tensor
    replaced: Tensor
    smoothing = 1e-5  # of counts, Laplace's, as in the reference implementation of VQ-VAE

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
        # A buffer: were it an attribute, a resumed run would begin with k-means again.
        self.register_buffer("initialised", torch.tensor(not kmeans_init))
        self.register_buffer("age", torch.zeros((), dtype=torch.int64))
        self.ready = not kmeans_init  # what `initialised` says, without waiting for the device
        self.register_buffer("replaced", torch.zeros(()), persistent=False)  # entries, by the last update
        self.flat: Tensor | None = None
        self.spare: list[Tensor] = []  # candidates for dead entries

    @property
    def gathered(self) -> Tensor:
        """Sums `(K + 1, d)` and counts `(K + 1,)` of the latents that chose each entry, flat; the last for padding."""
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
        """Initialize by k-means of the valid latents `(b, n, d)` of all processes, unless already done."""
        if self.ready:
            return
        if not bool(self.initialised):
            size = len(self.entries)
            rows = gather_rows(_spread(latents, valid, -(-PER_ENTRY * size // (len(latents) * world_size())), self.age))
            if not len(rows):  # on no process: wait for a batch that has some
                return
            means, counts = kmeans(rows, size, cosine=self.cosine)
            # An empty cluster counts as one token, or the next average would move it to 0.
            self._set(slice(None), broadcast_from_rank_zero(means), broadcast_from_rank_zero(counts.clamp(min=1)))
            self.initialised.fill_(True)
        self.ready = True

    @torch.no_grad()
    def gather(self, latents: Tensor, codes: Tensor, valid: Tensor) -> None:
        """Add latents `(b, n, d)` and their codes `(b, n)` to the update's statistics, where valid `(b, n)`."""
        sums, counts = self._split(self.gathered)
        chosen = torch.where(valid, codes, len(self.entries)).flatten()
        sums.index_add_(0, chosen, latents.reshape(len(chosen), -1))
        counts.index_add_(0, chosen, counts.new_ones(len(chosen)))
        if self.revival:
            self.spare.append(_spread(latents, valid, SPARE, self.age))

    @torch.no_grad()
    def advance(self, total: Tensor) -> None:
        """Move the averages by what all processes gathered, and replace dead entries."""
        sums, counts = (part[:-1] for part in self._split(total))
        if self.decay == 1:
            self.counts.add_(counts)
            self.sums.add_(sums)
        else:
            # Nothing valid anywhere: nothing is learnt and nothing forgotten.
            weight = torch.where(counts.sum() > 0, 1 - self.decay, 0.0)
            self.counts.lerp_(counts, weight)
            self.sums.lerp_(sums, weight)
        # A codebook that saw nothing stays as it is, bit for bit.
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
        """Return the count below which an entry is dead, and that of a revived one; scalars."""
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
        self.ready = False  # until `initialised` has been read


def _spread(latents: Tensor, valid: Tensor, count: int, age: Tensor) -> Tensor:
    """Take up to `count` valid tokens of each sample, evenly spaced: the same ones however the batch is shared out."""
    lengths = valid.sum(1, keepdim=True)
    shift = (age.double() * GOLDEN).frac()
    steps = torch.arange(min(count, latents.shape[1]), device=latents.device)
    indices = ((steps + shift) / len(steps) * lengths).long().clamp(max=latents.shape[1] - 1)
    rows = latents.gather(1, indices[..., None].expand(-1, -1, latents.shape[2]))
    # A sample shorter than `count` gives each of its tokens once.
    first = torch.cat([torch.ones_like(indices[:, :1], dtype=torch.bool), indices.diff(dim=1) > 0], 1)
    return rows[first & (lengths > 0)]


class Annealed(Gathering):
    """A number that moves in a straight line from one value to another while updates go by, and stays there.

    Args:
        start: Its first value.
        end: Its last.
        updates: Until it is there.
    """

    passed: Tensor

    def __init__(self, start: float, end: float, updates: int) -> None:
        super().__init__()
        self.start, self.end, self.updates = start, end, updates
        self.register_buffer("passed", torch.zeros(()))

    @property
    def gathered(self) -> Tensor:
        """Nothing."""
        return self.passed.new_zeros(0)

    def advance(self, total: Tensor) -> None:
        """Count an update."""
        self.passed += 1

    @property
    def value(self) -> Tensor:
        """A scalar."""
        return self.start + (self.end - self.start) * (self.passed / max(self.updates, 1)).clamp(max=1)
