"""Activations of convolutional codecs, by name: ELU, SiLU, GELU, leaky ReLU, Snake and SnakeBeta.

All map 0 to 0, so that masked values stay 0.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import FunctionCtx, once_differentiable
from torch.nn import functional

from varitok import UserError

__all__ = ["ACTIVATIONS", "Activation", "Snake", "SnakeBeta"]

TAPS = 12  # of the low-pass filters around an anti-aliased activation


class _SnakeFunction(torch.autograd.Function):
    """`x + scale * sin(rate * x)^2`, which saves only x at full size for the backward pass.

    On a CPU, both passes run block by block over channels, so that intermediate values stay in the cache.
    """

    @staticmethod
    def forward(ctx: FunctionCtx, x: Tensor, rate: Tensor, scale: Tensor) -> Tensor:
        ctx.save_for_backward(x, rate, scale)
        y = torch.empty_like(x)
        for now in _blocks(x):
            torch.addcmul(x[now], (x[now] * rate[now]).sin_().square_(), scale[now], out=y[now])
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        x, rate, scale = ctx.saved_tensors
        axes = [axis for axis in range(x.dim()) if axis != 1]
        to_x, to_rate, to_scale = torch.empty_like(x), torch.empty_like(rate), torch.empty_like(scale)
        for now in _blocks(x):
            angles = x[now] * rate[now]
            # d/du sin(u)^2 = 2 sin(u) cos(u)
            sines = angles.sin()
            slope = angles.cos_().mul_(sines).mul_(gradient[now]).mul_(2)
            torch.addcmul(gradient[now], slope, rate[now] * scale[now], out=to_x[now])
            to_rate[now] = slope.mul_(x[now]).sum(axes, keepdim=True) * scale[now]
            to_scale[now] = sines.square_().mul_(gradient[now]).sum(axes, keepdim=True)
        return to_x, to_rate, to_scale


def _blocks(x: Tensor) -> list[tuple[slice, slice]]:
    """Return slices of `(b, c, ...)` along c: on a CPU blocks of about 2^16 elements, on other devices one block."""
    channels = x.shape[1]
    each = max(1, 2**16 * channels // max(x.numel(), 1)) if x.device.type == "cpu" else max(channels, 1)
    return [(slice(None), slice(start, start + each)) for start in range(0, channels, each)]


def _snake(x: Tensor, rate: Tensor, scale: Tensor) -> Tensor:
    """Compute `x + scale * sin(rate * x)^2`; `rate` and `scale` are `(1, c, 1, ...)`."""
    if torch.jit.is_scripting():  # type: ignore[attr-defined]
        return torch.addcmul(x, (x * rate).sin().square(), scale)
    return _eager_snake(x, rate, scale)


@torch.jit.unused
def _eager_snake(x: Tensor, rate: Tensor, scale: Tensor) -> Tensor:
    if torch.jit.is_tracing() or torch.compiler.is_compiling():  # type: ignore[attr-defined, no-untyped-call]
        return torch.addcmul(x, (x * rate).sin().square(), scale)
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
        alpha = self.alpha.to(x.dtype)
        return _snake(x, alpha, 1.0 / (alpha + 1e-9))


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
        return _snake(x, self.log_alpha.exp().to(x.dtype), (-self.log_beta).exp().to(x.dtype))


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
