"""Convolutions over 1, 2 or 3 axes with exact output lengths: `t / stride`, or `t * stride` if transposed.

Padding is zeros unless `edges` says otherwise. A padded batch gives the same result as single samples: invalid steps
are zeroed before every layer that looks ahead. Along the first axis, a causal layer depends only on the current and the
last `context` steps. It needs no mask, because invalid steps are a suffix.

A causal layer streams if it gets a `memory`: a list with one tensor, at index `slot`, for each layer that needs earlier
inputs. A `Convolution` stores the last `context` steps of its input (zeros at first) and prepends them to the next
chunk instead of padding. A `TransposedConvolution` also stores `context` input steps, and drops the first
`context * stride` steps of its output. `codecs/streaming.py` flattens the memory to one tensor.
"""

import math
from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.utils.parametrizations import weight_norm

from varitok import UserError

from .edges import edges_of, pad_ends

__all__ = [
    "Convolution",
    "Norm",
    "StepNorm",
    "TransposedConvolution",
    "along_first",
    "at_rate",
    "per_axis",
    "prepend_context",
    "recall",
    "stage_sizes",
    "within_squares",
    "zero_invalid",
]

Norm = Literal["weight", "group", "none"]
_PLAIN: tuple[Any, ...] = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_TRANSPOSED: tuple[Any, ...] = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)


def per_axis(value: int | Sequence[int], dims: int) -> tuple[int, ...]:
    """Return one value per axis, repeating a single one.

    Raises:
        UserError: The number of values isn't 1 or `dims`.
    """
    values = (value,) * dims if isinstance(value, int) else tuple(value)
    if len(values) != dims:
        raise UserError(f"convolution: {value!r} should be 1 or {dims} whole numbers")
    return values


def stage_sizes(
    base: int, strides: Sequence[int | Sequence[int]], multipliers: Sequence[int] | None, dims: int
) -> tuple[list[tuple[int, ...]], list[int], tuple[int, ...]]:
    """Return per-axis strides of each stage, widths before each stage and after the last, and downsampling factors.

    Args:
        base: Width that `multipliers` multiply.
        strides: Stride of each stage: one number, or one per axis.
        multipliers: One number more than strides; powers of two if None.
        dims: Number of axes.

    Raises:
        UserError: There are no strides, or the number of multipliers is wrong.
    """
    if not strides:
        raise UserError("codec: strides are empty")
    if multipliers is not None and len(multipliers) != len(strides) + 1:
        raise UserError(f"codec: {len(strides)} strides need {len(strides) + 1} multipliers, not {len(multipliers)}")
    steps = [per_axis(stride, dims) for stride in strides]
    widths = [base * m for m in multipliers or [2**level for level in range(len(strides) + 1)]]
    return steps, widths, tuple(math.prod(step[axis] for step in steps) for axis in range(dims))


def zero_invalid(x: Tensor, mask: Tensor | None) -> Tensor:
    """Zero invalid elements; `mask` is bool, broadcastable to x, and None if all are valid."""
    return x if mask is None else torch.where(mask, x, torch.zeros_like(x))


def along_first(mask: Tensor | None, steps: int, dims: int) -> Tensor | None:
    """Reduce a token mask, bool `(b, n)`, to the first axis, `(b, steps)`; lengths vary along that axis only."""
    if mask is None or dims == 1:
        return mask
    return mask.reshape(mask.shape[0], steps, -1)[:, :, 0]  # (b, n) -> (b, steps, n / steps) -> (b, steps)


def at_rate(mask: Tensor | None, rate: int, dims: int) -> Tensor | None:
    """Repeat a token mask, bool `(b, n)`, for a signal with `rate` steps per token: bool `(b, 1, n * rate, 1...)`."""
    if mask is None:
        return None
    spread = mask.unsqueeze(2).expand(-1, -1, rate).flatten(1).unsqueeze(1)
    for _ in range(dims - 1):
        spread = spread.unsqueeze(-1)
    return spread


def within_squares(mask: Tensor | None, side: int, rows: int, columns: int) -> Tensor | None:
    """Repeat a token mask, bool `(b, rows * columns)`, for `side` x `side` steps per token: `(b, n * side^2)`."""
    spread = at_rate(along_first(mask, rows, 2), side, 2)
    return None if spread is None else spread.expand(-1, -1, -1, columns * side).flatten(1)


