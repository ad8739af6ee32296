"""Multi-rate residual quantization: a coarse code covers several consecutive tokens."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from varitok import UserError

from ..masking import prefix_mask
from ..result import Quantized
from .composite import Composite, FrozenComposite, MeasuredParts
from .contract import Bottleneck, straight_through
from .factorized import FactorizedResidualQuantizer
from .residual import Split

__all__ = ["MultiRate", "multirate"]


def _average_groups(latents: Tensor, stride: int, valid: Tensor | None) -> Tensor:
    """Average latents `(b, n, d)` over groups of `stride` tokens: `(b, ceil(n / stride), d)`.

    Only valid tokens, bool `(b, n)`, are averaged (all if None); a group without one is 0.
    """
    b, n, d = latents.shape
    if valid is None:
        valid = torch.ones_like(latents[:, :, 0], dtype=torch.bool)
    latents = torch.where(valid.unsqueeze(2), latents, torch.zeros_like(latents))
    missing = -n % stride
    groups = nn.functional.pad(latents, [0, 0, 0, missing]).reshape(b, -1, stride, d)  # (b, groups, stride, d)
    counts = nn.functional.pad(valid.to(torch.float32), [0, missing]).reshape(b, -1, stride).sum(2)  # (b, groups)
    return groups.sum(2) / counts.clamp(min=1.0).unsqueeze(2)


def _spread(values: Tensor, stride: int, steps: int, dim: int) -> Tensor:
    """Repeat each group's value `stride` times along an axis, up to `steps` tokens."""
    return values.index_select(dim, torch.arange(steps, device=values.device) // stride)


class _FrozenMultiRate(FrozenComposite):
    def __init__(self, multirate: "MultiRate") -> None:
        super().__init__(multirate)
        self.strides = list(multirate.strides)

    def encode(self, latents: Tensor) -> Tensor:
        remaining = latents
        codes: list[Tensor] = []
        for index, part in enumerate(self.parts):
            stride, steps = self.strides[index], latents.shape[1]
            found = part.encode(_average_groups(remaining, stride, None))  # type: ignore[operator]
            remaining = remaining - _spread(part.decode(found), stride, steps, 1)  # type: ignore[operator]
            codes.append(_spread(found, stride, steps, 2))
        return torch.cat(codes, 1)

    def decode_kept(self, codes: Tensor, kept: Tensor) -> Tensor:
        total = torch.zeros(1, device=codes.device)
        for index, part in enumerate(self.parts):
            stride = self.strides[index]
            coarse = part.decode_kept(codes[:, :, ::stride], kept)  # type: ignore[operator]
            total = total + _spread(coarse, stride, codes.shape[2], 1)
        return total


class MultiRate(Composite):
    """Residual levels at different rates (SNAC, arXiv 2410.14411, section 3.1).

    Level i quantizes the residual of the previous levels, averaged over groups of `strides[i]` tokens, and its result
    is repeated over each group. Codes still have the shape `(b, codebooks, n)`: a group's code is repeated at each of
    its tokens, and decoding reads it at the first. Groups contain valid tokens only. If a stride doesn't divide the
    length, the last group averages the remaining tokens and costs a whole code: n tokens take
    `sum(ceil(n / stride) * log2(size))` bits (`payload`). `bits` ignores this rounding.

    The gradient passes straight through the sum of all levels, as in `Residual`. If a level has projections trained by
    the decoder's gradient (`FactorizedResidualQuantizer`, `Split`), it goes through the levels instead, as published.

    Args:
        levels: Bottlenecks of equal width.
        strides: Tokens per group, for each level.

    Raises:
        UserError: Widths differ, or the numbers of strides and levels differ.
    """

    def __init__(self, levels: Sequence[Bottleneck], strides: Sequence[int]) -> None:
        super().__init__(levels[0].dim if levels else 0, levels, interleave=False)
        if any(level.dim != self.dim for level in levels):
            raise UserError(f"bottleneck: levels of one width, got {[level.dim for level in levels]}")
        if len(strides) != len(levels):
            raise UserError(f"bottleneck.strides={list(strides)}: give one for each of {len(levels)} levels")
        self.strides = tuple(strides)
        # An output projection is trained only by the gradient of its output.
        self.passes = any(isinstance(part, FactorizedResidualQuantizer | Split) for part in self.modules())

    @property
    def codebook_strides(self) -> tuple[int, ...]:
        """Return the tokens per code of each codebook."""
        levels = zip(self.strides, self.parts, strict=True)
        return tuple(stride * own for stride, part in levels for own in part.codebook_strides)  # type: ignore[union-attr]

    def forward(self, latents: Tensor, lengths: Tensor, n_codebooks: Tensor) -> Quantized:
        """Quantize; see `Bottleneck.forward`."""
        with torch.autocast(latents.device.type, enabled=False):
            remaining, steps = latents.float(), latents.shape[1]
            valid = prefix_mask(lengths, steps)
            total = torch.zeros_like(remaining)
            codes, measured = [], MeasuredParts()
            for index, stride in enumerate(self.strides):
                coarse = remaining if stride == 1 else _average_groups(remaining, stride, valid)
                part, kept = self.run_part(index, coarse, (lengths + stride - 1) // stride, n_codebooks)
                codes.append(_spread(part.codes, stride, steps, 2))
                # Dropped codebooks are quantized too; see `Residual.forward`.
                level = self.parts[index]
                whole = part.latents
                if len(level.codebook_sizes) > 1:  # type: ignore[arg-type]
                    whole = straight_through(part.latents, level.decode(part.codes))  # type: ignore[operator]
                if not self.passes:
                    kept, whole = kept.detach(), whole.detach()
                total = total + _spread(kept, stride, steps, 1)
                remaining = remaining - _spread(whole, stride, steps, 1)
                measured.add(part)
            quantized = total if self.passes else straight_through(latents.float(), total)
        return Quantized(quantized, self.arrange(codes), measured.penalties, measured.means())

    def encode(self, latents: Tensor) -> Tensor:
        """Quantize level by level, with all tokens valid; see `Bottleneck.encode`."""
        return self.encode_valid(latents, torch.full_like(latents[:, 0, 0], latents.shape[1], dtype=torch.int64))

    def encode_valid(self, latents: Tensor, lengths: Tensor) -> Tensor:
        """Quantize latents `(b, n, d)` with `lengths` valid tokens, int64 `(b,)`."""
        with torch.autocast(latents.device.type, enabled=False):
            remaining, codes, steps = latents.float(), [], latents.shape[1]
            valid = prefix_mask(lengths, steps)
            for part, stride in zip(self.parts, self.strides, strict=True):
                found = part.encode(_average_groups(remaining, stride, valid))  # type: ignore[operator]
                remaining = remaining - _spread(part.decode(found), stride, steps, 1)  # type: ignore[operator]
                codes.append(_spread(found, stride, steps, 2))
            return self.arrange(codes)

    def decode(self, codes: Tensor) -> Tensor:
        """Sum the levels, each decoded from the first code of each group; see `Bottleneck.decode`."""
        total = torch.zeros(codes.shape[0], codes.shape[2], self.dim, device=codes.device)
        for index, stride in enumerate(self.strides):
            part = self.decode_part(index, codes[:, :, ::stride])
            total = total if part is None else total + _spread(part, stride, codes.shape[2], 1)
        return total

    def frozen(self) -> nn.Module:
        """Return the export form; see `Bottleneck.frozen`."""
        return _FrozenMultiRate(self)


def multirate(level: Callable[[], Bottleneck], strides: Sequence[int]) -> MultiRate:
    """Build a multi-rate quantizer of equal levels.

    Args:
        level: Factory of a level.
        strides: Tokens per group of each level; SNAC's halve from level to level down to 1.
    """
    return MultiRate([level() for _ in strides], strides)
