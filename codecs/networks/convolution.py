"""Convolutions over 1, 2 or 3 axes with exact lengths: `t` steps in, `t / stride` out, or `t * stride` transposed.

All padding is zeros, explicit, and the same for a padded batch as for a single item: what a mask calls invalid is
zeroed before any layer that looks ahead. A causal layer looks back only, along the first axis, by `context` steps; a
suffix that isn't valid can't reach it, so it needs no mask.

A causal layer streams if it gets a `memory`: a list with an item (index `slot`) for every layer with past
inputs. A `Convolution` stores the last `context` steps of its input there (zeros at the start) and puts them before
the next chunk instead of padding. A `TransposedConvolution` also stores `context` input steps, and drops
the first `context * stride` steps of its output. `codecs/streaming.py` flattens the memory to one tensor.
"""

import math
from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.utils.parametrizations import weight_norm

from varitok import UserError

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
    "zero_invalid",
]

Norm = Literal["weight", "group", "none"]
_PLAIN: tuple[Any, ...] = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_TRANSPOSED: tuple[Any, ...] = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)


def per_axis(value: int | Sequence[int], dims: int) -> tuple[int, ...]:
    """Return a number for each axis: one number stands for all of them.

    Raises:
        UserError: There are not as many numbers as axes, or one is below 1.
    """
    values = (value,) * dims if isinstance(value, int) else tuple(value)
    if len(values) != dims or min(values) < 1:
        raise UserError(f"convolution: {value!r} should be 1 or {dims} whole numbers, each at least 1")
    return values


def stage_sizes(
    base: int, strides: Sequence[int | Sequence[int]], multipliers: Sequence[int] | None, dims: int
) -> tuple[list[tuple[int, ...]], list[int], tuple[int, ...]]:
    """Return the strides of a codec's stages for each axis, the widths around them, and the downsampling of each axis.

    Args:
        base: Width before the first stage.
        strides: Strides of the stages, for each one number or one for each axis.
        multipliers: Widths over `base`, one more than strides; powers of two if None.
        dims: Axes.

    Raises:
        UserError: There are no strides, or not as many multipliers.
    """
    if not strides:
        raise UserError("codec: strides are empty")
    if multipliers is not None and len(multipliers) != len(strides) + 1:
        raise UserError(f"codec: {len(strides)} strides need {len(strides) + 1} multipliers, not {len(multipliers)}")
    steps = [per_axis(stride, dims) for stride in strides]
    widths = [base * m for m in multipliers or [2**level for level in range(len(strides) + 1)]]
    return steps, widths, tuple(math.prod(step[axis] for step in steps) for axis in range(dims))


def zero_invalid(x: Tensor, mask: Tensor | None) -> Tensor:
    """Zero what isn't valid; `mask` is bool, broadcast over x, None for all valid."""
    return x if mask is None else torch.where(mask, x, torch.zeros_like(x))


def along_first(mask: Tensor | None, steps: int, dims: int) -> Tensor | None:
    """Bring a mask of all tokens of a grid, bool `(b, n)`, to its first axis, `(b, steps)`: only there are lengths."""
    if mask is None or dims == 1:
        return mask
    return mask.reshape(mask.shape[0], steps, -1)[:, :, 0]


def at_rate(mask: Tensor | None, rate: int, dims: int) -> Tensor | None:
    """Spread a mask of tokens, bool `(b, n)`, over signals with `rate` steps a token: bool `(b, 1, n * rate, ...)`."""
    if mask is None:
        return None
    spread = mask.unsqueeze(2).expand(-1, -1, rate).flatten(1).unsqueeze(1)
    for _ in range(dims - 1):
        spread = spread.unsqueeze(-1)
    return spread


def recall(memory: list[Tensor], slot: int, x: Tensor, shape: list[int]) -> Tensor:
    """Take what a layer left in its place of the memory; zeros of a shape, of x's kind, where nothing is there yet."""
    past = memory[slot]
    return x.new_zeros(shape) if past.dim() == 1 else past.to(x.dtype)


