"""Residual convolutional codecs of images (VQGAN) and clips (VidTok), two axes or three.

The encoder is a convolution, stages of residual units each followed by downsampling, a middle with attention, a norm
and a last convolution. The decoder is its mirror.

- VQGAN (arXiv 2012.09841, appendix, table 7), also LlamaGen and Stable Diffusion's auto-encoder: images, group norms.
- Open-MAGVIT2 (arXiv 2409.04410, section 3.1): VQGAN without attention; latents modulate the decoder's stages.
- VidTok (arXiv 2412.13061, section 3.1): each spatial residual unit is followed by a temporal one.
- Cosmos (arXiv 2501.03575, section 4.1): wavelets first; each convolution of clips is a spatial and a temporal one.
- MAGVIT-v2 (arXiv 2310.05737, section 3.2): each convolution is over all axes of a clip.

Norms of clips are over the channels of each position (VidTok), and padding is zeros, where the published models repeat
the first frame in every layer. So a chunk, a padded batch and a single clip have the same results.
"""

from collections.abc import Sequence
from functools import partial
from typing import Annotated, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

from varitok import UserError

from .contract import Decoder, Encoder, Network
from .layers.activations import Activation
from .layers.attention import attend
from .layers.convolution import Convolution, StepNorm, along_first, at_rate, stage_sizes, zero_invalid
from .layers.sequence import SequenceTransformer
from .layers.wavelet import Haar, InverseHaar

__all__ = ["UNITS", "ChannelNorm", "ResNetDecoder", "ResNetEncoder", "Units"]

