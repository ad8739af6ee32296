"""Hierarchical quantization: each layer quantizes the residual of a token's cells at a finer resolution.

- HiTVideo: means over nested groups of cells, repeated for each cell; a codebook for each layer.
- VAR: area means at 1 x 1, 2 x 2, ... cells, enlarged by bicubic interpolation; one codebook for all layers.
"""

import copy
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from itertools import groupby, pairwise
from typing import Annotated

import torch
from torch import Tensor, nn
from torch.nn import functional

from varitok import UserError

from ..masking import masked_mean, prefix_mask
from ..result import Quantized
from .composite import MeasuredParts
from .contract import Bottleneck, FrozenCodebooks, straight_through

__all__ = ["Groups", "Hierarchy", "Resized", "Scale", "hierarchy", "multi_scale"]


class Scale(nn.Module, ABC):
    """Linear maps from a token's cells to the vectors that a layer codes, and back; scriptable.

    Args:
        groups: Number of vectors of a token, each of a cell's width.
        count: Number of cells of a token.
    """

    def __init__(self, groups: int, count: int) -> None:
        super().__init__()
        self.groups, self.count = groups, count

    @abstractmethod
    def down(self, cells: Tensor) -> Tensor:
        """Reduce cells `(b, count, n, d)` to vectors `(b * groups, n, d)`."""

    @abstractmethod
    def up(self, vectors: Tensor) -> Tensor:
        """Spread vectors `(b * groups, n, d)` over the cells `(b, count, n, d)`."""


