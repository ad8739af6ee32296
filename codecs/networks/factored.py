"""Convolutional video codecs with factorized (VidTok, Cosmos) or joint (MAGVIT-v2) space-time convolutions.

The encoder is a convolution, stages of residual units each followed by downsampling, a middle with attention, a norm
and a last convolution. The decoder is its mirror.

- VidTok (arXiv 2412.13061, section 3.1): each spatial residual unit is followed by a temporal one.
- Cosmos (arXiv 2501.03575, section 3.1): each convolution is a spatial and a temporal one, after a wavelet transform.
- MAGVIT-v2 (arXiv 2310.05737, section 3.2): each convolution is over all three axes.

Norms are over the channels of each position (VidTok), and padding is zeros, where the published models repeat the first
frame in every layer. So a chunk, a padded batch and a single clip have the same results.
"""

from collections.abc import Sequence
from typing import Annotated, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

from varitok import UserError

from .contract import Decoder, Encoder, Network
from .layers.activations import Activation
from .layers.attention import attend
from .layers.convolution import Convolution, along_first, at_rate, stage_sizes, zero_invalid
from .layers.sequence import SequenceTransformer
from .layers.wavelet import Haar, InverseHaar

__all__ = ["UNITS", "ChannelNorm", "FactoredDecoder", "FactoredEncoder", "Units"]

Units = Literal["split", "factorized", "joint"]
Kernel = tuple[int, int, int]
SPACE, TIME, JOINT = (1, 3, 3), (3, 1, 1), (3, 3, 3)

# For each kind: a tuple of residual units, each a tuple of the kernel sizes that replace one convolution.
UNITS: dict[str, tuple[tuple[Kernel, ...], ...]] = {
    "split": ((SPACE,), (TIME,)),
    "factorized": ((SPACE, TIME),),
    "joint": ((JOINT,),),
}


class ChannelNorm(nn.Module):
    """RMS norm over the channels of each position: `x / sqrt(mean(x^2) + eps) * weight` (arXiv 1910.07467).

    Args:
        channels: Channels of the input.
        eps: Added to the mean square.
    """

    def __init__(self, channels: int, eps: float = 1e-6) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(channels))

    def forward(self, x: Tensor) -> Tensor:
        """Normalize `(b, c, t, h, w)`; the result has the type of x."""
        scale = (x.float().square().mean(1, keepdim=True) + self.eps).rsqrt()
        return x * scale.to(x.dtype) * self.weight[:, None, None, None].to(x.dtype)


class _Chain(nn.Module):
    """Sequence of convolutions that replaces a single one."""

    def __init__(self, inputs: int, outputs: int, kernels: Sequence[Kernel], causal: bool) -> None:
        super().__init__()
        self.convs = nn.ModuleList(
            Convolution(outputs if number else inputs, outputs, kernel, dims=3, causal=causal)
            for number, kernel in enumerate(kernels)
        )

    def forward(self, x: Tensor, mask: Tensor | None, memory: list[Tensor] | None) -> Tensor:
        for conv in self.convs:
            x = conv(x, mask, memory)
        return x


class _Unit(nn.Module):
    """Residual unit: norm, activation and convolution, twice."""

    def __init__(self, inputs: int, outputs: int, kernels: Sequence[Kernel], causal: bool, activation: str) -> None:
        super().__init__()
        self.first_norm = ChannelNorm(inputs)
        self.first = _Chain(inputs, outputs, kernels, causal)
        self.second_norm = ChannelNorm(outputs)
        self.second = _Chain(outputs, outputs, kernels, causal)
        self.act_in = Activation(activation, inputs, 3)
        self.act_out = Activation(activation, outputs, 3)
        self.shortcut = Convolution(inputs, outputs, 1, dims=3) if inputs != outputs else None

    def forward(self, x: Tensor, mask: Tensor | None, memory: list[Tensor] | None) -> Tensor:
        y = self.first(self.act_in(self.first_norm(x)), mask, memory)
        y = self.second(self.act_out(self.second_norm(y)), mask, memory)
        if self.shortcut is not None:
            x = self.shortcut(x)
        return x + y  # type: ignore[no-any-return]