Units = Literal["split", "factorized", "joint"]
Kernel = tuple[int, ...]
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
        dims: Number of axes after the channels.
        eps: Added to the mean square.
    """

    shape: list[int]

    def __init__(self, channels: int, dims: int, eps: float = 1e-6) -> None:
        super().__init__()
        self.eps = eps
        self.shape = [channels] + [1] * dims
        self.weight = nn.Parameter(torch.ones(channels))

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """Normalize `(b, c, *grid)`, valid or not; the result has the type of x."""
        scale = (x.float().square().mean(1, keepdim=True) + self.eps).rsqrt()
        return x * scale.to(x.dtype) * self.weight.view(self.shape).to(x.dtype)


class _Plan:
    """Layer constructors and options that the stages of a codec share."""

    def __init__(self, dims: int, units: str, causal: bool, activation: str, groups: int | None) -> None:
        if units not in UNITS:
            raise UserError(f"codec: units={units!r} should be one of {', '.join(UNITS)}")
        if dims == 2 and units != "joint":
            raise UserError(f"codec: units={units} is for clips; an image's are joint")
        if causal and groups is not None:
            raise UserError("codec: a causal codec can't have group norms, whose statistics look ahead; groups=null")
        self.dims = dims
        self.units = tuple(tuple(kernel[-dims:] for kernel in unit) for unit in UNITS[units])
        self.joint = (3,) * dims
        self.ends = self.units[0] if units == "factorized" else (self.joint,)  # first and last convolution
        self.beside = (1, 1) if units == "factorized" else (3, 3)  # rows and columns where the frame rate changes
        self.causal = causal
        self.groups = groups
        self.conv = partial(Convolution, dims=dims, causal=causal)
        self.act = partial(Activation, activation, dims=dims)

    def norm(self, channels: int) -> nn.Module:
        return ChannelNorm(channels, self.dims) if self.groups is None else StepNorm(channels, self.groups, 1e-6)

    def in_space(self, stride: tuple[int, ...]) -> tuple[int, ...]:
        """Return a stride without its change of the frame rate."""
        return (1, *stride[1:]) if self.dims == 3 else stride


class _Chain(nn.Module):
    """Sequence of convolutions that replaces a single one."""

    def __init__(self, plan: _Plan, inputs: int, outputs: int, kernels: Sequence[Kernel]) -> None:
        super().__init__()
        self.convs = nn.ModuleList(
            plan.conv(outputs if number else inputs, outputs, kernel) for number, kernel in enumerate(kernels)
        )

    def forward(self, x: Tensor, mask: Tensor | None, memory: list[Tensor] | None) -> Tensor:
        for conv in self.convs:
            x = conv(x, mask, memory)
        return x


class _SpaceAttention(nn.Module):
    """Residual single-head self-attention within an image, or within each frame."""

    def __init__(self, plan: _Plan, channels: int) -> None:
        super().__init__()
        self.norm = plan.norm(channels)
        self.qkv = nn.Linear(channels, 3 * channels)
        self.out = nn.Linear(channels, channels)

    def forward(self, x: Tensor, mask: Tensor | None) -> Tensor:
        rows, columns = x.shape[-2], x.shape[-1]
        last = self.norm(x, mask).movedim(1, -1)  # (b, c, *grid) -> (b, *grid, c)
        allowed: Tensor | None = None
        if mask is not None and x.dim() == 4:  # a frame is valid as a whole
            allowed = mask.expand(-1, -1, -1, columns).flatten(2).unsqueeze(2)  # (b, 1, rows, 1) -> (b, 1, 1, n)
        y: Tensor = self.out(attend(self.qkv(last.reshape(-1, rows * columns, x.shape[1])), 1, allowed))
        return x + y.reshape(last.shape).movedim(-1, 1)


class _Unit(nn.Module):
    """Residual unit: norm, activation and convolution, twice; then attention, if any."""

    def __init__(self, plan: _Plan, inputs: int, outputs: int, kernels: Sequence[Kernel], attention: bool) -> None:
        super().__init__()
        self.first_norm = plan.norm(inputs)
        self.first = _Chain(plan, inputs, outputs, kernels)
        self.second_norm = plan.norm(outputs)
        self.second = _Chain(plan, outputs, outputs, kernels)
        self.act_in = plan.act(inputs)
        self.act_out = plan.act(outputs)
        self.shortcut = Convolution(inputs, outputs, 1, dims=plan.dims) if inputs != outputs else None
        self.within = _SpaceAttention(plan, outputs) if attention else None

    def forward(self, x: Tensor, mask: Tensor | None, memory: list[Tensor] | None) -> Tensor:
        y = self.first(self.act_in(self.first_norm(x, mask)), mask, memory)
        y = self.second(self.act_out(self.second_norm(y, mask)), mask, memory)
        if self.shortcut is not None:
            x = self.shortcut(x)
        x = x + y
        if self.within is not None:
            x = self.within(x, mask)
        return x


class _Units(nn.Module):
    """Sequence of `depth` residual units, or pairs of them."""

    def __init__(self, plan: _Plan, inputs: int, outputs: int, depth: int, attention: bool = False) -> None:
        super().__init__()
        self.units = nn.ModuleList(
            _Unit(plan, inputs if not (level or number) else outputs, outputs, kernels, attention)
            for level in range(depth)
            for number, kernels in enumerate(plan.units)
        )

    def forward(self, x: Tensor, mask: Tensor | None, memory: list[Tensor] | None) -> Tensor:
        for unit in self.units:
            x = unit(x, mask, memory)
        return x


class _Down(nn.Module):
    """Downsampling: a strided convolution in space, and in time one blended with average pooling (VidTok).

    In time: `a * mean(x) + (1 - a) * conv(x)`, where `a = sigmoid(blend)`.
    """

    def __init__(self, plan: _Plan, channels: int, stride: tuple[int, ...]) -> None:
        super().__init__()
        space = plan.in_space(stride)
        self.time = stride[0] // space[0]
        taps = tuple(2 * step - 1 if step > 1 else 1 for step in space)
        self.across = plan.conv(channels, channels, taps, space) if max(space) > 1 else None
        self.along: Convolution | None = None
        if self.time > 1:
            self.along = plan.conv(channels, channels, (2 * self.time - 1, *plan.beside), (self.time, 1, 1))
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
    If `shuffle`, a convolution in space makes the channels of all new pixels instead.
    """

    def __init__(self, plan: _Plan, channels: int, stride: tuple[int, ...], shuffle: bool) -> None:
        super().__init__()
        space = plan.in_space(stride)
        self.time = stride[0] // space[0]
        self.space = list(space[-2:])
        self.factor = self.space[0] if shuffle else 1
        if shuffle and (plan.dims != 2 or self.space != [self.factor] * 2):
            raise UserError("codec: shuffle is for images, with equal strides of rows and columns")
        taps = tuple(3 if step > 1 else 1 for step in space)
        self.along: Convolution | None = None
        if self.time > 1:
            self.along = plan.conv(channels, channels, (3, *plan.beside))
        self.blend = nn.Parameter(torch.full((1,), 2.0)) if self.time > 1 else None
        self.across = plan.conv(channels, channels * self.factor**2, taps) if max(space) > 1 else None

    def forward(self, x: Tensor, mask: Tensor | None, wide: Tensor | None, memory: list[Tensor] | None) -> Tensor:
        """Upsample x; `mask` is at the input rate, `wide` at the output rate."""
        if self.along is not None and self.blend is not None:
            x = x.repeat_interleave(self.time, dim=2)
            share = self.blend.sigmoid()
            x = share * x + (1 - share) * self.along(x, wide, memory)
        if self.across is not None:
            if self.factor > 1:
                return functional.pixel_shuffle(self.across(x, mask, memory), self.factor)
            rows = x.dim() - 2
            x = x.repeat_interleave(self.space[0], dim=rows).repeat_interleave(self.space[1], dim=rows + 1)
            x = self.across(x, wide, memory)
        return x