class Groups(Scale):
    """Means over groups of consecutive cells, repeated for each of a group's cells (HiTVideo)."""

    def down(self, cells: Tensor) -> Tensor:
        """Average each group."""
        b, count, n, d = cells.shape
        return cells.reshape(b * self.groups, count // self.groups, n, d).mean(1)

    def up(self, vectors: Tensor) -> Tensor:
        """Repeat each mean for its group's cells."""
        n, d = vectors.shape[1], vectors.shape[2]
        spread = vectors.reshape(-1, self.groups, 1, n, d).expand(-1, -1, self.count // self.groups, -1, -1)
        return spread.reshape(-1, self.count, n, d)


class _Refinement(nn.Module):
    """Convolution after enlarging, mixed with its input: `(1 - share) x + share conv(x)` (VAR's phi).

    Without a bias, so that a layer that is left out adds nothing; it begins as the identity.
    """

    def __init__(self, dim: int, share: float) -> None:
        super().__init__()
        self.share = share
        self.conv = nn.Conv2d(dim, dim, 3, padding=1, bias=False)
        nn.init.dirac_(self.conv.weight)

    def forward(self, x: Tensor) -> Tensor:
        convolved: Tensor = self.conv(x)
        return x * (1 - self.share) + convolved * self.share


class Resized(Scale):
    """A square of cells, row by row, reduced to fewer by area and enlarged by bicubic interpolation (VAR).

    Args:
        side: Rows and columns of the reduced square.
        whole: Rows and columns of a token's cells.
        refinement: Layer on the enlarged squares `(b, d, whole, whole)`.
    """

    reduce: Tensor
    enlarge: Tensor

    def __init__(self, side: int, whole: int, refinement: nn.Module) -> None:
        super().__init__(side * side, whole * whole)
        self.whole = whole
        # Both maps act on rows and columns alike: each is the Kronecker square of one along an axis.
        reduce = functional.adaptive_avg_pool1d(torch.eye(whole)[None], side)[0].T
        enlarge = functional.interpolate(torch.eye(side)[None, None], (whole, side), mode="bicubic")[0, 0]
        self.register_buffer("reduce", torch.kron(reduce, reduce), persistent=False)
        self.register_buffer("enlarge", torch.kron(enlarge, enlarge), persistent=False)
        self.refinement = refinement

    def down(self, cells: Tensor) -> Tensor:
        """Average over areas."""
        b, _, n, d = cells.shape
        return (self.reduce @ cells.flatten(2)).reshape(b * self.groups, n, d)

    def up(self, vectors: Tensor) -> Tensor:
        """Interpolate and refine."""
        n, d = vectors.shape[1], vectors.shape[2]
        cells = self.enlarge @ vectors.reshape(-1, self.groups, n * d)  # (b * groups, n, d) -> (b, count, n * d)
        squares = cells.transpose(1, 2).reshape(-1, d, self.whole, self.whole)  # (b * n, d, rows, columns)
        refined: Tensor = self.refinement(squares)
        return refined.reshape(-1, n, d, self.count).permute(0, 3, 1, 2)


def _cells(latents: Tensor, count: int) -> Tensor:
    """Split tokens `(b, n, count * d)` into cells `(b, count, n, d)`."""
    return latents.reshape(latents.shape[0], latents.shape[1], count, -1).transpose(1, 2)


def _tokens(cells: Tensor) -> Tensor:
    """Concatenate cells `(b, count, n, d)` to tokens `(b, n, count * d)`."""
    return cells.transpose(1, 2).flatten(2)


class _FrozenHierarchy(FrozenCodebooks):
    """Each level once, with the scales that it codes: no file holds two tensors of one memory."""

    def __init__(self, made: "Hierarchy") -> None:
        super().__init__(len(made.codebook_sizes))
        self.levels = nn.ModuleList(level.frozen() for level, _ in made.parts())
        self.scales = nn.ModuleList(nn.ModuleList(map(copy.deepcopy, scales)) for _, scales in made.parts())
        self.count = made.count

    def encode(self, latents: Tensor) -> Tensor:
        remaining = _cells(latents, self.count)
        codes: list[Tensor] = []
        for level, scales in zip(self.levels, self.scales):  # noqa: B905 (TorchScript's zip is never strict)
            for scale in scales:  # type: ignore[attr-defined]
                found = level.encode(scale.down(remaining))  # type: ignore[operator]
                remaining = remaining - scale.up(level.decode(found))  # type: ignore[operator]
                codes.append(found.reshape(-1, scale.groups, found.shape[2]))  # (b * groups, 1, n) -> (b, groups, n)
        return torch.cat(codes, 1)

    def decode_kept(self, codes: Tensor, kept: Tensor) -> Tensor:
        steps = codes.shape[2]
        total = torch.zeros(1, device=codes.device)
        begin = 0
        for level, scales in zip(self.levels, self.scales):  # noqa: B905
            for scale in scales:  # type: ignore[attr-defined]
                end = begin + scale.groups
                part = level.decode(codes[:, begin:end].reshape(-1, 1, steps))  # type: ignore[operator]
                there = part.reshape(-1, scale.groups, steps, part.shape[2]) * kept[begin:end, None, None]
                total = total + scale.up(there.reshape(-1, steps, part.shape[2]))
                begin = end
        return _tokens(total)


class Hierarchy(Bottleneck):
    """Layers of codebooks, coarse to fine (VQ-VAE-2, arXiv 1906.00446, section 3.1; HiTVideo, 2503.11513, section 3).

    A token's latents are the concatenated latents of its cells, in the order of `networks/nested.py`. Layer i quantizes
    the residual of the previous layers, reduced to the vectors of `scales[i]`; in the last layer a vector is of one
    cell. A token has a codebook for each vector of each layer. A prefix of them, coarse layers first, is a shorter
    code.

    The gradient passes straight through the sum of all layers, as in `Residual`. Scales with parameters learn from the
    squared distance of the latents to the sum of the first layers, averaged over their number (VAR, arXiv 2404.02905,
    whose codebook learns from it too).

    Args:
        levels: Bottlenecks of one codebook and equal width, without projections; one may be given several times.
        scales: Maps between cells and vectors, one for each level.
        commitment: Weight of the same distance for the latents, in addition to the levels' own commitment.

    Raises:
        UserError: Widths differ, a level has several codebooks, or the numbers of levels and scales differ.
    """

    def __init__(self, levels: Sequence[Bottleneck], scales: Sequence[Scale], commitment: float = 0.0) -> None:
        super().__init__()
        if not levels or len(levels) != len(scales):
            raise UserError(f"bottleneck: {len(levels)} levels for {len(scales)} scales; give one for each")
        if any(len(level.codebook_sizes) != 1 or level.dim != levels[0].dim for level in levels):
            raise UserError("bottleneck.level: all levels of a hierarchy have one codebook and one width")
        self.levels = nn.ModuleList(levels)
        self.scales = nn.ModuleList(scales)
        self.commitment = commitment
        self.count = scales[-1].count
        self.dim = levels[0].dim * self.count
        pairs = zip(levels, scales, strict=True)
        self.codebook_sizes = tuple(level.codebook_sizes[0] for level, scale in pairs for _ in range(scale.groups))

    @property
    def codebook_layers(self) -> tuple[int, ...]:
        """Return the number of codebooks of each layer."""
        return tuple(scale.groups for scale in self.scales)  # type: ignore[misc]

    def parts(self) -> list[tuple[Bottleneck, list[Scale]]]:
        """Return the levels, each once with the consecutive scales that it codes."""
        pairs = groupby(zip(self.levels, self.scales, strict=True), key=lambda pair: id(pair[0]))
        runs = [list(run) for _, run in pairs]
        return [(run[0][0], [scale for _, scale in run]) for run in runs]  # type: ignore[misc]

    def forward(self, latents: Tensor, lengths: Tensor, n_codebooks: Tensor) -> Quantized:
        """Quantize; see `Bottleneck.forward`."""
        b, steps = latents.shape[0], latents.shape[1]
        with torch.autocast(latents.device.type, enabled=False):
            whole = remaining = _cells(latents.float(), self.count)
            total, codes, measured = torch.zeros_like(remaining), [], MeasuredParts()
            distances: list[Tensor] = []
            numbers = torch.arange(len(self.codebook_sizes), device=latents.device)
            kept = torch.split(numbers < n_codebooks[:, None], list(self.codebook_layers), 1)
            for level, scale, there in zip(self.levels, self.scales, kept, strict=True):
                # A vector whose code is dropped enters neither penalties nor metrics.
                valid = torch.where(there, lengths[:, None], 0).flatten()  # (b, groups) -> (b * groups)
                part: Quantized = level(scale.down(remaining), valid, torch.ones_like(valid))  # type: ignore[operator]
                found = part.latents.detach()
                total = total + scale.up(torch.where(there.reshape(-1, 1, 1), found, 0.0))  # type: ignore[operator]
                # Dropped codebooks are quantized too; see `Residual.forward`.
                remaining = remaining - scale.up(found).detach()  # type: ignore[operator]
                codes.append(part.codes.reshape(b, -1, steps))  # (b * groups, 1, n) -> (b, groups, n)
                measured.add(part)
                if self.commitment or total.requires_grad:
                    present = prefix_mask(torch.where(there.any(1), lengths, 0), steps)
                    distances.append(self._distance(whole, total, present))
            penalties = measured.penalties
            if distances:
                penalties = penalties | {"scales": torch.stack(distances).mean()}
            quantized = straight_through(latents.float(), _tokens(total))
        return Quantized(quantized, torch.cat(codes, 1), penalties, measured.means())

    def _distance(self, cells: Tensor, total: Tensor, valid: Tensor) -> Tensor:
        """Return the squared distance of cells `(b, count, n, d)` to a sum of layers, to train both."""
        learned = (cells.detach() - total).square()
        distance = learned + self.commitment * (cells - total.detach()).square()
        return masked_mean(distance.mean((1, 3)), valid)

    def encode(self, latents: Tensor) -> Tensor:
        """Quantize layer by layer; see `Bottleneck.encode`."""
        with torch.autocast(latents.device.type, enabled=False):
            remaining, codes = _cells(latents.float(), self.count), []
            for level, scale in zip(self.levels, self.scales, strict=True):
                found = level.encode(scale.down(remaining))  # type: ignore[operator]
                remaining = remaining - scale.up(level.decode(found))  # type: ignore[operator]
                codes.append(found.reshape(latents.shape[0], -1, latents.shape[1]))  # (b * groups, 1, n) -> (b, ...)
            return torch.cat(codes, 1)

    def decode(self, codes: Tensor) -> Tensor:
        """Sum the decoded layers; see `Bottleneck.decode`."""
        b, given, steps = codes.shape
        width = self.dim // self.count
        total = torch.zeros(b, self.count, steps, width, device=codes.device)
        begin = 0
        with torch.autocast(codes.device.type, enabled=False):
            for level, scale, groups in zip(self.levels, self.scales, self.codebook_layers, strict=True):
                here = min(groups, given - begin)
                if here > 0:
                    part = level.decode(codes[:, begin : begin + here].reshape(-1, 1, steps))  # type: ignore[operator]
                    there = functional.pad(part.reshape(b, here, steps, width), [0, 0, 0, 0, 0, groups - here])
                    total = total + scale.up(there.flatten(0, 1))  # type: ignore[operator]
                begin += groups
        return _tokens(total)

    def thaw(self, frozen: nn.Module) -> None:
        """Take over the weights of all levels and scales; see `Bottleneck.thaw`."""
        frozen_levels, frozen_scales = (frozen.get_submodule(name).children() for name in ("levels", "scales"))
        for (level, scales), other, others in zip(self.parts(), frozen_levels, frozen_scales, strict=True):
            level.thaw(other)
            for scale, known in zip(scales, others.children(), strict=True):
                scale.load_state_dict(known.state_dict())

    def frozen(self) -> nn.Module:
        """Return the export form; see `Bottleneck.frozen`."""
        return _FrozenHierarchy(self)


def hierarchy(level: Callable[[], Bottleneck], groups: Sequence[Annotated[int, "[1, 1000]"]]) -> Hierarchy:
    """Build a hierarchy of equal levels over nested groups of cells (HiTVideo).

    Args:
        level: Factory of a level.
        groups: Number of groups of cells in each layer; each divides the next, and the last is the number of cells.

    Raises:
        UserError: A number of groups doesn't divide the next.
    """
    if not groups or any(after % before for before, after in pairwise(groups)):
        raise UserError(f"bottleneck.groups={list(groups)}: one for each level, each divides the next")
    return Hierarchy([level() for _ in groups], [Groups(each, groups[-1]) for each in groups])


def multi_scale(
    level: Callable[[], Bottleneck],
    scales: Sequence[Annotated[int, "[1, 1000]"]],
    refinements: Annotated[int, "[0, 1000]"] = 4,
    share: Annotated[float, "[0, 1]"] = 0.5,
    commitment: float = 0.25,
) -> Hierarchy:
    """Build a hierarchy of squares of cells that share one codebook (VAR, arXiv 2404.02905, algorithms 1 and 2).

    Args:
        level: Factory of the codebook.
        scales: Rows and columns of each layer's square; each is larger than the last, and the last those of a token's
            cells.
        refinements: Number of convolutions after enlarging; each serves an equal part of the layers, in order.
        share: Share of a convolution's result in the enlarged square, the rest being its input.
        commitment: See `Hierarchy`.

    Raises:
        UserError: The scales don't grow, or there are more convolutions than layers.
    """
    if not scales or any(after <= before for before, after in pairwise(scales)):
        raise UserError(f"bottleneck.scales={list(scales)}: one for each layer, each larger than the last")
    if refinements > len(scales):
        raise UserError(f"bottleneck.refinements={refinements}: at most one for each of {len(scales)} scales")
    one = level()
    layers: list[nn.Module] = [_Refinement(one.dim, share) for _ in range(refinements)] or [nn.Identity()]
    parts = [layers[index * len(layers) // len(scales)] for index in range(len(scales))]
    resized = [Resized(side, scales[-1], part) for side, part in zip(scales, parts, strict=True)]
    return Hierarchy([one] * len(scales), resized, commitment)
