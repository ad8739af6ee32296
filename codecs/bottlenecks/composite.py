"""Bases of bottlenecks composed of others: order, dropping and export of their codebooks."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional

from varitok import UserError

from ..masking import masked_mean, prefix_mask
from ..result import Quantized
from .contract import Bottleneck, FrozenCodebooks

__all__ = ["AddedCodebooks", "Composite", "FrozenComposite", "MeasuredParts", "overlap"]


class MeasuredParts:
    """Accumulator of parts' results by name: sums of penalties and counts, averages of other metrics."""

    def __init__(self) -> None:
        self.penalties: dict[str, Tensor] = {}
        self.metrics: dict[str, Tensor] = {}
        self.parts = 0

    def add(self, part: Quantized) -> None:
        """Add a part's penalties and metrics."""
        self.parts += 1
        for total, values in ((self.penalties, part.penalties), (self.metrics, part.metrics)):
            for name, value in values.items():
                total[name] = total[name] + value if name in total else value

    def means(self) -> dict[str, Tensor]:
        """Return the metrics: averages over parts, but the sum of `replaced`, a count."""
        return {name: value if name == "replaced" else value / self.parts for name, value in self.metrics.items()}


class Composite(Bottleneck):
    """Base of bottlenecks whose parts share one list of codebooks, from which a sample keeps a prefix.

    Args:
        dim: Width of the latents.
        parts: Bottlenecks, each with at least one codebook.
        interleave: Order codebooks level by level (the first codebook of every part, then the second); part by part if
            False.

    Raises:
        UserError: There are no parts, or one is continuous.
    """

    counts: Tensor

    def __init__(self, dim: int, parts: Sequence[Bottleneck], interleave: bool) -> None:
        super().__init__()
        if not parts or not all(part.codebook_sizes for part in parts):
            raise UserError("bottleneck: made of parts, each with a codebook; a continuous one has none")
        self.dim = dim
        self.parts = nn.ModuleList(parts)
        codebooks = [(level, index) for index, part in enumerate(parts) for level in range(len(part.codebook_sizes))]
        order = sorted(codebooks) if interleave else codebooks
        self.codebook_sizes = tuple(parts[index].codebook_sizes[level] for level, index in order)
        self.positions = [
            [position for position, (_, index) in enumerate(order) if index == p] for p in range(len(parts))
        ]
        counts = [
            [sum(position < kept for position in positions) for positions in self.positions]
            for kept in range(len(order) + 1)
        ]
        # counts[k, p]: number of part p's codebooks among the first k of all.
        self.register_buffer("counts", torch.tensor(counts), persistent=False)

    def run_part(self, index: int, latents: Tensor, lengths: Tensor, n_codebooks: Tensor) -> tuple[Quantized, Tensor]:
        """Quantize latents by a part; samples that keep none of its codebooks enter neither penalties nor metrics.

        Returns:
            The part's result, and its latents with zeros for samples that keep none of its codebooks.
        """
        part_codebooks = self.counts[n_codebooks, index]
        kept = part_codebooks > 0
        quantized: Quantized = self.parts[index](latents, torch.where(kept, lengths, 0), part_codebooks.clamp(min=1))
        return quantized, torch.where(kept[:, None, None], quantized.latents, 0.0)

    def arrange(self, codes: Sequence[Tensor]) -> Tensor:
        """Concatenate the parts' codes in the order of all codebooks: `(b, codebooks, n)`."""
        together = torch.cat(list(codes), 1)
        positions = [position for positions in self.positions for position in positions]
        order = sorted(range(len(positions)), key=positions.__getitem__)
        return together if positions == sorted(positions) else together[:, order]

    def decode_part(self, index: int, codes: Tensor) -> Tensor | None:
        """Decode a part from a prefix of all codebooks `(b, codebooks', n)`; None if none of its codebooks is in it."""
        positions = [position for position in self.positions[index] if position < codes.shape[1]]
        return self.parts[index].decode(codes[:, positions]) if positions else None  # type: ignore[operator]

    def thaw(self, frozen: nn.Module) -> None:
        """Take over the weights of all parts; see `Bottleneck.thaw`."""
        for part, other in zip(self.parts, frozen.parts, strict=True):  # type: ignore[arg-type]
            part.thaw(other.module)  # type: ignore[operator]


class _FrozenLeaf(nn.Module):
    """Export form of a part with one codebook."""

    positions: Tensor

    def __init__(self, module: nn.Module, positions: list[int]) -> None:
        super().__init__()
        self.module = module
        self.register_buffer("positions", torch.tensor(positions), persistent=False)

    def encode(self, latents: Tensor) -> Tensor:
        codes: Tensor = self.module.encode(latents)  # type: ignore[operator]
        return codes

    def decode(self, codes: Tensor) -> Tensor:
        latents: Tensor = self.module.decode(codes)  # type: ignore[operator]
        return latents

    @torch.jit.export  # otherwise TorchScript may compile the type, for another part, without this method
    def decode_kept(self, codes: Tensor, kept: Tensor) -> Tensor:
        latents: Tensor = self.module.decode(codes[:, self.positions])  # type: ignore[operator]
        return latents * kept[self.positions][0]


