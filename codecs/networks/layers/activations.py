"""Activations of convolutional codecs, by name: ELU, SiLU, GELU, leaky ReLU, Snake and SnakeBeta.

All map 0 to 0, so that masked values stay 0.
"""

import logging
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import FunctionCtx, once_differentiable
from torch.nn import functional
from torch.utils._triton import has_triton

from varitok import UserError

__all__ = ["ACTIVATIONS", "Activation", "Snake", "SnakeBeta"]

_log = logging.getLogger(__name__)
TAPS = 12  # of the low-pass filters around an anti-aliased activation


class _SnakeFunction(torch.autograd.Function):
    """`x + scale * sin(rate * x)^2`, which saves only x at full size for the backward pass.

    On a CPU, both passes run block by block over channels, so that intermediate values stay in the cache; on a GPU each
    is a fused kernel.
    """

    @staticmethod
    def forward(ctx: FunctionCtx, x: Tensor, rate: Tensor, scale: Tensor) -> Tensor:
        ctx.save_for_backward(x, rate, scale)
        y = torch.empty_like(x)
        for now in _blocks(x):
            _passes(x)[0](x[now], rate[now], scale[now], y[now])
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        x, rate, scale = ctx.saved_tensors
        out = torch.empty_like(x), torch.empty_like(rate), torch.empty_like(scale)
        for now in _blocks(x):
            _passes(x)[1](gradient[now], x[now], rate[now], scale[now], *(to[now] for to in out))
        return out


def _forward(x: Tensor, rate: Tensor, scale: Tensor, y: Tensor) -> None:
    """Write the activation to y. Angles have the type of `rate`: bfloat16's, near 10, are off by up to 0.03 rad."""
    x = x.to(rate.dtype)
    torch.addcmul(x, (x * rate).sin_().square_(), scale, out=y)


def _backward(
    gradient: Tensor, x: Tensor, rate: Tensor, scale: Tensor, to_x: Tensor, to_rate: Tensor, to_scale: Tensor
) -> None:
    """Write the gradients of x, rate and scale, given that of the activation."""
    axes = [axis for axis in range(x.dim()) if axis != 1]
    x, gradient = x.to(rate.dtype), gradient.to(rate.dtype)
    angles = x * rate
    # d/du sin(u)^2 = 2 sin(u) cos(u)
    sines = angles.sin()
    slope = angles.cos_().mul_(sines).mul_(gradient).mul_(2)
    torch.addcmul(gradient, slope, rate * scale, out=to_x)
    to_rate.copy_(slope.mul_(x).sum(axes, keepdim=True) * scale)
    to_scale.copy_(sines.square_().mul_(gradient).sum(axes, keepdim=True))


_Passes = tuple[Callable[..., None], Callable[..., None]]


def _passes(x: Tensor) -> _Passes:
    """Return the forward and the backward pass for the device of x."""
    return _fused() if x.is_cuda else (_forward, _backward)


@cache
def _fused() -> _Passes:
    """Compile both passes to a kernel each; return them as they are if this machine has no compiler."""
    if not has_triton():
        return _forward, _backward
    fused = torch.compile(_forward, dynamic=True), torch.compile(_backward, dynamic=True)
    x, rate = torch.zeros(2, 3, 8, device="cuda"), torch.ones(1, 3, 1, device="cuda")
    try:
        fused[0](x, rate, rate, torch.empty_like(x))
        fused[1](x, x, rate, rate, *(torch.empty_like(like) for like in (x, rate, rate)))
    except Exception as error:  # the reason differs: no C compiler, no headers of CUDA, no folder for the cache
        _log.warning("Snake runs unfused, since compiling it failed: %s", str(error).strip().splitlines()[0])
        return _forward, _backward
    return fused