def recall(memory: list[Tensor], slot: int, x: Tensor, shape: list[int]) -> Tensor:
    """Read a layer's slot of the memory, in x's dtype; zeros of this shape before the first chunk."""
    past = memory[slot]
    return x.new_zeros(shape) if past.dim() == 1 else past.to(x.dtype)


def prepend_context(x: Tensor, memory: list[Tensor], slot: int, context: int, axis: int) -> Tensor:
    """Prepend the stored last `context` steps of earlier chunks along an axis; store the last ones of the result."""
    shape = list(x.shape)
    shape[axis] = context
    x = torch.cat([recall(memory, slot, x, shape), x], dim=axis)
    memory[slot] = x.narrow(axis, x.shape[axis] - context, context)
    return x


def _prepend_start(
    x: Tensor, memory: list[Tensor], slot: int, context: int, fill: str, lengths: Tensor | None
) -> Tensor:
    """Prepend the stored context, or before the first chunk what `fill` puts there; store the context and a mark."""
    past = recall(memory, slot, x, [x.shape[0], x.shape[1], context + 1])
    start = pad_ends(x, context, 0, fill, lengths)[:, :, :context]
    x = torch.cat([torch.where(past[:, :, context:] > 0, past[:, :, :context], start), x], dim=2)
    memory[slot] = torch.cat([x.narrow(2, x.shape[2] - context, context), torch.ones_like(x[:, :, :1])], dim=2)
    return x


class StepNorm(nn.Module):
    """Group norm with statistics over valid steps only (arXiv 1803.08494; EnCodec's time-group-norm).

    Args:
        channels: Channels, a multiple of `groups`.
        groups: Groups of channels; mean and variance are over a group's channels and all steps.
        eps: Added to the variance.
    """

    obstacle = "a group norm's statistics are of the whole signal"

    def __init__(self, channels: int, groups: int = 1, eps: float = 1e-5) -> None:
        super().__init__()
        if channels % groups:
            raise UserError(f"group norm: {groups} groups don't divide {channels} channels")
        self.groups = groups
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(channels))
        self.bias = nn.Parameter(torch.zeros(channels))

    def forward(self, x: Tensor, mask: Tensor | None) -> Tensor:
        """Normalize `(b, c, *grid)`; `mask` is bool `(b, 1, t, ...)`, and invalid steps become 0."""
        if mask is None:
            return self._normalize_whole(x)
        # Sums and counts exclude the padding.
        b, each = x.shape[0], x.shape[1] // self.groups
        valid = mask.expand_as(x[:, :1]).flatten(2)
        flat = zero_invalid(x.flatten(2), valid).float()
        count = valid.sum(2).clamp(min=1) * each
        mean = flat.reshape(b, self.groups, -1).sum(2) / count
        flat = zero_invalid(flat - mean.repeat_interleave(each, dim=1).unsqueeze(2), valid)
        variance = flat.square().reshape(b, self.groups, -1).sum(2) / count
        flat = flat * (variance + self.eps).rsqrt().repeat_interleave(each, dim=1).unsqueeze(2)
        return zero_invalid(flat * self.weight.unsqueeze(1) + self.bias.unsqueeze(1), valid).reshape(x.shape)

    def _normalize_whole(self, x: Tensor) -> Tensor:
        if torch.jit.is_scripting():  # type: ignore[attr-defined]
            y = functional.group_norm(x, self.groups, self.weight, self.bias, self.eps)
        else:
            y = self._eager(x)
        return y

    @torch.jit.unused
    def _eager(self, x: Tensor) -> Tensor:
        if not torch.onnx.is_in_onnx_export():
            return functional.group_norm(x, self.groups, self.weight, self.bias, self.eps)
        # ONNX Runtime's InstanceNormalization, which group_norm becomes, sums value by value in float32: 2e-4 off for
        # 512 x 512. Means of rows, and then of those, stay within 2e-6.
        rows = x.reshape(x.shape[0], self.groups, -1, x.shape[-1])
        rows = rows - rows.mean(3, keepdim=True).mean(2, keepdim=True)
        rows = rows * (rows.square().mean(3, keepdim=True).mean(2, keepdim=True) + self.eps).rsqrt()
        each = (-1, *(1 for _ in x.shape[2:]))
        return rows.reshape(x.shape) * self.weight.view(each) + self.bias.view(each)


def _initialize(layer: Any, norm: str) -> nn.Module:
    """Zero the bias (DAC) and add weight norm; torch's default bias would dominate quiet speech: latents collapse."""
    if layer.bias is not None:
        nn.init.zeros_(layer.bias)
    return weight_norm(layer) if norm == "weight" else layer  # type: ignore[no-any-return]