class _Modulation(nn.Module):
    """Norm whose scale and shift depend on the latents' statistics, or nothing (Open-MAGVIT2).

    `norm(x) * (1 + A deviation(latents)) + B mean(latents)`, with linear A and B over an image's valid latents.
    """

    def __init__(self, plan: _Plan, channels: int, width: int, active: bool) -> None:
        super().__init__()
        self.obstacle = "a modulation's statistics are of the whole signal" if active else ""
        self.norm = plan.norm(channels) if active else None
        self.scale = nn.Linear(width, channels) if active else None
        self.shift = nn.Linear(width, channels) if active else None

    def forward(self, x: Tensor, latents: Tensor, valid: Tensor | None, mask: Tensor | None) -> Tensor:
        """Modulate `(b, c, *grid)` by latents `(b, n, width)`; `valid` is bool `(b, n)`, `mask` `(b, 1, t, ...)`."""
        if self.norm is None or self.scale is None or self.shift is None:
            return x
        if valid is None:
            mean = latents.mean(1)
            square = latents.square().mean(1)
        else:
            count = valid.sum(1, keepdim=True).clamp(min=1)
            shown = zero_invalid(latents, valid.unsqueeze(2))
            mean = shown.sum(1) / count
            square = shown.square().sum(1) / count
        deviation = (square - mean.square()).clamp(min=1e-6).sqrt()
        shape = [x.shape[0], x.shape[1]] + [1] * (x.dim() - 2)
        y: Tensor = self.norm(x, mask) * (1 + self.scale(deviation).reshape(shape)) + self.shift(mean).reshape(shape)
        return y


