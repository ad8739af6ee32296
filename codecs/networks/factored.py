"""Convolutional codecs of clips whose space and time are apart: VidTok's, Cosmos', and MAGVIT-v2's, which are joint.

An encoder is a convolution, then for each stride residual units and a step down, then a middle with attention, a norm
and a last convolution; a decoder is its mirror. VidTok (arXiv 2412.13061, section 3.1) follows each unit over space by
one over time, Cosmos (arXiv 2501.03575, section 3.1) replaces each convolution by both, after a wavelet transform;
MAGVIT-v2 (arXiv 2310.05737, section 3.2) convolves over all three axes. Norms are of each position's channels alone
(VidTok), so that a chunk, a padded batch and a single clip agree, and padding is zeros for the same reason, where the
published ones repeat the first frame at every layer.
"""

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

from varitok import UserError

from .activations import Activation
from .attention import attend
from .contract import Decoder, Encoder
from .convolution import Convolution, along_first, at_rate, stage_sizes, zero_invalid
from .sequence import SequenceTransformer
from .wavelet import Haar, InverseHaar

__all__ = ["UNITS", "FactoredDecoder", "FactoredEncoder", "Units"]

Units = Literal["split", "factorized", "joint"]
Kernel = tuple[int, int, int]
SPACE, TIME, JOINT = (1, 3, 3), (3, 1, 1), (3, 3, 3)

# For each kind of unit: the kernels that stand in one convolution's place, of each residual unit that follows another.
UNITS: dict[str, tuple[tuple[Kernel, ...], ...]] = {
    "split": ((SPACE,), (TIME,)),
    "factorized": ((SPACE, TIME),),
    "joint": ((JOINT,),),
}


class ChannelNorm(nn.Module):
    """Root-mean-square norm over the channels of each position (arXiv 1910.07467).

    Args:
        channels: Channels of the input.
        eps: Added to the mean square.
    """

    def __init__(self, channels: int, eps: float = 1e-6) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(channels))

    def forward(self, x: Tensor) -> Tensor:
        """Normalize `(b, c, t, h, w)`."""
        scale = (x.float().square().mean(1, keepdim=True) + self.eps).rsqrt()
        return x * scale.to(x.dtype) * self.weight[:, None, None, None]


class _Chain(nn.Module):
    """Convolutions one after another, in the place of one."""

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
    """Norm, activation and convolution, twice, added to the input."""

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
    """Residual units one after another."""

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
    """Return the rows and columns of the kernels that change the frame rate: VidTok's include neighbors."""
    return (1, 1) if units == "factorized" else (3, 3)


class _Down(nn.Module):
    """Fewer rows and columns by a strided convolution; fewer frames by one blended with their mean (VidTok)."""

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
    """More frames, by repeating them and blending with a convolution of that (VidTok); then more rows and columns."""

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
        """Here the mask is at the rate that goes out."""
        if self.along is not None and self.blend is not None:
            x = x.repeat_interleave(self.time, dim=2)
            share = self.blend.sigmoid()
            x = share * x + (1 - share) * self.along(x, wide, memory)
        if self.across is not None:
            x = x.repeat_interleave(self.space[0], dim=3).repeat_interleave(self.space[1], dim=4)
            x = self.across(x, wide, memory)
        return x


