"""Nearest-neighbor search and lookup in a codebook of vectors."""

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.function import FunctionCtx, once_differentiable

__all__ = ["FrozenTable", "LiveTable", "Lookup", "lookup", "nearest"]

COLUMNS = 1 << 13  # entries per block of the search
GROUP = 64  # entries per first maximum on CPUs, where amax is vectorized and argmax is not


def nearest(latents: Tensor, codebook: Tensor, inner: bool = False) -> Tensor:
    """Return the index of the closest entry for each latent, by Euclidean distance or by inner product.

    Latents and entries are centered on the codebook's mean. Without centering, `|e|^2 - 2 z.e` in float32 gives 8 to
    19 % wrong codes for an off-center codebook, and codes that depend on the batch size. Scores are computed in blocks
    that fit the cache, never as a whole `(n, K)` tensor. Ties go to the first entry.

    Args:
        latents: `(..., d)` float32.
        codebook: `(K, d)` float32.
        inner: Choose the largest inner product instead of the smallest distance.

    Returns:
        int64 `(...)`, without gradient.
    """
    with torch.no_grad():
        center = codebook.mean(0)
        entries = codebook - center
        offset = entries.new_zeros(len(entries)) if inner else entries.square().sum(1) / -2
        flat = (latents if inner else latents - center).reshape(-1, latents.shape[-1])  # (..., d) -> (rows, d)
        codes, best = _search(flat, entries[:COLUMNS], offset[:COLUMNS])
        for start in range(COLUMNS, len(entries), COLUMNS):
            part = slice(start, start + COLUMNS)
            later, score = _search(flat, entries[part], offset[part])
            codes = torch.where(score > best, later + start, codes)
            best = torch.maximum(score, best)
        return codes.reshape(latents.shape[:-1])