class _FrozenBranch(_FrozenLeaf):
    """Export form of a part with several codebooks."""

    @torch.jit.export
    def decode_kept(self, codes: Tensor, kept: Tensor) -> Tensor:
        latents: Tensor = self.module.decode_kept(codes[:, self.positions], kept[self.positions])  # type: ignore[operator]
        return latents


class FrozenComposite(FrozenCodebooks):
    """Base of the export forms of composites: subclasses add `encode`, and `decode_kept` unless parts are summed."""

    order: Tensor

    def __init__(self, composite: Composite) -> None:
        super().__init__(len(composite.codebook_sizes), composite.counts.device)
        pairs = zip(composite.parts, composite.positions, strict=True)
        self.parts = nn.ModuleList(
            (_FrozenLeaf if len(positions) == 1 else _FrozenBranch)(part.frozen(), positions)  # type: ignore[operator]
            for part, positions in pairs
        )
        positions = [position for positions in composite.positions for position in positions]
        order = sorted(range(len(positions)), key=positions.__getitem__)
        self.register_buffer("order", torch.tensor(order), persistent=False)

    def decode_kept(self, codes: Tensor, kept: Tensor) -> Tensor:
        """Sum the parts; see `FrozenCodebooks.decode_kept`."""
        total = self.parts[0].decode_kept(codes, kept)  # type: ignore[operator]
        for part in self.parts[1:]:
            total = total + part.decode_kept(codes, kept)  # type: ignore[operator]
        latents: Tensor = total
        return latents


class AddedCodebooks(FrozenCodebooks):
    """Codebooks that each quantize a slice of the residual's channels, and sum up when decoded; exportable.

    Residual levels share a slice; codebooks of a product have disjoint slices.

    Args:
        codebooks: Modules of one codebook each, with `encode` and `decode`.
        starts: First channel of each codebook's slice.
        width: Channels per slice.
        project_in: Map from latents to the codebooks' channels.
        project_out: Map from the codebooks' channels to latents.
        reach: Bound of the channels, `tanh(z / reach) * reach`; unbounded if empty.
    """

    reach: Tensor

    def __init__(
        self,
        codebooks: Sequence[nn.Module],
        starts: Sequence[int],
        width: int,
        project_in: nn.Module,
        project_out: nn.Module,
        reach: Tensor,
    ) -> None:
        super().__init__(len(codebooks), reach.device)
        self.codebooks = nn.ModuleList(codebooks)
        self.starts, self.width, self.total = list(starts), width, max(starts) + width
        self.project_in, self.project_out = project_in, project_out
        self.bounded = reach.numel() > 0
        self.register_buffer("reach", reach)

    def inner(self, latents: Tensor) -> Tensor:
        """Project latents `(b, n, d)` to the codebooks' channels `(b, n, c)`, and bound them."""
        inner: Tensor = self.project_in(latents)
        return torch.tanh(inner / self.reach) * self.reach if self.bounded else inner

    def embed(self, codebook: int, latents: Tensor) -> Tensor:
        """Zero-pad a codebook's vectors `(b, n, width)` to all channels, `(b, n, c)`."""
        return functional.pad(latents, [self.starts[codebook], self.total - self.starts[codebook] - self.width])

    def search(self, inner: Tensor) -> Tensor:
        """Quantize channels `(b, n, c)` to int64 codes `(b, codebooks, n)`."""
        codes: list[Tensor] = []
        for index, codebook in enumerate(self.codebooks):
            start = self.starts[index]
            found = codebook.encode(inner[..., start : start + self.width])  # type: ignore[operator]
            inner = inner - self.embed(index, codebook.decode(found))  # type: ignore[operator]
            codes.append(found)
        return torch.cat(codes, 1)

    def add(self, codes: Tensor, kept: Tensor) -> Tensor:
        """Return the sum `(b, n, c)` of the entries of codebooks in `kept`, bool `(b or 1, codebooks)`."""
        added: list[Tensor] = []
        for index, codebook in enumerate(self.codebooks):
            found = codebook.decode(codes[:, index : index + 1])  # type: ignore[operator]
            added.append(self.embed(index, found * kept[:, index, None, None]))
        total = added[0]
        for each in added[1:]:
            total = total + each
        return total

    def encode(self, latents: Tensor) -> Tensor:
        """Quantize latents `(b, n, d)` to int64 codes `(b, codebooks, n)`."""
        return self.search(self.inner(latents))

    def decode_kept(self, codes: Tensor, kept: Tensor) -> Tensor:
        """Sum the codebooks and project them; see `FrozenCodebooks.decode_kept`."""
        latents: Tensor = self.project_out(self.add(codes, kept.unsqueeze(0)))
        return latents


def overlap(latents: Sequence[Tensor], lengths: Tensor) -> Tensor:
    """Return the mean squared inner product of all pairs of parts' latents `(b, n, d)` over valid tokens."""
    valid = prefix_mask(lengths, latents[0].shape[1])
    pairs = [(one, other) for i, one in enumerate(latents) for other in latents[i + 1 :]]
    products = [masked_mean((one * other).sum(-1).square(), valid) for one, other in pairs]
    return torch.stack(products).mean()