class _Units(nn.Module):
    """Sequence of `depth` residual units, or pairs of them."""

    def __init__(self, inputs: int, outputs: int, depth: int, kind: str, causal: bool, activation: str) -> None:
        super().__init__()
        self.units = nn.ModuleList(
            _Unit(inputs if not (level or number) else outputs, outputs, kernels, causal, activation)
            for level in range(depth)
            for number, kernels in enumerate(UNITS[kind])
        )

    def forward(self, x: Tensor, mask: Tensor | None, memory: list[Tensor] | None) -> Tensor:
        for unit in self.units:
            x = unit(x, mask, memory)
        return x


def _beside(units: str) -> tuple[int, int]:
    """Return the spatial kernel size of convolutions that change the frame rate; VidTok's is 3 x 3."""
    return (1, 1) if units == "factorized" else (3, 3)


class _Down(nn.Module):
    """Downsampling: a strided convolution in space, and in time one blended with average pooling (VidTok).

    In time: `a * mean(x) + (1 - a) * conv(x)`, where `a = sigmoid(blend)`.
    """

    def __init__(self, channels: int, stride: tuple[int, ...], causal: bool, units: str) -> None:
        super().__init__()
        self.time = stride[0]
        space = (1, *stride[1:])
        taps = tuple(2 * step - 1 if step > 1 else 1 for step in space)
        self.across = Convolution(channels, channels, taps, space, dims=3, causal=causal) if max(space) > 1 else None
        self.along: Convolution | None = None
        if self.time > 1:
            taps = (2 * self.time - 1, *_beside(units))
            self.along = Convolution(channels, channels, taps, (self.time, 1, 1), dims=3, causal=causal)
        self.blend = nn.Parameter(torch.full((1,), 2.0)) if self.time > 1 else None

    def forward(self, x: Tensor, mask: Tensor | None, memory: list[Tensor] | None) -> Tensor:
        if self.across is not None:
            x = self.across(x, mask, memory)
        if self.along is not None and self.blend is not None:
            share = self.blend.sigmoid()
            mean = functional.avg_pool3d(x, [self.time, 1, 1])
            x = share * mean + (1 - share) * self.along(x, mask, memory)
        return x


class _Up(nn.Module):
    """Upsampling by repetition: in time blended with a convolution (VidTok), in space followed by one.

    In time: `a * x' + (1 - a) * conv(x')` of the repeated frames `x'`, where `a = sigmoid(blend)`.
    """

    def __init__(self, channels: int, stride: tuple[int, ...], causal: bool, units: str) -> None:
        super().__init__()
        self.time = stride[0]
        self.space = list(stride[1:])
        taps = tuple(3 if step > 1 else 1 for step in stride[1:])
        self.along: Convolution | None = None
        if self.time > 1:
            self.along = Convolution(channels, channels, (3, *_beside(units)), dims=3, causal=causal)
        self.blend = nn.Parameter(torch.full((1,), 2.0)) if self.time > 1 else None
        self.across: Convolution | None = None
        if max(self.space) > 1:
            self.across = Convolution(channels, channels, (1, *taps), dims=3, causal=causal)

    def forward(self, x: Tensor, wide: Tensor | None, memory: list[Tensor] | None) -> Tensor:
        """Upsample x; the mask `wide` is at the output rate."""
        if self.along is not None and self.blend is not None:
            x = x.repeat_interleave(self.time, dim=2)
            share = self.blend.sigmoid()
            x = share * x + (1 - share) * self.along(x, wide, memory)
        if self.across is not None:
            x = x.repeat_interleave(self.space[0], dim=3).repeat_interleave(self.space[1], dim=4)
            x = self.across(x, wide, memory)
        return x