def _blocks(x: Tensor) -> list[tuple[slice, slice]]:
    """Return slices of `(b, c, ...)` along c: on a CPU blocks of about 2^16 elements, on other devices one block."""
    channels = x.shape[1]
    each = max(1, 2**16 * channels // max(x.numel(), 1)) if x.device.type == "cpu" else max(channels, 1)
    return [(slice(None), slice(start, start + each)) for start in range(0, channels, each)]


def _snake(x: Tensor, rate: Tensor, scale: Tensor) -> Tensor:
    """Compute `x + scale * sin(rate * x)^2`; `rate` and `scale` are `(1, c, 1, ...)`, the type of the angles."""
    if torch.jit.is_scripting():  # type: ignore[attr-defined]
        return _traced_snake(x, rate, scale)
    return _eager_snake(x, rate, scale)


def _traced_snake(x: Tensor, rate: Tensor, scale: Tensor) -> Tensor:
    wide = x.to(rate.dtype)
    return torch.addcmul(wide, (wide * rate).sin().square(), scale).to(x.dtype)


@torch.jit.unused
def _eager_snake(x: Tensor, rate: Tensor, scale: Tensor) -> Tensor:
    if torch.jit.is_tracing() or torch.compiler.is_compiling():  # type: ignore[attr-defined, no-untyped-call]
        return _traced_snake(x, rate, scale)
    return _SnakeFunction.apply(x, rate, scale)  # type: ignore[no-any-return]


class Snake(nn.Module):
    """Snake: `x + sin(a x)^2 / a` with a learned `a` per channel, initially 1 (arXiv 2006.08195, section 3).

    Args:
        channels: Channels of the input.
        dims: Number of axes after the channels.
    """

    def __init__(self, channels: int, dims: int = 1) -> None:
        super().__init__()
        self.alpha = nn.Parameter(torch.ones(1, channels, *[1] * dims))

    def forward(self, x: Tensor) -> Tensor:
        """Apply the activation to `(b, c, *grid)`."""
        return _snake(x, self.alpha, 1.0 / (self.alpha + 1e-9))


class SnakeBeta(nn.Module):
    """SnakeBeta: `x + sin(a x)^2 / b` with learned `log a` and `log b` per channel (BigVGAN, arXiv 2206.04658).

    Args:
        channels: Channels of the input.
        dims: Number of axes after the channels.
    """

    def __init__(self, channels: int, dims: int = 1) -> None:
        super().__init__()
        self.log_alpha = nn.Parameter(torch.zeros(1, channels, *[1] * dims))
        self.log_beta = nn.Parameter(torch.zeros(1, channels, *[1] * dims))

    def forward(self, x: Tensor) -> Tensor:
        """Apply the activation to `(b, c, *grid)`."""
        return _snake(x, self.log_alpha.exp(), (-self.log_beta).exp())


# Constructors by name, called with the number of channels and of axes after them.
ACTIVATIONS: dict[str, Callable[[int, int], nn.Module]] = {
    "elu": lambda *_: nn.ELU(),
    "gelu": lambda *_: nn.GELU(),
    "silu": lambda *_: nn.SiLU(),
    "leaky_relu": lambda *_: nn.LeakyReLU(0.1),
    "snake": Snake,
    "snake_beta": SnakeBeta,
}


class Activation(nn.Module):
    """Activation by name, optionally anti-aliased: applied at twice the sample rate, between two low-pass filters.

    Harmonics above the Nyquist frequency are then removed instead of aliased (BigVGAN, arXiv 2206.04658, section 3.2;
    12 taps). The filters are not causal.

    Args:
        name: One of `ACTIVATIONS`.
        channels: Channels of the input.
        dims: Number of axes after the channels.
        anti_aliased: Whether to filter; for one axis only.

    Raises:
        UserError: Unknown name, or an anti-aliased activation over more than one axis.
    """

    low: Tensor

    def __init__(self, name: str, channels: int, dims: int = 1, anti_aliased: bool = False) -> None:
        super().__init__()
        if anti_aliased and dims > 1:
            raise UserError(f"activation: anti_aliased is for one axis, not {dims}")
        if name not in ACTIVATIONS:
            raise UserError(f"activation={name}: should be one of {', '.join(ACTIVATIONS)}")
        self.inner = ACTIVATIONS[name](channels, dims)
        self.anti_aliased = anti_aliased
        self.pad = TAPS // 2 - 1
        self.register_buffer("low", _low_pass() if anti_aliased else torch.zeros(0), persistent=False)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """Activate `(b, c, *grid)`; `mask` is bool `(b, 1, t, ...)`. The filters read invalid steps as 0."""
        if not self.anti_aliased:
            plain: Tensor = self.inner(x)
            return plain
        b, c, t = x.shape
        low = self.low.to(x.dtype)
        inside: Tensor | None = None
        if mask is not None:
            x = torch.where(mask, x, torch.zeros_like(x))
            inside = mask.repeat_interleave(2, dim=2)
        # All channels share a filter: (b, c, t) -> (b * c, 1, t) -> (b * c, 1, 2 * t)
        up = functional.conv_transpose1d(x.reshape(b * c, 1, t), 2 * low, stride=2, padding=self.pad)
        active = self.inner(up.reshape(b, c, 2 * t))
        if inside is not None:
            active = torch.where(inside, active, torch.zeros_like(active))
        down = functional.conv1d(active.reshape(b * c, 1, 2 * t), low, stride=2, padding=self.pad)
        return down.reshape(b, c, t)


def _low_pass() -> Tensor:
    """Return a half-band low-pass filter of sum 1, `(1, 1, TAPS)`: a Kaiser-windowed sinc.

    The cutoff is 0.25 and the transition width 0.3, both relative to the sample rate.
    """
    half = TAPS // 2
    # Kaiser's formulas: the stopband attenuation of this filter, 51 dB, and the window's beta for more than 50 dB.
    attenuation = 2.285 * (half - 1) * torch.pi * 4 * 0.3 + 7.95
    beta = 0.1102 * (attenuation - 8.7)
    window = torch.kaiser_window(TAPS, periodic=False, beta=beta, dtype=torch.float64)
    offsets = torch.arange(-half, half, dtype=torch.float64) + 0.5
    sinc = torch.sinc(0.5 * offsets) * window
    return (sinc / sinc.sum()).float()[None, None]