def _search(flat: Tensor, entries: Tensor, offset: Tensor) -> tuple[Tensor, Tensor]:
    """Return each row's best entry and its score, computed block by block."""
    size, on_cpu = len(entries), flat.device.type == "cpu"
    padding = -size % GROUP if on_cpu and size > GROUP else 0
    if padding:
        entries = nn.functional.pad(entries, (0, 0, 0, padding))
        offset = nn.functional.pad(offset, (0, padding), value=-torch.inf)
    # 4 MiB of scores fit a CPU's cache; a GPU needs large matrix products.
    rows = max(1, (1 << 20 if on_cpu else 1 << 26) // len(entries))
    scores = flat.new_empty(min(rows, len(flat)), len(entries))
    codes, best = flat.new_empty(len(flat), dtype=torch.int64), flat.new_empty(len(flat))
    for start in range(0, len(flat), rows):
        part = flat[start : start + rows]
        block = torch.addmm(offset, part, entries.T, out=scores[: len(part)])
        out = (best[start : start + rows], codes[start : start + rows])
        if not on_cpu or size <= GROUP:
            torch.max(block, 1, out=out)
            continue
        groups = block.view(len(part), -1, GROUP)  # (rows, K) -> (rows, groups, GROUP)
        group = groups.amax(2).argmax(1)
        torch.max(groups[torch.arange(len(part)), group], 1, out=out)
        out[1].add_(group, alpha=GROUP)
    return codes, best


class Lookup(NamedTuple):
    """Result of `lookup`.

    Attributes:
        latents: `(b, n, d)`: the entries e, bit for bit, whose gradient is passed to the latents z.
        codes: int64 `(b, n)`.
        pull: `(b, n)`, codebook loss `|sg(z) - e|^2 / d`.
        commitment: `(b, n)`, commitment loss `|z - sg(e)|^2 / d`.
    """

    latents: Tensor
    codes: Tensor
    pull: Tensor
    commitment: Tensor


class _Lookup(torch.autograd.Function):
    """Search, lookup and losses in one function, which keeps only latents, codes and codebook for backward."""

    @staticmethod
    def forward(
        ctx: FunctionCtx, latents: Tensor, codebook: Tensor, rotate: bool
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        codes = nearest(latents, codebook)
        quantized = nn.functional.embedding(codes, codebook)
        distance = latents.new_empty(len(latents))
        for part in _parts(latents):
            torch.mean((latents[part] - quantized[part]).square_(), 1, out=distance[part])
        # Backward looks the entries up again: in a residual stack every level would keep a tensor of them.
        ctx.save_for_backward(latents, codes, codebook)
        ctx.mark_non_differentiable(codes)
        ctx.rotate, ctx.size = rotate, len(codebook)  # type: ignore[attr-defined]
        return quantized, codes, distance, distance.clone()

    @staticmethod
    @once_differentiable
    def backward(
        ctx: FunctionCtx, gradient: Tensor, codes_gradient: None, pull: Tensor, commitment: Tensor
    ) -> tuple[Tensor | None, Tensor | None, None]:
        latents, codes, codebook = ctx.saved_tensors  # type: ignore[attr-defined]
        for_latents, for_codebook, _ = ctx.needs_input_grad  # type: ignore[attr-defined]
        to_latents = torch.empty_like(latents) if for_latents else None
        to_codebook = latents.new_zeros(ctx.size, latents.shape[1]) if for_codebook else None  # type: ignore[attr-defined]
        scale = 2 / latents.shape[1]
        for part in _parts(latents):
            quantized = nn.functional.embedding(codes[part], codebook)
            away = latents[part] - quantized
            if to_codebook is not None:
                to_codebook.index_add_(0, codes[part], away * (pull[part] * -scale)[:, None])
            if to_latents is not None:
                passed = _rotate(gradient[part], latents[part], quantized) if ctx.rotate else gradient[part]  # type: ignore[attr-defined]
                torch.addcmul(passed, away, (commitment[part] * scale)[:, None], out=to_latents[part])
        return to_latents, to_codebook, None


def _parts(rows: Tensor) -> list[slice]:
    """Split a matrix into blocks of rows that fit a CPU's cache; into one block on other devices."""
    step = max(1, (1 << 17) // rows.shape[1]) if rows.device.type == "cpu" else max(1, len(rows))
    return [slice(start, start + step) for start in range(0, len(rows), step)]


def _rotate(gradient: Tensor, latents: Tensor, quantized: Tensor) -> Tensor:
    """Multiply a gradient by the transpose of the rotation and scaling that maps each latent to its entry."""
    length = torch.linalg.vector_norm(latents, dim=1, keepdim=True).clamp(min=1e-6)
    target = torch.linalg.vector_norm(quantized, dim=1, keepdim=True)
    start, end = latents / length, quantized / target.clamp(min=1e-6)
    between = nn.functional.normalize(start + end, dim=1, eps=1e-6)
    turned = (
        gradient
        - 2 * between * (between * gradient).sum(1, keepdim=True)
        + 2 * start * (end * gradient).sum(1, keepdim=True)
    )
    result: Tensor = turned * (target / length)
    return result


def lookup(latents: Tensor, codebook: Tensor, rotate: bool = False) -> Lookup:
    """Replace each latent by its nearest entry, and compute the codebook and commitment losses.

    Args:
        latents: `(b, n, d)` float32.
        codebook: `(K, d)` float32.
        rotate: Transform the gradient by the rotation and scaling that maps the latent to its entry, which preserves
            its angle to the entry (rotation trick, arXiv 2410.06424, section 4.2); straight through if False.
    """
    shape = latents.shape[:-1]
    quantized, codes, pull, commitment = _Lookup.apply(latents.reshape(-1, latents.shape[-1]), codebook, rotate)
    return Lookup(quantized.view(latents.shape), codes.view(shape), pull.view(shape), commitment.view(shape))


class FrozenTable(nn.Module):
    """Export form of one codebook of vectors: a centered matrix product, an argmax and a table.

    Args:
        codebook: `(K, d)`.
        normalize: Normalize latents to unit length before the search (cosine codebooks).
        inner: Search by inner product.
    """

    center: Tensor
    entries: Tensor
    offset: Tensor
    table: Tensor

    def __init__(self, codebook: Tensor, normalize: bool = False, inner: bool = False) -> None:
        super().__init__()
        codebook = codebook.detach().float()
        center = codebook.mean(0)
        entries = codebook - center
        offset = (entries.double().square().sum(1) / -2).float()
        self.normalize = normalize
        self.register_buffer("center", torch.zeros_like(center) if inner else center)
        self.register_buffer("entries", entries.T.contiguous())
        self.register_buffer("offset", torch.zeros_like(offset) if inner else offset)
        self.register_buffer("table", codebook.clone())

    def encode(self, latents: Tensor) -> Tensor:
        """Quantize latents `(b, n, d)` to int64 codes `(b, 1, n)`."""
        if self.normalize:
            latents = nn.functional.normalize(latents, dim=-1)
        return (torch.matmul(latents - self.center, self.entries) + self.offset).argmax(-1).unsqueeze(1)

    def decode(self, codes: Tensor) -> Tensor:
        """Look up codes `(b, 1, n)` as latents `(b, n, d)`."""
        return nn.functional.embedding(codes[:, 0], self.table)


class LiveTable(FrozenTable):
    """A `FrozenTable` that searches in blocks by `nearest`, which is faster but not exportable."""

    def __init__(self, codebook: Tensor, normalize: bool = False, inner: bool = False) -> None:
        super().__init__(codebook, normalize, inner)
        self.inner = inner

    def encode(self, latents: Tensor) -> Tensor:
        """Quantize latents `(b, n, d)` to int64 codes `(b, 1, n)`."""
        latents = nn.functional.normalize(latents, dim=-1) if self.normalize else latents
        return nearest(latents, self.table, self.inner)[:, None]
