"""Convolutional encoders and decoders over 1, 2 or 3 axes, as in SEANet, DAC and most audio codecs.

The encoder is a convolution, a stage per stride, and a last convolution. A stage is residual units and a strided
convolution of kernel size `2 * stride`. The decoder is its mirror. SEANet (EnCodec, arXiv 2210.13438, section 3.1) has
one residual unit per stage, with ELU and fewer hidden channels. DAC (arXiv 2306.06546, section 3.1) has three, with
dilations 1, 3, 9 and Snake. Without `edges` of a published system, signals are padded with zeros, so that a causal
codec streams from the first latent on.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional

from varitok import UserError

from ..padding import pad_to_grid
from .contract import Decoder, Encoder, Precise
from .layers.convolution import Convolution, Norm, TransposedConvolution, along_first, at_rate, zero_invalid
from .layers.stages import Down, Plan, Up, shorten

__all__ = ["ConvDecoder", "ConvEncoder"]


def _along_time(module: nn.Module | None, dims: int) -> nn.Module | None:
    """Check that a sequence network is used on one axis only, and return it."""
    if module is not None and dims > 1:
        raise UserError("codec: inner and middle networks are for one axis only")
    return module


class ConvEncoder(Encoder):
    """Convolutional encoder into one latent per step of the grid.

    Args:
        width: Width of the latents.
        base: Channels after the first convolution.
        strides: Stride of each stage, in order of execution: one number, or one per axis.
        channels: Channels of the signal.
        dims: Axes of the signal: 1 for audio, 2 for images, 3 for video.
        multipliers: Channels before each stage and after the last, in multiples of `base`; powers of two if None.
        kernel: Kernel size of the first convolution.
        last_kernel: Kernel size of the last convolution.
        residual_kernel: Kernel size of the residual units.
        dilations: Dilations of the residual units of each stage, one unit per dilation.
        compress: Ratio of input to hidden channels of the residual units.
        conv_shortcut: Whether the shortcuts of residual units are pointwise convolutions.
        activation: See `activations.ACTIVATIONS`.
        anti_aliased: Whether activations are anti-aliased (BigVGAN); for one axis, and not for a causal codec.
        norm: `weight`, `group` or `none`; see `Convolution`.
        causal: Whether a latent depends only on the signal up to the end of its step, along the first axis.
        inner: Network on `(b, n, d)` before the last convolution, d the last stage's width; EnCodec's LSTM.
        middle: Network on `(b, n, width)` after the last convolution; Mimi's transformer.
        resample: Stride of another convolution after `middle` (Mimi: 2); 1 for none.
        edges: Treatment of a signal's ends, a name in `edges.EDGES`: ours, or that of a published system.
        direct: Whether the bottleneck quantizes the latents without a linear map before and after it, as published.
        depthwise: Whether residual units, this encoder's last layer and a decoder's first convolve each channel by
            itself, or as few as their widths allow (SNAC). This last layer then has no activation before it.
        multiple: Latents come in multiples of it, signals are padded with zeros; SNAC's windows and coarsest codes.

    Raises:
        UserError: Inconsistent sizes.
    """

    def __init__(
        self,
        *,
        width: int,
        base: int,
        strides: Sequence[int | Sequence[int]],
        channels: int = 1,
        dims: int = 1,
        multipliers: Sequence[int] | None = None,
        kernel: int = 7,
        last_kernel: int = 3,
        residual_kernel: int = 7,
        dilations: Sequence[int] = (1, 3, 9),
        compress: int = 1,
        conv_shortcut: bool = False,
        activation: str = "snake",
        anti_aliased: bool = False,
        norm: Norm = "weight",
        causal: bool = False,
        inner: nn.Module | None = None,
        middle: nn.Module | None = None,
        resample: int = 1,
        edges: str = "zeros",
        direct: bool = False,
        depthwise: bool = False,
        multiple: int = 1,
    ) -> None:
        plan = Plan(
            base, strides, multipliers, dims, causal, norm, activation, anti_aliased, resample, edges, depthwise
        )
        causal_pad = plan.downsample[0] - 1 if causal and dims == 3 else 0
        super().__init__(
            width=width,
            downsample=plan.downsample,
            channels=channels,
            causal=causal,
            causal_pad=causal_pad,
            direct=direct,
            partial=plan.edges.partial,
            first_steps=plan.first_steps(kernel, last_kernel, (residual_kernel - 1) * max(dilations) + 1),
            multiple=multiple,
        )
        self.dims = dims
        self.rate = plan.downsample[0]
        self.strides = [stride[0] for stride in plan.strides]
        self.resample = resample
        self.first = plan.conv(channels, plan.widths[0], kernel)
        self.stages = nn.ModuleList(
            Down(plan, level, plan.units(wide, residual_kernel, dilations, compress, conv_shortcut))
            for level, wide in enumerate(plan.widths[:-1])
        )
        self.inner = _along_time(inner, dims)
        self.act = None if depthwise else plan.act(plan.widths[-1])
        groups = math.gcd(plan.widths[-1], width) if depthwise else 1
        self.last = plan.conv(plan.widths[-1], width, last_kernel, groups=groups)
        self.middle = _along_time(middle, dims)
        self.down: Convolution | None = None
        if resample > 1:
            self.down = Convolution(
                width,
                width,
                2 * resample,
                resample,
                bias=False,
                dims=dims,
                causal=causal,
                edges=plan.edges.resample or edges,
            )

    def forward(self, signal: Tensor, mask: Tensor | None = None, memory: list[Tensor] | None = None) -> Tensor:
        """Return the latents `(b, n, width)` of signals `(b, c, *size)`."""
        # With a mask, the signal has whole steps.
        here = at_rate(along_first(mask, signal.shape[2] // self.rate, self.dims), self.rate, self.dims)
        if self.partial and not torch.jit.is_scripting():  # type: ignore[attr-defined]
            signal, here = self._completed(signal, here)
        x = self.first(signal, here, memory)
        for level, stage in enumerate(self.stages):
            x = stage(x, here, memory)
            here = None if here is None else here[:, :, :: self.strides[level]]
        if self.inner is not None:
            x = self.inner(x.transpose(1, 2), None if here is None else here[:, 0], memory).transpose(1, 2)
        if self.act is not None:
            x = self.act(x, here)
        x = self.last(x, here, memory)
        if self.middle is not None:
            x = self.middle(x.transpose(1, 2), None if here is None else here[:, 0], memory).transpose(1, 2)
        if self.down is not None:
            x = self.down(x, here, memory)
        # (b, width, *grid) -> (b, n, width)
        return x.flatten(2).transpose(1, 2)  # type: ignore[no-any-return]

    @torch.jit.unused
    def _completed(self, signal: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Complete the last step of an exported graph's signal, and mask it: symbolic sizes would take minutes."""
        if mask is None and torch.compiler.is_exporting():
            t = signal.shape[2]
            signal = pad_to_grid(signal, [self.rate])
            mask = (torch.arange(signal.shape[2], device=signal.device) < t)[None, None]
        return signal, mask