class _Middle(nn.Module):
    """Residual units, optional attention within frames and along time, and residual units."""

    def __init__(self, plan: _Plan, channels: int, depth: int, attention: bool, window: int | None) -> None:
        super().__init__()
        self.first = _Units(plan, channels, channels, depth // 2)
        self.within = _SpaceAttention(plan, channels) if attention else None
        self.along: SequenceTransformer | None = None
        if window is not None:
            self.along = SequenceTransformer(channels, 1, 1, causal=plan.causal, window=window, layer_scale=1.0)
        self.second = _Units(plan, channels, channels, depth - depth // 2)

    def forward(self, x: Tensor, mask: Tensor | None, memory: list[Tensor] | None) -> Tensor:
        x = self.first(x, mask, memory)
        if self.within is not None:
            x = self.within(x, mask)
        if self.along is not None:
            b, c, t, h, w = x.shape
            steps: Tensor | None = None
            if mask is not None:
                steps = mask.reshape(b, 1, t).expand(-1, h * w, -1).reshape(b * h * w, t)
            tokens = x.permute(0, 3, 4, 2, 1).reshape(b * h * w, t, c)  # (b, c, t, h, w) -> (b * h * w, t, c)
            x = self.along(tokens, steps, memory).reshape(b, h, w, t, c).permute(0, 4, 3, 1, 2)
        return self.second(x, mask, memory)  # type: ignore[no-any-return]


class _ResNet(Network):
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
        middle: Annotated[int, "[0, 1000]"] = 2,
        channels: int = 3,
        dims: Literal[2, 3] = 3,
        units: Units = "split",
        wavelets: Annotated[int, "[0, 1000]"] = 0,
        attention: bool = True,
        deepest_attention: bool = False,
        window: int | None = None,
        activation: str = "silu",
        groups: int | None = None,
        causal: bool = True,
        stem: int | None = None,
        direct: bool = False,
        shuffle: bool = False,
        modulated: bool = False,
    ) -> None:
        if dims not in (2, 3):
            raise UserError(f"codec: dims={dims} should be 2 for images or 3 for clips")
        if dims == 2 and (causal or window is not None):
            raise UserError("codec: causal and window are for clips; an image has causal=false and window=null")
        plan = _Plan(dims, units, causal, activation, groups)
        steps, widths, product = stage_sizes(base, strides, multipliers, dims)
        downsample = tuple(2**wavelets * step for step in product)
        causal_pad = downsample[0] - 1 if causal else 0
        super().__init__(
            width=width,
            downsample=downsample,
            channels=channels,
            causal=causal,
            causal_pad=causal_pad,
            direct=direct,
        )
        self.dims = dims
        # VidTok splits space and time in the stages, but not in the middle.
        center = _Plan(dims, "joint", causal, activation, groups) if units == "split" else plan
        form = (widths[-1], middle, attention, window)
        if self.decodes:
            steps, widths = steps[::-1], widths[::-1]
        self.rates = [step[0] for step in steps]
        start = widths[0] if stem is None or self.decodes else stem * base
        if self.decodes:
            self.unpatcher = InverseHaar(channels, wavelets, dims)
            self.first = _Chain(plan, width, widths[0], plan.ends)
            self.middle = _Middle(center, *form)
        else:
            self.patcher = Haar(channels, wavelets, dims)
            self.first = _Chain(plan, self.patcher.bands, start, plan.ends)
        deepest = 0 if self.decodes else len(steps)
        self.stages = nn.ModuleList(
            _Units(plan, before, after, depth + self.decodes, deepest_attention and level == deepest)
            for level, (before, after) in enumerate(zip([start, *widths[:-1]], widths, strict=True))
        )
        changes = zip(widths[:-1], steps, strict=True)
        if self.decodes:
            self.modulations = nn.ModuleList(
                _Modulation(plan, before, width, modulated) for before in [widths[0], *widths[:-1]]
            )
            self.ups = nn.ModuleList(_Up(plan, wide, step, shuffle) for wide, step in changes)
        else:
            self.downs = nn.ModuleList(_Down(plan, wide, step) for wide, step in changes)
            self.middle = _Middle(center, *form)
        self.norm = plan.norm(widths[-1])
        self.act = plan.act(widths[-1])
        self.last = _Chain(plan, widths[-1], self.unpatcher.bands if self.decodes else width, plan.ends)
        if not self.decodes:
            for conv in self.last.convs:  # latents of unit variance
                nn.init.kaiming_normal_(conv.layer.weight, nonlinearity="linear")  # type: ignore[union-attr, arg-type]


class ResNetEncoder(_ResNet, Encoder):
    """Encoder of images or clips into one latent per position of a grid of (frames,) rows and columns.

    Args:
        width: Width of the latents.
        base: Channels of the first stage.
        strides: Stride of each stage, in order of execution: one number, or one per axis.
        multipliers: Channels of each stage, in multiples of `base`; one more than strides, since no stride follows the
            last stage.
        depth: Residual units per stage; with "split", pairs of units.
        middle: Residual units at the lowest resolution, half before and half after its attention.
        channels: Channels of the signal.
        dims: Axes: 2 for images, 3 for clips.
        units: "split" (VidTok), "factorized" (Cosmos) or "joint" (MAGVIT-v2, and images).
        wavelets: Levels of the Haar transform before the first convolution (Cosmos: 2).
        attention: Whether the middle has self-attention within the image or each frame.
        deepest_attention: Whether such attention also follows each unit of the deepest stage (VQGAN).
        window: Latent frames in the window of the middle's self-attention along time (Cosmos); None for no such
            attention.
        activation: See `activations.ACTIVATIONS`.
        groups: Groups of channels of the group norms (VQGAN: 32); None for norms over the channels of each position.
        causal: Whether a latent depends only on frames up to the end of its step.
        stem: Channels of the first convolution, in multiples of `base`; None: those of the first stage.
        direct: Whether the bottleneck quantizes the latents without a linear map, and the decoder gets its latents.

    Raises:
        UserError: Inconsistent sizes, or an option of clips for images.
    """

    decodes = False

    def forward(self, signal: Tensor, mask: Tensor | None = None, memory: list[Tensor] | None = None) -> Tensor:
        """Return the latents `(b, n, width)` of signals `(b, c, *size)`."""
        rate = self.downsample[0] // self.patcher.rate
        mask = along_first(mask, signal.shape[2] // self.downsample[0], self.dims)
        here = at_rate(mask, rate, self.dims)
        x = self.first(self.patcher(signal), here, memory)
        for level, (stage, down) in enumerate(zip(self.stages, self.downs)):  # noqa: B905 (one stage more; TorchScript)
            x = down(stage(x, here, memory), here, memory)
            rate = rate // self.rates[level]
            here = at_rate(mask, rate, self.dims)
        x = self.stages[-1](x, here, memory)
        x = self.middle(x, here, memory)
        x = self.last(self.act(self.norm(x, here)), here, memory)
        # (b, width, *grid) -> (b, n, width)
        return x.flatten(2).transpose(1, 2)  # type: ignore[no-any-return]


class ResNetDecoder(_ResNet, Decoder):
    """Decoder of images or clips: the mirror of `ResNetEncoder`, whose arguments are the others.

    Each stage has one residual unit more than `depth`, as is usual. `strides` are in the order of an encoder: the last
    acts first. `stem` and `direct` are the encoder's alone.

    Args:
        shuffle: Whether upsampling is a convolution to the channels of all new pixels (arXiv 1609.05158), instead of
            repetition and a convolution; images only.
        modulated: Whether the latents' mean and deviation modulate each stage's input (Open-MAGVIT2).

    Raises:
        UserError: Inconsistent sizes, or an option of clips for images.
    """

    decodes = True

    def forward(
        self, latents: Tensor, mask: Tensor | None, grid: list[int], memory: list[Tensor] | None = None
    ) -> Tensor:
        """Decode latents `(b, n, width)` into signals `(b, c, *size)`."""
        # (b, n, width) -> (b, width, *grid)
        x = latents.transpose(1, 2).reshape([latents.shape[0], latents.shape[2]] + grid)  # noqa: RUF005 (TorchScript)
        valid = mask
        mask = along_first(mask, grid[0], self.dims)
        rate = 1
        here = at_rate(mask, rate, self.dims)
        x = self.middle(self.first(x, here, memory), here, memory)
        parts = zip(self.modulations, self.stages, self.ups)  # noqa: B905 (one stage more; TorchScript)
        for level, (modulation, stage, up) in enumerate(parts):
            x = stage(modulation(x, latents, valid, here), here, memory)
            rate = rate * self.rates[level]
            wide = at_rate(mask, rate, self.dims)
            x = up(x, here, wide, memory)
            here = wide
        x = self.stages[-1](self.modulations[-1](x, latents, valid, here), here, memory)
        x = self.last(self.act(self.norm(x, here)), here, memory)
        return zero_invalid(self.unpatcher(x), at_rate(mask, rate * self.unpatcher.rate, self.dims))
