"""Stages of convolutional codecs: residual units, and the strided convolutions between them."""

import math
from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor, nn

from varitok import UserError
from varitok.data.noise import gaussian

from .activations import Activation
from .convolution import Convolution, Norm, TransposedConvolution, stage_sizes
from .edges import edges_of

__all__ = ["Down", "NoiseBlock", "Plan", "ResidualUnit", "Up", "shorten"]

PERIOD = 1 << 16  # steps of noise in a graph


class Plan:
    """Sizes and layer constructors that encoder and decoder share; arguments as in `ConvEncoder`.

    Raises:
        UserError: Inconsistent sizes.
    """

    def __init__(
        self,
        base: int,
        strides: Sequence[int | Sequence[int]],
        multipliers: Sequence[int] | None,
        dims: int,
        causal: bool,
        norm: Norm,
        activation: str,
        anti_aliased: bool,
        resample: int,
        edges: str,
        depthwise: bool,
    ) -> None:
        if causal and anti_aliased:
            raise UserError("codec: anti_aliased filters look ahead, so a causal codec can't have them")
        self.strides, self.widths, product = stage_sizes(base, strides, multipliers, dims)
        self.downsample = (product[0] * resample, *product[1:])
        self.taps = [tuple(2 * step if step > 1 else 1 for step in stride) for stride in self.strides]
        self.edges = edges_of(edges, dims)
        self.depthwise = depthwise
        self.conv = partial(Convolution, dims=dims, causal=causal, norm=norm, edges=edges)
        self.transposed = partial(TransposedConvolution, dims=dims, causal=causal, norm=norm, edges=edges)
        self.act = partial(Activation, activation, dims=dims, anti_aliased=anti_aliased)

    def units(self, channels: int, kernel: int, dilations: Sequence[int], compress: int, mapped: bool) -> nn.ModuleList:
        """Build the residual units of a stage, one for each dilation; see `ResidualUnit`."""
        return nn.ModuleList(ResidualUnit(self, channels, kernel, dilation, compress, mapped) for dilation in dilations)

    def first_steps(self, outer: int, inner: int, residual: int) -> int:
        """Return the latents that a causal codec's first chunk needs, so that each layer can reflect it.

        Args:
            outer: Kernel size of the convolution at the signal's rate.
            inner: Kernel size of that at the latents' rate.
            residual: Steps that the residual units read.
        """
        if self.edges.fill != "reflect":
            return 1
        rate = self.downsample[0]
        steps = [outer / rate]
        for stride, *_ in self.strides:
            steps += [residual / rate, (stride + 1) / rate]
            rate //= stride
        return math.ceil(max(*steps, inner))


class ResidualUnit(nn.Module):
    """Residual unit of DAC and SEANet: activation, dilated convolution, activation, pointwise convolution.

    Args:
        plan: Layer constructors of the codec.
        channels: Input and output channels.
        kernel: Kernel size of the dilated convolution.
        dilation: Its dilation.
        compress: Ratio of input to hidden channels; 2 in SEANet.
        mapped: Whether the shortcut is a pointwise convolution (EnCodec) instead of the identity.
    """

    def __init__(self, plan: Plan, channels: int, kernel: int, dilation: int, compress: int, mapped: bool) -> None:
        super().__init__()
        inside = max(channels // compress, 1)
        self.act_in = plan.act(channels)
        self.wide = plan.conv(channels, inside, kernel, dilation=dilation, groups=inside if plan.depthwise else 1)
        self.act_out = plan.act(inside)
        self.pointwise = plan.conv(inside, channels, 1)
        self.shortcut = plan.conv(channels, channels, 1) if mapped else None

    def forward(self, x: Tensor, mask: Tensor | None, memory: list[Tensor] | None = None) -> Tensor:
        """Transform `(b, c, *grid)`; `mask` is bool `(b, 1, t, ...)`."""
        y = self.wide(self.act_in(x, mask), mask, memory)
        y = self.pointwise(self.act_out(y, mask), mask)
        if self.shortcut is not None:
            x = self.shortcut(x, mask)
        return x + y  # type: ignore[no-any-return]


class Down(nn.Module):
    """Encoder stage: residual units, then a strided convolution.

    Args:
        plan: Layer constructors of the codec.
        level: Index of the stage in `plan.strides`.
        units: Its residual units.
    """

    def __init__(self, plan: Plan, level: int, units: nn.ModuleList) -> None:
        super().__init__()
        narrow, wide = plan.widths[level : level + 2]
        self.units = units
        self.act = plan.act(narrow)
        self.conv = plan.conv(narrow, wide, plan.taps[level], plan.strides[level])

    def forward(self, x: Tensor, mask: Tensor | None, memory: list[Tensor] | None) -> Tensor:
        """Transform `(b, c, *grid)`; `mask` is bool `(b, 1, t, ...)`, at the input rate."""
        for unit in self.units:
            x = unit(x, mask, memory)
        y: Tensor = self.conv(self.act(x, mask), mask, memory)
        return y


class NoiseBlock(nn.Module):
    """Noise in proportion to the signal, `x + n linear(x)` with a normal number n per step (SNAC, arXiv 2410.14411).

    In training n is drawn. Else it is a function of the step, so that a signal is one of its codes.

    Args:
        plan: Layer constructors of the codec.
        channels: Input and output channels.
        seed: Chooses the function; see `data/noise.py`. It repeats after `PERIOD` steps.
    """

    table: Tensor
    obstacle = "noise is counted from a signal's start"

    def __init__(self, plan: Plan, channels: int, seed: int) -> None:
        super().__init__()
        self.linear = plan.conv(channels, channels, 1, bias=False)
        self.register_buffer("table", torch.from_numpy(gaussian((1, PERIOD), seed)[0]), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """Transform `(b, c, t)`."""
        if self.training:
            noise = torch.randn_like(x[:, :1])
        else:
            steps = torch.arange(x.shape[2], device=x.device) % self.table.shape[0]
            noise = self.table.index_select(0, steps).to(x.dtype)
        return x + noise * self.linear(x)  # type: ignore[no-any-return]


class Up(nn.Module):
    """Decoder stage: a transposed convolution, perhaps noise, then residual units.

    Args:
        plan: Layer constructors of the codec.
        level: Index of the stage in `plan.strides`.
        units: Its residual units.
        noise: Whether to add noise.
    """

    def __init__(self, plan: Plan, level: int, units: nn.ModuleList, noise: bool) -> None:
        super().__init__()
        narrow, wide = plan.widths[level : level + 2]
        self.act = plan.act(wide)
        self.conv = plan.transposed(wide, narrow, plan.taps[level], plan.strides[level])
        self.noise = NoiseBlock(plan, narrow, level) if noise else None
        self.units = units

    def forward(self, x: Tensor, mask: Tensor | None, wide: Tensor | None, memory: list[Tensor] | None) -> Tensor:
        """Transform `(b, c, *grid)`; `mask` is at the input rate, `wide` at the output rate."""
        x = self.conv(self.act(x, mask), mask, memory)
        if self.noise is not None:
            x = self.noise(x)
        wide = shorten(wide, x)
        for unit in self.units:
            x = unit(x, wide, memory)
        return x


def shorten(mask: Tensor | None, x: Tensor) -> Tensor | None:
    """Shorten each sample's valid steps by those that a mask has more than x."""
    return None if mask is None else mask[:, :, mask.shape[2] - x.shape[2] :]