class _FrameAttention(nn.Module):
    """Residual single-head self-attention within each frame."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm = ChannelNorm(channels)
        self.qkv = nn.Linear(channels, 3 * channels)
        self.out = nn.Linear(channels, channels)

    def forward(self, x: Tensor) -> Tensor:
        b, c, t, h, w = x.shape
        tokens = self.norm(x).permute(0, 2, 3, 4, 1).reshape(b * t, h * w, c)  # (b, c, t, h, w) -> (b * t, h * w, c)
        y: Tensor = self.out(attend(self.qkv(tokens)))
        return x + y.reshape(b, t, h, w, c).permute(0, 4, 1, 2, 3)


class _Middle(nn.Module):
    """Residual unit, optional attention within frames and along time, and residual unit."""

    def __init__(
        self, channels: int, kind: str, attention: bool, window: int | None, causal: bool, activation: str
    ) -> None:
        super().__init__()
        # VidTok splits space and time in the stages, but not in the middle.
        kind = "joint" if kind == "split" else kind
        self.first = _Units(channels, channels, 1, kind, causal, activation)
        self.within = _FrameAttention(channels) if attention else None
        self.along: SequenceTransformer | None = None
        if window is not None:
            self.along = SequenceTransformer(channels, 1, 1, causal=causal, window=window, layer_scale=1.0)
        self.second = _Units(channels, channels, 1, kind, causal, activation)

    def forward(self, x: Tensor, mask: Tensor | None, memory: list[Tensor] | None) -> Tensor:
        x = self.first(x, mask, memory)
        if self.within is not None:
            x = self.within(x)
        if self.along is not None:
            b, c, t, h, w = x.shape
            steps: Tensor | None = None
            if mask is not None:
                steps = mask.reshape(b, 1, t).expand(-1, h * w, -1).reshape(b * h * w, t)
            tokens = x.permute(0, 3, 4, 2, 1).reshape(b * h * w, t, c)  # (b, c, t, h, w) -> (b * h * w, t, c)
            x = self.along(tokens, steps, memory).reshape(b, h, w, t, c).permute(0, 4, 3, 1, 2)
        return self.second(x, mask, memory)  # type: ignore[no-any-return]


class _FactoredCodec(Network):
    """Layers of encoder and decoder, which differ in their order."""

    decodes: bool

    def __init__(
        self,
        *,
        width: int,
        base: int,
        strides: Sequence[int | Sequence[int]],
        multipliers: Sequence[int],
        depth: Annotated[int, "[0, 1000]"] = 2,
        channels: int = 3,
        units: Units = "split",
        wavelets: Annotated[int, "[0, 1000]"] = 0,
        attention: bool = True,
        window: int | None = None,
        activation: str = "silu",
        causal: bool = True,
    ) -> None:
        if units not in UNITS:
            raise UserError(f"codec: units={units!r} should be one of {', '.join(UNITS)}")
        steps, widths, product = stage_sizes(base, strides, multipliers, 3)
        downsample = tuple(2**wavelets * step for step in product)
        causal_pad = downsample[0] - 1 if causal else 0
        super().__init__(width=width, downsample=downsample, channels=channels, causal=causal, causal_pad=causal_pad)
        if self.decodes:
            steps, widths = steps[::-1], widths[::-1]
        self.rates = [step[0] for step in steps]
        ends = UNITS[units][0] if units == "factorized" else (JOINT,)  # kernels of the first and the last convolution
        if self.decodes:
            self.unpatcher = InverseHaar(channels, wavelets)
            self.first = _Chain(width, widths[0], ends, causal)
            self.middle = _Middle(widths[0], units, attention, window, causal, activation)
        else:
            self.patcher = Haar(channels, wavelets)
            self.first = _Chain(self.patcher.bands, widths[0], ends, causal)
        self.stages = nn.ModuleList(
            _Units(before, after, depth + self.decodes, units, causal, activation)
            for before, after in zip([widths[0], *widths[:-1]], widths, strict=True)
        )
        changes = zip(widths[:-1], steps, strict=True)
        if self.decodes:
            self.ups = nn.ModuleList(_Up(wide, step, causal, units) for wide, step in changes)
        else:
            self.downs = nn.ModuleList(_Down(wide, step, causal, units) for wide, step in changes)
            self.middle = _Middle(widths[-1], units, attention, window, causal, activation)
        self.norm = ChannelNorm(widths[-1])
        self.act = Activation(activation, widths[-1], 3)
        self.last = _Chain(widths[-1], self.unpatcher.bands if self.decodes else width, ends, causal)
        if not self.decodes:
            for conv in self.last.convs:  # latents of unit variance
                nn.init.kaiming_normal_(conv.layer.weight, nonlinearity="linear")  # type: ignore[union-attr, arg-type]


class FactoredEncoder(_FactoredCodec, Encoder):
    """Encoder of clips into one latent per position of a grid of frames, rows and columns.

    Args:
        width: Width of the latents.
        base: Channels of the first stage.
        strides: Stride of each stage, in order of execution: one number, or one per axis.
        multipliers: Channels of each stage, in multiples of `base`; one more than strides, since no stride follows the
            last stage.
        depth: Residual units per stage; with "split", pairs of units.
        channels: Channels of the clip.
        units: "split" (VidTok), "factorized" (Cosmos) or "joint" (MAGVIT-v2).
        wavelets: Levels of the Haar transform before the first convolution (Cosmos: 2).
        attention: Whether the middle has self-attention within each frame.
        window: Latent frames in the window of the middle's self-attention along time (Cosmos); None for no such
            attention.
        activation: See `activations.ACTIVATIONS`.
        causal: Whether a latent depends only on frames up to the end of its step.

    Raises:
        UserError: Inconsistent sizes.
    """

    decodes = False

    def forward(self, signal: Tensor, mask: Tensor | None = None, memory: list[Tensor] | None = None) -> Tensor:
        """Return the latents `(b, n, width)` of clips `(b, c, t, h, w)`."""
        rate = self.downsample[0] // self.patcher.rate
        mask = along_first(mask, signal.shape[2] // self.downsample[0], 3)
        here = at_rate(mask, rate, 3)
        x = self.first(self.patcher(signal), here, memory)
        for level, (stage, down) in enumerate(zip(self.stages, self.downs)):  # noqa: B905 (one stage more; TorchScript)
            x = down(stage(x, here, memory), here, memory)
            rate = rate // self.rates[level]
            here = at_rate(mask, rate, 3)
        x = self.stages[-1](x, here, memory)
        x = self.middle(x, here, memory)
        x = self.last(self.act(self.norm(x)), here, memory)
        # (b, width, *grid) -> (b, n, width)
        return x.flatten(2).transpose(1, 2)  # type: ignore[no-any-return]


class FactoredDecoder(_FactoredCodec, Decoder):
    """Decoder of clips: the mirror of `FactoredEncoder`, with the same arguments.

    Each stage has one residual unit more, as is usual. `strides` are in the order of an encoder: the last acts first.

    Raises:
        UserError: Inconsistent sizes.
    """

    decodes = True

    def forward(
        self, latents: Tensor, mask: Tensor | None, grid: list[int], memory: list[Tensor] | None = None
    ) -> Tensor:
        """Decode latents `(b, n, width)` into clips `(b, c, t, h, w)`."""
        # (b, n, width) -> (b, width, *grid)
        x = latents.transpose(1, 2).reshape([latents.shape[0], latents.shape[2]] + grid)  # noqa: RUF005 (TorchScript)
        mask = along_first(mask, grid[0], 3)
        rate = 1
        here = at_rate(mask, rate, 3)
        x = self.middle(self.first(x, here, memory), here, memory)
        for level, (stage, up) in enumerate(zip(self.stages, self.ups)):  # noqa: B905 (one stage more; TorchScript)
            x = stage(x, here, memory)
            rate = rate * self.rates[level]
            here = at_rate(mask, rate, 3)
            x = up(x, here, memory)
        x = self.stages[-1](x, here, memory)
        x = self.last(self.act(self.norm(x)), here, memory)
        return zero_invalid(self.unpatcher(x), at_rate(mask, rate * self.unpatcher.rate, 3))