class _Layer(nn.Module):
    """Base class of both convolutions: per-axis sizes, norm and streaming attributes."""

    def __init__(
        self, outputs: int, dims: int, kernel: int | Sequence[int], stride: int | Sequence[int], causal: bool, norm: str
    ) -> None:
        super().__init__()
        if dims not in (1, 2, 3):
            raise UserError(f"convolution: dims={dims} should be 1, 2 or 3")
        if norm not in ("weight", "group", "none"):
            raise UserError(f"convolution: norm={norm} should be weight, group or none")
        if causal and norm == "group":
            raise UserError("convolution: norm=group can't be causal, as its statistics look ahead")
        self.kernel = per_axis(kernel, dims)
        self.stride = per_axis(stride, dims)
        self.causal = causal
        self.slot = 0
        self.obstacle = "a convolution isn't causal" if self.kernel[0] > self.stride[0] and not causal else ""
        self.step_norm = StepNorm(outputs) if norm == "group" else None


class Convolution(_Layer):
    """Convolution of `(b, c, t, ...)` to `(b, c', t / stride, ...)`; each size is a multiple of its stride.

    Args:
        inputs: Input channels.
        outputs: Output channels.
        kernel: Kernel size: one number, or one per axis. The dilated kernel is at least as long as the stride.
        stride: One number, or one per axis.
        dilation: One number, or one per axis.
        groups: Groups of channels, convolved separately.
        bias: Whether to add a bias.
        dims: Number of axes, 1 to 3.
        causal: Whether output i depends on the input up to step `i * stride + stride - 1` of the first axis only.
        norm: `weight`, weight norm (arXiv 1602.07868), which export folds; `group`, group norm of the output; `none`.
        edges: Treatment of the ends, a name in `edges.EDGES`; `zeros` for more than one axis.

    Attributes:
        context: Earlier steps of the first axis that a causal layer needs, besides those of the current stride.
        slot: Index in the memory.

    Raises:
        UserError: The kernel is shorter than the stride, or another argument is invalid.
    """

    pads: list[int]
    chunk_pads: list[int]

    def __init__(
        self,
        inputs: int,
        outputs: int,
        kernel: int | Sequence[int],
        stride: int | Sequence[int] = 1,
        dilation: int | Sequence[int] = 1,
        groups: int = 1,
        bias: bool = True,
        dims: int = 1,
        causal: bool = False,
        norm: Norm = "none",
        edges: str = "zeros",
    ) -> None:
        super().__init__(outputs, dims, kernel, stride, causal, norm)
        ends = edges_of(edges, dims)
        spread = per_axis(dilation, dims)
        totals = [(k - 1) * d + 1 - s for k, s, d in zip(self.kernel, self.stride, spread, strict=True)]
        if min(totals) < 0:
            raise UserError(f"convolution: kernel {self.kernel} is shorter than stride {self.stride}")
        left = [(total + ends.early) // 2 for total in totals]
        if causal:
            left[0] = totals[0]
        right = [total - before for total, before in zip(totals, left, strict=True)]
        self.context = totals[0]
        self.looks_ahead = right[0] > 0
        self.fill, self.partial = ends.fill, ends.partial
        even = left == right and self.fill == "zeros"
        # Symmetric padding is left to the layer, which copies nothing. F.pad takes axes from last to first.
        self.pads = [] if even else [n for pair in zip(left[::-1], right[::-1], strict=True) for n in pair]
        self.chunk_pads = self.pads[:-2] if any(self.pads[:-2]) else []
        padding = tuple(left) if even else 0
        layer = _PLAIN[dims - 1](inputs, outputs, self.kernel, self.stride, padding, spread, groups, bias)
        self.layer = _initialize(layer, norm)

    def forward(self, x: Tensor, mask: Tensor | None = None, memory: list[Tensor] | None = None) -> Tensor:
        """Convolve x; `mask` is bool `(b, 1, t, ...)`, at the input rate."""
        if self.looks_ahead or self.partial:
            x = zero_invalid(x, mask)
        y: Tensor = self.layer(self._padded(x, mask, memory))
        if self.step_norm is not None:
            y = self.step_norm(y, None if mask is None else mask[:, :, :: self.stride[0]])
        return y

    def _padded(self, x: Tensor, mask: Tensor | None, memory: list[Tensor] | None) -> Tensor:
        """Pad x, or prepend what the memory has of earlier chunks."""
        pads = self.pads
        # With a mask, x has whole steps.
        missing = -x.shape[2] % self.stride[0] if self.partial and mask is None else 0
        lengths: Tensor | None = None
        if mask is not None and self.fill != "zeros":
            lengths = mask.sum(2)
        if memory is not None and self.context > 0:
            if self.fill == "zeros":
                x = prepend_context(x, memory, self.slot, self.context, 2)
            else:
                x = _prepend_start(x, memory, self.slot, self.context, self.fill, lengths)
                lengths = None if lengths is None else lengths + self.context
            pads = self.chunk_pads
        if self.fill != "zeros":
            before, after = (pads[0], pads[1]) if len(pads) > 0 else (0, 0)
            return pad_ends(x, before, after + missing, self.fill, lengths, self.stride[0] if self.partial else 1)
        if missing > 0:
            x = functional.pad(x, [0, missing])
        return functional.pad(x, pads) if len(pads) > 0 else x


class TransposedConvolution(_Layer):
    """Transposed convolution of `(b, c, t, ...)` to `(b, c', t * stride, ...)`.

    The other arguments are those of `Convolution`.

    Args:
        kernel: Kernel size, at least the stride: one number, or one per axis.
        causal: Whether output i depends on the input up to step `i // stride` of the first axis only.
        edges: As in `Convolution`; with those of DAC the output lacks its last step if the stride is odd.

    Attributes:
        context: Earlier input steps of the first axis that a causal layer needs.
        slot: Index in the memory.

    Raises:
        UserError: The kernel is shorter than the stride, or another argument is invalid.
    """

    rest: list[int]

    def __init__(
        self,
        inputs: int,
        outputs: int,
        kernel: int | Sequence[int],
        stride: int | Sequence[int],
        groups: int = 1,
        bias: bool = True,
        dims: int = 1,
        causal: bool = False,
        norm: Norm = "none",
        edges: str = "zeros",
    ) -> None:
        super().__init__(outputs, dims, kernel, stride, causal, norm)
        ends = edges_of(edges, dims)
        totals = [k - s for k, s in zip(self.kernel, self.stride, strict=True)]
        if min(totals) < 0:
            raise UserError(f"convolution: kernel {self.kernel} is shorter than stride {self.stride}")
        # The layer's own padding crops `left` steps on both sides; forward crops the rest on the right.
        left = [(total + ends.early) // 2 for total in totals]
        if causal:
            left[0] = 0
        self.lead = 0
        if ends.norm_first and norm == "group":
            self.lead, left[0] = left[0], 0  # cropped after the norm
        rest = [total - 2 * before for total, before in zip(totals, left, strict=True)]
        added = 1 if rest[0] < 0 and not ends.shortens else 0
        self.whole = totals[0] if ends.norm_first and norm == "group" else 0
        self.rest = [0, *rest[1:]] if self.whole else rest
        self.context = math.ceil(totals[0] / self.stride[0])
        self.mixes = self.kernel[0] > self.stride[0]
        layer = _TRANSPOSED[dims - 1](inputs, outputs, self.kernel, self.stride, tuple(left), added, groups, bias)
        self.layer = _initialize(layer, norm)

    def forward(self, x: Tensor, mask: Tensor | None = None, memory: list[Tensor] | None = None) -> Tensor:
        """Convolve x; `mask` is bool `(b, 1, t, ...)`, at the input rate."""
        if self.mixes and not self.causal:
            x = zero_invalid(x, mask)
        past = 0
        if memory is not None and self.context > 0:
            x = prepend_context(x, memory, self.slot, self.context, 2)
            past = self.context * self.stride[0]
        y: Tensor = self.layer(x)
        for axis, rest in enumerate(self.rest):
            if rest > 0:
                y = y.narrow(axis + 2, 0, y.shape[axis + 2] - rest)
        if past > 0:
            y = y.narrow(2, past, y.shape[2] - past)
        if self.step_norm is not None:
            spread: Tensor | None = None
            if mask is not None:
                spread = mask.repeat_interleave(self.stride[0], dim=2)
                if self.whole > 0:  # the part that is cropped below is normalized too
                    spread = torch.cat([torch.ones_like(spread[:, :, :1]).expand(-1, -1, self.whole), spread], dim=2)
            y = self.step_norm(y, spread)
        if self.whole > 0:
            y = y.narrow(2, self.lead, y.shape[2] - self.whole)
        return y