def prepend_context(x: Tensor, memory: list[Tensor], slot: int, context: int, axis: int) -> Tensor:
    """Put the last `context` steps of what came before in front of x, along an axis, and remember x's own last ones."""
    shape = list(x.shape)
    shape[axis] = context
    x = torch.cat([recall(memory, slot, x, shape), x], dim=axis)
    memory[slot] = x.narrow(axis, x.shape[axis] - context, context)
    return x


class StepNorm(nn.Module):
    """Group normalization whose statistics are of valid steps only (arXiv 1803.08494; EnCodec's time-group-norm).

    Args:
        channels: Channels; `groups` divides them.
        groups: Groups of channels, each with its own mean and variance over its channels and all steps.
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
        """Normalize `(b, c, *grid)`; `mask` is bool `(b, 1, t, ...)`, what isn't valid becomes 0."""
        if mask is None:
            return functional.group_norm(x, self.groups, self.weight, self.bias, self.eps)
        # Summed by hand, so that the padding enters neither sum nor count.
        b, each = x.shape[0], x.shape[1] // self.groups
        valid = mask.expand_as(x[:, :1]).flatten(2)
        flat = zero_invalid(x.flatten(2), valid).float()
        count = valid.sum(2).clamp(min=1) * each
        mean = flat.reshape(b, self.groups, -1).sum(2) / count
        flat = zero_invalid(flat - mean.repeat_interleave(each, dim=1).unsqueeze(2), valid)
        variance = flat.square().reshape(b, self.groups, -1).sum(2) / count
        flat = flat * (variance + self.eps).rsqrt().repeat_interleave(each, dim=1).unsqueeze(2)
        return zero_invalid(flat * self.weight.unsqueeze(1) + self.bias.unsqueeze(1), valid).reshape(x.shape)


def _initialize(layer: Any, norm: str) -> nn.Module:
    """Start the biases at 0 (DAC): speech is quiet, torch's own would drown it, and all latents would be alike."""
    if layer.bias is not None:
        nn.init.zeros_(layer.bias)
    return weight_norm(layer) if norm == "weight" else layer  # type: ignore[no-any-return]


class _Layer(nn.Module):
    """What both kinds share: sizes for each axis, the norm, whether a mask is needed, and what keeps it from chunks."""

    def __init__(
        self, outputs: int, dims: int, kernel: int | Sequence[int], stride: int | Sequence[int], causal: bool, norm: str
    ) -> None:
        super().__init__()
        if dims not in (1, 2, 3):
            raise UserError(f"convolution: dims={dims} should be 1, 2 or 3")
        if norm not in ("weight", "group", "none"):
            raise UserError(f"convolution: norm={norm} should be weight, group or none")
        if causal and norm == "group":
            raise UserError("convolution: a causal one can't have norm=group, whose statistics look ahead")
        self.kernel = per_axis(kernel, dims)
        self.stride = per_axis(stride, dims)
        self.causal = causal
        self.slot = 0
        self.obstacle = "a convolution isn't causal" if self.kernel[0] > self.stride[0] and not causal else ""
        self.step_norm = StepNorm(outputs) if norm == "group" else None


