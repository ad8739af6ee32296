"""Residual quantization in low-dimensional projections (DAC), without computing the residual itself."""

import math
from collections.abc import Iterator
from typing import Annotated

import torch
from torch import Tensor, nn
from torch.nn import functional

from ..masking import masked_mean, prefix_mask
from ..result import Quantized
from .contract import Bottleneck, FrozenCodebooks, straight_through
from .nearest import nearest

__all__ = ["FactorizedResidualQuantizer"]


class _FrozenFactorized(FrozenCodebooks):
    """Export form: one input projection, small corrections per level, one output projection."""

    into: Tensor
    into_bias: Tensor
    out: Tensor
    out_bias: Tensor
    entries: Tensor
    offset: Tensor
    center: Tensor
    table: Tensor
    correction: Tensor
    correction_bias: Tensor

    def __init__(self, quantizer: "FactorizedResidualQuantizer") -> None:
        super().__init__(quantizer.num_codebooks, quantizer.codebooks.device)
        unit = functional.normalize(quantizer.codebooks.detach().float(), dim=-1)
        center = unit.mean(1, keepdim=True)
        entries = unit - center
        correction, correction_bias = quantizer.corrections()
        for name, value in {
            "into": quantizer.into.weight,
            "into_bias": quantizer.into.bias,
            "out": quantizer.out.weight.T.contiguous(),
            "out_bias": quantizer.out_bias,
            "entries": entries.transpose(1, 2).contiguous(),  # (q, K, width) -> (q, width, K)
            "offset": (entries.double().square().sum(2) / -2).float(),
            "center": center[:, 0],
            "table": quantizer.codebooks,
            "correction": correction,
            "correction_bias": correction_bias,
        }.items():
            self.register_buffer(name, value.detach().float().clone())
        self.num_codebooks, self.width = quantizer.num_codebooks, quantizer.width

    def encode(self, latents: Tensor) -> Tensor:
        every = functional.linear(latents, self.into, self.into_bias)
        codes: list[Tensor] = []
        for codebook in range(self.num_codebooks):
            span = slice(codebook * self.width, (codebook + 1) * self.width)
            level = every[..., span]
            unit = functional.normalize(level, dim=-1) - self.center[codebook]
            code = (torch.matmul(unit, self.entries[codebook]) + self.offset[codebook]).argmax(-1)
            found = functional.embedding(code, self.table[codebook])
            every = every - torch.matmul(found, self.correction[:, span].T) - self.correction_bias[:, codebook]
            codes.append(code)
        return torch.stack(codes, 1)

    def decode_kept(self, codes: Tensor, kept: Tensor) -> Tensor:
        found: list[Tensor] = []
        for codebook in range(self.num_codebooks):
            found.append(functional.embedding(codes[:, codebook], self.table[codebook]) * kept[codebook])
        return torch.matmul(torch.cat(found, -1), self.out) + torch.matmul(kept.to(torch.float32), self.out_bias)