class _FrameAttention(nn.Module):
    """Attention of one head among the positions of each frame, added to the input."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm = ChannelNorm(channels)
        self.qkv = nn.Linear(channels, 3 * channels)
        self.out = nn.Linear(channels, channels)

    def forward(self, x: Tensor) -> Tensor:
        b, c, t, h, w = x.shape
        tokens = self.norm(x).permute(0, 2, 3, 4, 1).reshape(b * t, h * w, c)
        y: Tensor = self.out(attend(self.qkv(tokens)))
        return x + y.reshape(b, t, h, w, c).permute(0, 4, 1, 2, 3)


class _Middle(nn.Module):
    """A residual unit, attention within frames and optionally along time, and a residual unit."""

    def __init__(
        self, channels: int, kind: str, attention: bool, window: int | None, causal: bool, activation: str
    ) -> None:
        super().__init__()
        # Where space and time are apart elsewhere, VidTok brings them together here.
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
            tokens = x.permute(0, 3, 4, 2, 1).reshape(b * h * w, t, c)
            x = self.along(tokens, steps, memory).reshape(b, h, w, t, c).permute(0, 4, 3, 1, 2)
        return self.second(x, mask, memory)  # type: ignore[no-any-return]


class _Plan:
    """The sizes that an encoder and its decoder share."""

    def __init__(
        self,
        base: int,
        strides: Sequence[int | Sequence[int]],
        multipliers: Sequence[int],
        units: str,
        wavelets: int,
        causal: bool,
    ) -> None:
        if units not in UNITS:
            raise UserError(f"codec: units={units!r} is one of {', '.join(UNITS)}")
        self.strides, self.widths, product = stage_sizes(base, strides, multipliers, 3)
        self.downsample = tuple(2**wavelets * steps for steps in product)
        self.causal_pad = self.downsample[0] - 1 if causal else 0
        self.around = UNITS[units][0] if units == "factorized" else (JOINT,)  # the first and the last convolution


class FactoredEncoder(Encoder):
    """Reads clips into latents, one for each step of frames, rows and columns.

    Args:
        width: Width of the latents.
        base: Channels of the first stage.
        strides: Strides of the stages, in the order in which they act; for each one number, or one for each axis.
        multipliers: Channels over `base` of all stages, one more than strides: the last is not followed by a stride.
        depth: Residual units of each stage; of "split", pairs of them.
        channels: Channels of the clip.
        units: "split" (VidTok), "factorized" (Cosmos) or "joint" (MAGVIT-v2).
        wavelets: Levels of the Haar transform in front (Cosmos: 2).
        attention: Whether the positions of a frame attend to each other in the middle.
        window: Latent frames within which each position attends along time in the middle (Cosmos); None: it doesn't.
        activation: See `activations.ACTIVATIONS`.
        causal: A latent depends on frames up to the end of its step only.

    Raises:
        UserError: Sizes that don't fit each other.
    """

    def __init__(
        self,
        *,
        width: int,
        base: int,
        strides: Sequence[int | Sequence[int]],
        multipliers: Sequence[int],
        depth: int = 2,
        channels: int = 3,
        units: Units = "split",
        wavelets: int = 0,
        attention: bool = True,
        window: int | None = None,
        activation: str = "silu",
        causal: bool = True,
    ) -> None:
        plan = _Plan(base, strides, multipliers, units, wavelets, causal)
        super().__init__(
            width=width, downsample=plan.downsample, channels=channels, causal=causal, causal_pad=plan.causal_pad
        )
        self.rates = [stride[0] for stride in plan.strides]
        self.patcher = Haar(channels, wavelets)
        self.first = _Chain(self.patcher.outputs, plan.widths[0], plan.around, causal)
        befores = [plan.widths[0], *plan.widths[:-1]]
        self.stages = nn.ModuleList(
            _Units(before, wide, depth, units, causal, activation)
            for before, wide in zip(befores, plan.widths, strict=True)
        )
        self.downs = nn.ModuleList(
            _Down(wide, stride, causal, units) for wide, stride in zip(plan.widths[:-1], plan.strides, strict=True)
        )
        self.middle = _Middle(plan.widths[-1], units, attention, window, causal, activation)
        self.norm = ChannelNorm(plan.widths[-1])
        self.act = Activation(activation, plan.widths[-1], 3)
        self.last = _Chain(plan.widths[-1], width, plan.around, causal)
        for conv in self.last.convs:  # so that latents have unit size
            nn.init.kaiming_normal_(conv.layer.weight, nonlinearity="linear")  # type: ignore[union-attr, arg-type]

    def forward(self, signal: Tensor, mask: Tensor | None = None, memory: list[Tensor] | None = None) -> Tensor:
        """Return the latents of clips."""
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
        return x.flatten(2).transpose(1, 2)  # type: ignore[no-any-return]


class FactoredDecoder(Decoder):
    """Makes clips from latents: the encoder's mirror, with its arguments in its order.

    Each stage has one residual unit more, as is usual; strides act from the last to the first.

    Raises:
        UserError: Sizes that don't fit each other.
    """

    def __init__(
        self,
        *,
        width: int,
        base: int,
        strides: Sequence[int | Sequence[int]],
        multipliers: Sequence[int],
        depth: int = 2,
        channels: int = 3,
        units: Units = "split",
        wavelets: int = 0,
        attention: bool = True,
        window: int | None = None,
        activation: str = "silu",
        causal: bool = True,
    ) -> None:
        plan = _Plan(base, strides, multipliers, units, wavelets, causal)
        super().__init__(
            width=width, downsample=plan.downsample, channels=channels, causal=causal, causal_pad=plan.causal_pad
        )
        self.rates = [stride[0] for stride in reversed(plan.strides)]
        self.unpatcher = InverseHaar(channels, wavelets)
        widths = plan.widths[::-1]
        self.first = _Chain(width, widths[0], plan.around, causal)
        self.middle = _Middle(widths[0], units, attention, window, causal, activation)
        befores = [widths[0], *widths[:-1]]
        self.stages = nn.ModuleList(
            _Units(before, wide, depth + 1, units, causal, activation)
            for before, wide in zip(befores, widths, strict=True)
        )
        self.ups = nn.ModuleList(
            _Up(wide, stride, causal, units) for wide, stride in zip(widths[:-1], reversed(plan.strides), strict=True)
        )
        self.norm = ChannelNorm(widths[-1])
        self.act = Activation(activation, widths[-1], 3)
        self.last = _Chain(widths[-1], self.unpatcher.inputs, plan.around, causal)

    def forward(
        self, latents: Tensor, mask: Tensor | None, grid: list[int], memory: list[Tensor] | None = None
    ) -> Tensor:
        """Return the clips that latents stand for."""
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
