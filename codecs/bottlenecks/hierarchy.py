"""Hierarchical quantization: each layer quantizes residual means over smaller groups of a token's cells."""

from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Annotated

import torch
from torch import Tensor, nn

from varitok import UserError

from ..result import Quantized
from .composite import MeasuredParts
from .contract import Bottleneck, FrozenCodebooks, straight_through

__all__ = ["Hierarchy", "hierarchy"]


def _means(cells: Tensor, groups: int) -> Tensor:
    """Average cells `(b, cells, n, d)` over `groups` groups of consecutive cells: `(b * groups, n, d)`."""
    b, count, n, d = cells.shape
    return cells.reshape(b * groups, count // groups, n, d).mean(1)


def _spread(means: Tensor, groups: int, count: int) -> Tensor:
    """Repeat each group's latents `(b * groups, n, d)` for each of its cells: `(b, count, n, d)`."""
    n, d = means.shape[1], means.shape[2]
    return means.reshape(-1, groups, 1, n, d).expand(-1, -1, count // groups, -1, -1).reshape(-1, count, n, d)


def _cells(latents: Tensor, count: int) -> Tensor:
    """Split tokens `(b, n, count * d)` into cells `(b, count, n, d)`."""
    return latents.reshape(latents.shape[0], latents.shape[1], count, -1).transpose(1, 2)


def _tokens(cells: Tensor) -> Tensor:
    """Concatenate cells `(b, count, n, d)` to tokens `(b, n, count * d)`."""
    return cells.transpose(1, 2).flatten(2)


class _FrozenHierarchy(FrozenCodebooks):
    def __init__(self, made: "Hierarchy") -> None:
        super().__init__(len(made.codebook_sizes))
        self.levels = nn.ModuleList(level.frozen() for level in made.levels)  # type: ignore[operator]
        self.groups = list(made.groups)

    def encode(self, latents: Tensor) -> Tensor:
        count = self.groups[-1]
        remaining = _cells(latents, count)
        codes: list[Tensor] = []
        for index, level in enumerate(self.levels):
            groups = self.groups[index]
            found = level.encode(_means(remaining, groups))  # type: ignore[operator]
            remaining = remaining - _spread(level.decode(found), groups, count)  # type: ignore[operator]
            codes.append(found.reshape(-1, groups, found.shape[2]))  # (b * groups, 1, n) -> (b, groups, n)
        return torch.cat(codes, 1)

    def decode_kept(self, codes: Tensor, kept: Tensor) -> Tensor:
        steps, count = codes.shape[2], self.groups[-1]
        total = torch.zeros(1, device=codes.device)
        begin = 0
        for index, level in enumerate(self.levels):
            groups = self.groups[index]
            part = level.decode(codes[:, begin : begin + groups].reshape(-1, 1, steps))  # type: ignore[operator]
            there = part.reshape(-1, groups, steps, part.shape[2]) * kept[begin : begin + groups, None, None]
            total = total + _spread(there.reshape(-1, steps, part.shape[2]), groups, count)  # (b * groups, n, d)
            begin += groups
        return _tokens(total)


class Hierarchy(Bottleneck):
    """Layers of codebooks, coarse to fine (VQ-VAE-2, arXiv 1906.00446, section 3.1; HiTVideo, 2503.11513, section 3).

    A token's latents are the concatenated latents of its cells, in the order of `networks/nested.py`. Layer i quantizes
    the residual of the previous layers, averaged over each of `groups[i]` groups of cells; in the last layer a group is
    one cell. A token has `sum(groups)` codebooks. A prefix of them, coarse layers first, is a shorter code.

    The gradient passes straight through the sum of all layers, as in `Residual`.

    Args:
        levels: Bottlenecks of one codebook and equal width, without projections.
        groups: Number of groups of cells in each layer; each divides the next, and the last is the number of cells.

    Attributes:
        rungs: Numbers of codebooks that make up whole layers.

    Raises:
        UserError: Widths differ, a level has several codebooks, or a number of groups doesn't divide the next.
    """

    def __init__(self, levels: Sequence[Bottleneck], groups: Sequence[Annotated[int, "[1, 1000]"]]) -> None:
        super().__init__()
        apart = not levels or len(levels) != len(groups)
        if apart or any(after % before for before, after in pairwise(groups)):
            raise UserError(f"bottleneck.groups={list(groups)}: one for each level, each divides the next")
        if any(len(level.codebook_sizes) != 1 or level.dim != levels[0].dim for level in levels):
            raise UserError("bottleneck.level: all levels of a hierarchy have one codebook and one width")
        self.levels = nn.ModuleList(levels)
        self.groups = tuple(groups)
        self.dim = levels[0].dim * groups[-1]
        pairs = list(zip(levels, groups, strict=True))
        self.codebook_sizes = tuple(level.codebook_sizes[0] for level, count in pairs for _ in range(count))
        self.rungs = [sum(groups[: level + 1]) for level in range(len(groups))]

    def forward(self, latents: Tensor, lengths: Tensor, n_codebooks: Tensor) -> Quantized:
        """Quantize; see `Bottleneck.forward`."""
        b, steps, count = latents.shape[0], latents.shape[1], self.groups[-1]
        with torch.autocast(latents.device.type, enabled=False):
            remaining = _cells(latents.float(), count)
            total, codes, measured = torch.zeros_like(remaining), [], MeasuredParts()
            numbers = torch.arange(len(self.codebook_sizes), device=latents.device)
            kept = torch.split(numbers < n_codebooks[:, None], list(self.groups), 1)
            for level, groups, there in zip(self.levels, self.groups, kept, strict=True):
                # A group whose code is dropped enters neither penalties nor metrics.
                valid = torch.where(there, lengths[:, None], 0).flatten()  # (b, groups) -> (b * groups)
                means = _means(remaining, groups)
                part: Quantized = level(means, valid, torch.ones_like(valid))
                found = part.latents.detach()
                total = total + _spread(torch.where(there.reshape(-1, 1, 1), found, 0.0), groups, count)
                # Dropped codebooks are quantized too; see `Residual.forward`.
                remaining = remaining - _spread(found, groups, count)
                codes.append(part.codes.reshape(b, groups, steps))  # (b * groups, 1, n) -> (b, groups, n)
                measured.add(part)
            quantized = straight_through(latents.float(), _tokens(total))
        return Quantized(quantized, torch.cat(codes, 1), measured.penalties, measured.means())

    def encode(self, latents: Tensor) -> Tensor:
        """Quantize layer by layer; see `Bottleneck.encode`."""
        count = self.groups[-1]
        with torch.autocast(latents.device.type, enabled=False):
            remaining, codes = _cells(latents.float(), count), []
            for level, groups in zip(self.levels, self.groups, strict=True):
                found = level.encode(_means(remaining, groups))  # type: ignore[operator]
                remaining = remaining - _spread(level.decode(found), groups, count)  # type: ignore[operator]
                codes.append(found.reshape(-1, groups, latents.shape[1]))  # (b * groups, 1, n) -> (b, groups, n)
            return torch.cat(codes, 1)

    def decode(self, codes: Tensor) -> Tensor:
        """Sum the decoded layers; see `Bottleneck.decode`."""
        b, given, steps = codes.shape
        width, count = self.dim // self.groups[-1], self.groups[-1]
        total = torch.zeros(b, count, steps, width, device=codes.device)
        begin = 0
        for level, groups in zip(self.levels, self.groups, strict=True):
            here = min(groups, given - begin)
            if here > 0:
                part = level.decode(codes[:, begin : begin + here].reshape(-1, 1, steps))  # type: ignore[operator]
                there = nn.functional.pad(part.reshape(b, here, steps, width), [0, 0, 0, 0, 0, groups - here])
                total = total + _spread(there.flatten(0, 1), groups, count)  # (b * groups, n, d)
            begin += groups
        return _tokens(total)

    def thaw(self, frozen: nn.Module) -> None:
        """Take over the weights of all levels; see `Bottleneck.thaw`."""
        for level, other in zip(self.levels, frozen.levels, strict=True):  # type: ignore[arg-type]
            level.thaw(other)  # type: ignore[operator]

    def frozen(self) -> nn.Module:
        """Return the export form; see `Bottleneck.frozen`."""
        return _FrozenHierarchy(self)


def hierarchy(level: Callable[[], Bottleneck], groups: Sequence[Annotated[int, "[1, 1000]"]]) -> Hierarchy:
    """Build a hierarchy of equal levels.

    Args:
        level: Factory of a level.
        groups: Number of groups of cells in each layer; see `Hierarchy`.
    """
    return Hierarchy([level() for _ in groups], groups)