class FactorizedResidualQuantizer(Bottleneck):
    """RVQ with low-dimensional, cosine-matched codebooks (DAC, arXiv 2306.06546, section 3.2).

    Level i projects the residual to `width` dimensions, `p_i = A_i r_i + a_i`, takes the entry q_i of the largest
    cosine similarity, and subtracts its projection, `r_(i+1) = r_i - B_i q_i - b_i`. The residual is never computed:
    by linearity, `p_i = A_i z + a_i - sum_(j<i) (A_i B_j q_j + A_i b_j)`. One matrix product projects for all levels,
    `width x width` products correct, and one product projects back. Codes and gradients equal those of the definition.
    With 8 codebooks of 1024 x 8 on latents of width 1024 it is many times faster and smaller
    (`benchmarks/results/bottlenecks/bottlenecks.csv`). With one codebook it is BigCodec's quantizer (arXiv 2409.05377).

    Unlike the published projections, these have no weight norm. Each level has a straight-through estimator, as
    published, so that the projections of a level get gradient from later levels.

    Args:
        dim: Width of the latents.
        num_codebooks: Number of levels.
        codebook_size: Entries of each codebook.
        width: Width of the projections.
        commitment: Weight of the commitment loss; the codebook loss has weight 1. Both are summed over codebooks.
    """

    def __init__(
        self,
        dim: int,
        num_codebooks: Annotated[int, "[1, 1000]"],
        codebook_size: int = 1024,
        width: int = 8,
        commitment: float = 0.25,
    ) -> None:
        super().__init__()
        self.dim, self.num_codebooks, self.width = dim, num_codebooks, width
        self.codebook_sizes = (codebook_size,) * num_codebooks
        self.commitment = commitment
        self.into = nn.Linear(dim, num_codebooks * width)
        self.out = nn.Linear(num_codebooks * width, dim, bias=False)
        self.out_bias = nn.Parameter(torch.zeros(num_codebooks, dim))
        self.codebooks = nn.Parameter(torch.randn(num_codebooks, codebook_size, width))
        # Each level's output projection is a layer of its own, of fan-in `width`.
        nn.init.uniform_(self.out.weight, -1 / math.sqrt(width), 1 / math.sqrt(width))

    def corrections(self) -> tuple[Tensor, Tensor]:
        """Compute `A_i B_j` for all levels, `(q * width, q * width)`, and `A_i b_j`, `(q * width, q)`."""
        into = self.into.weight.float()
        return into @ self.out.weight.float(), into @ self.out_bias.float().T

    def _search(self, codebook: int, level: Tensor) -> tuple[Tensor, Tensor]:
        table = self.codebooks[codebook].float()
        codes = nearest(functional.normalize(level.detach(), dim=-1), functional.normalize(table.detach(), dim=-1))
        return codes, functional.embedding(codes, table)

    def _project(self, latents: Tensor) -> Tensor:
        return functional.linear(latents.float(), self.into.weight.float(), self.into.bias.float())

    def _expand(self, found: list[Tensor], kept: Tensor) -> Tensor:
        """Project the entries `(b, n, width)` of the codebooks that are kept, bool `(b, codebooks)`, and sum them."""
        stacked = torch.cat([torch.where(kept[:, i, None, None], part, 0.0) for i, part in enumerate(found)], -1)
        # The mask is one more input per codebook, whose weight is the bias: adding it needs no pass over the latents.
        present = kept.to(torch.float32)[:, None].expand(-1, stacked.shape[1], -1)
        weight = torch.cat([self.out.weight.float(), self.out_bias.float().T], 1)
        return functional.linear(torch.cat([stacked, present], -1), weight)

    def _levels(self, latents: Tensor) -> Iterator[tuple[Tensor, Tensor, Tensor, Tensor]]:
        """Yield each level's projection, codes, entries, and entries with a straight-through gradient."""
        every = self._project(latents)
        correction, shift = self.corrections()
        found: list[Tensor] = []
        for codebook in range(self.num_codebooks):
            rows = slice(codebook * self.width, (codebook + 1) * self.width)
            level = every[..., rows] - shift[rows, :codebook].sum(1)
            if found:
                level = level - functional.linear(torch.cat(found, -1), correction[rows, : codebook * self.width])
            code, entry = self._search(codebook, level)
            found.append(straight_through(level, entry))
            yield level, code, entry, found[-1]

    def forward(self, latents: Tensor, lengths: Tensor, n_codebooks: Tensor) -> Quantized:
        """Quantize; see `Bottleneck.forward`."""
        with torch.autocast(latents.device.type, enabled=False):
            valid = prefix_mask(lengths, latents.shape[1])
            kept = torch.arange(self.num_codebooks, device=n_codebooks.device) < n_codebooks[:, None]
            codes: list[Tensor] = []
            found: list[Tensor] = []
            pulls, commitments = self.out_bias.new_zeros(()), self.out_bias.new_zeros(())
            for codebook, (level, code, entry, passed) in enumerate(self._levels(latents)):
                measured = valid & kept[:, codebook, None]
                pulls = pulls + masked_mean((level.detach() - entry).square().mean(-1), measured)
                commitments = commitments + masked_mean((level - entry.detach()).square().mean(-1), measured)
                codes.append(code)
                found.append(passed)
            quantized = self._expand(found, kept)
        penalties = {"codebook": pulls, "commitment": self.commitment * commitments}
        return Quantized(
            quantized, torch.stack(codes, 1), penalties, {"distance": commitments.detach() / self.num_codebooks}
        )

    def encode(self, latents: Tensor) -> Tensor:
        """Quantize level by level; see `Bottleneck.encode`."""
        with torch.no_grad(), torch.autocast(latents.device.type, enabled=False):
            return torch.stack([code for _, code, _, _ in self._levels(latents)], 1)

    def decode(self, codes: Tensor) -> Tensor:
        """Sum the projected entries; see `Bottleneck.decode`."""
        with torch.autocast(codes.device.type, enabled=False):
            count = codes.shape[1]
            codes = functional.pad(codes, (0, 0, 0, self.num_codebooks - count))
            found = [
                functional.embedding(codes[:, codebook], self.codebooks[codebook].float())
                for codebook in range(self.num_codebooks)
            ]
            kept = torch.arange(self.num_codebooks, device=codes.device) < torch.full_like(codes[:, :1, 0], count)
            return self._expand(found, kept)

    def frozen(self) -> nn.Module:
        """Return the export form; see `Bottleneck.frozen`."""
        return _FrozenFactorized(self)