class Convolution(_Layer):
    """A convolution: `(b, c, t, ...)` to `(b, c', t / stride, ...)`, for sizes that its strides divide.

    Args:
        inputs: Channels in.
        outputs: Channels out.
        kernel: Taps, one number or one for each axis; spread by the dilation they reach at least over a stride.
        stride: Likewise.
        dilation: Likewise.
        groups: Groups of channels that don't see each other.
        bias: Whether there is one.
        dims: Axes, 1 to 3.
        causal: Output i sees the input up to step `i * stride + stride - 1` of the first axis, and no further.
        norm: `weight`, weight normalization (arXiv 1602.07868), which export folds; `group`, of the output; `none`.

    Attributes:
        context: Steps of the first axis that a causal layer looks back to beyond its own stride.
        slot: Its place in a memory.

    Raises:
        UserError: The taps don't reach over a stride, or sizes or norm are not possible.
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
    ) -> None:
        super().__init__(outputs, dims, kernel, stride, causal, norm)
        spread = per_axis(dilation, dims)
        totals = [(k - 1) * d + 1 - s for k, s, d in zip(self.kernel, self.stride, spread, strict=True)]
        if min(totals) < 0:
            raise UserError(f"convolution: kernel {self.kernel} is shorter than stride {self.stride}")
        left = [total // 2 for total in totals]
        if causal:
            left[0] = totals[0]
        right = [total - before for total, before in zip(totals, left, strict=True)]
        self.context = totals[0]
        self.looks_ahead = right[0] > 0
        even = left == right
        # The layer's own padding copies nothing; F.pad's numbers go from the last axis to the first.
        self.pads = [] if even else [n for pair in zip(left[::-1], right[::-1], strict=True) for n in pair]
        self.chunk_pads = self.pads[:-2] if any(self.pads[:-2]) else []
        padding = tuple(left) if even else 0
        layer = _PLAIN[dims - 1](inputs, outputs, self.kernel, self.stride, padding, spread, groups, bias)
        self.layer = _initialize(layer, norm)

    def forward(self, x: Tensor, mask: Tensor | None = None, memory: list[Tensor] | None = None) -> Tensor:
        """Convolve; `mask` is bool `(b, 1, t, ...)` of the input."""
        if self.looks_ahead:
            x = zero_invalid(x, mask)
        pads = self.pads
        if memory is not None and self.context > 0:
            x = prepend_context(x, memory, self.slot, self.context, 2)
            pads = self.chunk_pads
        if len(pads) > 0:
            x = functional.pad(x, pads)
        y: Tensor = self.layer(x)
        if self.step_norm is not None:
            y = self.step_norm(y, None if mask is None else mask[:, :, :: self.stride[0]])
        return y


class TransposedConvolution(_Layer):
    """A transposed convolution: `(b, c, t, ...)` to `(b, c', t * stride, ...)`.

    Args:
        inputs: Channels in.
        outputs: Channels out.
        kernel: Taps, one number or one for each axis, at least the stride.
        stride: Likewise.
        groups: Groups of channels that don't see each other.
        bias: Whether there is one.
        dims: Axes, 1 to 3.
        causal: Output i sees the input up to step `i // stride` of the first axis, and no further.
        norm: `weight`, `group` or `none`, as in `Convolution`.

    Attributes:
        context: Input steps of the first axis that a causal layer looks back to.
        slot: Its place in a memory.

    Raises:
        UserError: The taps don't reach over a stride, or sizes or norm are not possible.
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
    ) -> None:
        super().__init__(outputs, dims, kernel, stride, causal, norm)
        totals = [k - s for k, s in zip(self.kernel, self.stride, strict=True)]
        if min(totals) < 0:
            raise UserError(f"convolution: kernel {self.kernel} is shorter than stride {self.stride}")
        # What is cut on the left the layer cuts itself, on both sides; the rest of the right is narrowed off.
        left = [total // 2 for total in totals]
        if causal:
            left[0] = 0
        self.rest = [total - 2 * before for total, before in zip(totals, left, strict=True)]
        self.context = math.ceil(totals[0] / self.stride[0])
        self.mixes = self.kernel[0] > self.stride[0]
        layer = _TRANSPOSED[dims - 1](inputs, outputs, self.kernel, self.stride, tuple(left), 0, groups, bias)
        self.layer = _initialize(layer, norm)

    def forward(self, x: Tensor, mask: Tensor | None = None, memory: list[Tensor] | None = None) -> Tensor:
        """Convolve; `mask` is bool `(b, 1, t, ...)` of the input."""
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
            y = self.step_norm(y, spread)
        return y