class ConvDecoder(Precise, Decoder):
    """Convolutional decoder, the mirror of `ConvEncoder`: each axis has exactly `steps * downsample` samples.

    The other arguments are the encoder's. `strides` are in the encoder's order: the last acts first.

    Args:
        base: Channels before the last convolution; may differ from the encoder's.
        tanh: Whether to apply tanh to the output (DAC).
        inner: Network on `(b, n, d)` after the first convolution, d the first stage's width; EnCodec's LSTM.
        middle: Network on `(b, n, width)` before the first convolution; Mimi's transformer.
        resample: Stride of a depthwise transposed convolution before `middle` (Mimi: 2); 1 for none.
        noise: Whether each stage adds noise in proportion to its signal (SNAC); for one axis.

    Raises:
        UserError: Inconsistent sizes.
    """

    def __init__(
        self,
        *,
        width: int,
        base: int,
        strides: Sequence[int | Sequence[int]],
        channels: int = 1,
        dims: int = 1,
        multipliers: Sequence[int] | None = None,
        kernel: int = 7,
        last_kernel: int = 7,
        residual_kernel: int = 7,
        dilations: Sequence[int] = (1, 3, 9),
        compress: int = 1,
        conv_shortcut: bool = False,
        activation: str = "snake",
        anti_aliased: bool = False,
        norm: Norm = "weight",
        causal: bool = False,
        tanh: bool = False,
        inner: nn.Module | None = None,
        middle: nn.Module | None = None,
        resample: int = 1,
        edges: str = "zeros",
        depthwise: bool = False,
        noise: bool = False,
    ) -> None:
        if noise and dims > 1:
            raise UserError("codec.decoder.noise: is for one axis; give false")
        plan = Plan(
            base, strides, multipliers, dims, causal, norm, activation, anti_aliased, resample, edges, depthwise
        )
        steps = plan.first_steps(last_kernel, kernel, (residual_kernel - 1) * max(dilations) + 1)
        super().__init__(width=width, downsample=plan.downsample, channels=channels, causal=causal, first_steps=steps)
        self.shortens = plan.edges.shortens
        self.reflects = plan.edges.fill == "reflect"
        self.dims = dims
        self.rate = plan.downsample[0]
        self.strides = [stride[0] for stride in reversed(plan.strides)]
        self.resample = resample
        self.tanh = tanh
        self.up: TransposedConvolution | None = None
        if resample > 1:
            self.up = TransposedConvolution(
                width, width, 2 * resample, resample, groups=width, bias=False, dims=dims, causal=causal, edges=edges
            )
        self.middle = _along_time(middle, dims)
        inside = width if depthwise else plan.widths[-1]
        self.first = plan.conv(width, inside, kernel, groups=width if depthwise else 1)
        self.pointwise = plan.conv(width, plan.widths[-1], 1) if depthwise else None
        self.inner = _along_time(inner, dims)
        self.stages = nn.ModuleList(
            Up(plan, level, plan.units(plan.widths[level], residual_kernel, dilations, compress, conv_shortcut), noise)
            for level in reversed(range(len(plan.strides)))
        )
        self.act = plan.act(plan.widths[0])
        self.last = plan.conv(plan.widths[0], channels, last_kernel)

    def forward(
        self, latents: Tensor, mask: Tensor | None, grid: list[int], memory: list[Tensor] | None = None
    ) -> Tensor:
        """Decode latents `(b, n, width)` into signals `(b, c, *size)`."""
        x = latents.transpose(1, 2)  # (b, n, width) -> (b, width, n)
        if self.dims > 1:
            x = x.reshape([x.shape[0], x.shape[1]] + grid)  # noqa: RUF005 (TorchScript)
        mask = along_first(mask, x.shape[2], self.dims)
        if self.reflects and not torch.jit.is_scripting():  # type: ignore[attr-defined]
            mask = self._marked(latents, mask)
        rate = 1
        here = at_rate(mask, rate, self.dims)
        if self.up is not None:
            x = self.up(x, here, memory)
            rate = rate * self.resample
            here = at_rate(mask, rate, self.dims)
        if self.middle is not None:
            x = self.middle(x.transpose(1, 2), None if here is None else here[:, 0], memory).transpose(1, 2)
        x = self.first(x, here, memory)
        if self.pointwise is not None:
            x = self.pointwise(x, here)
        if self.inner is not None:
            x = self.inner(x.transpose(1, 2), None if here is None else here[:, 0], memory).transpose(1, 2)
        for level, stage in enumerate(self.stages):
            rate = rate * self.strides[level]
            wide = at_rate(mask, rate, self.dims)
            x = stage(x, shorten(here, x), wide, memory)
            here = shorten(wide, x)
        # Spectral losses and discriminators of waveforms detect the rounding noise of bfloat16.
        y = self.precisely(x, here, memory) if self.dims == 1 else self.compute(x, here, memory)
        if self.shortens:
            y = functional.pad(y, [0, latents.shape[1] * self.rate - y.shape[2]])
        return y

    @torch.jit.unused
    def _marked(self, latents: Tensor, mask: Tensor | None) -> Tensor | None:
        """Mask all latents of an exported graph, which may not reflect by the example's length."""
        if mask is None and torch.compiler.is_exporting():
            return torch.ones_like(latents[:1, :, 0], dtype=torch.bool)
        return mask

    def compute(self, x: Tensor, mask: Tensor | None, memory: list[Tensor] | None) -> Tensor:
        """Return the signal, given the last stage's output."""
        x = self.last(self.act(x, mask), mask, memory)
        return zero_invalid(torch.tanh(x) if self.tanh else x, mask)
