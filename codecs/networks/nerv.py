"""Implicit network of one clip, from frame index to frame (NeRV, arXiv 2110.13903; NeRV++, arXiv 2402.18305)."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional

from varitok import UserError

from .contract import Decoder

__all__ = ["NeRV"]


class NeRV(Decoder):
    """Network that decodes a frame index into the frame of one clip (NeRV++, section 3).

    A positional encoding of the frame's time and an MLP give a coarse feature map, which blocks upsample. In a block, a
    pixel-shuffle upsampler with a bilinear shortcut is between two residual blocks of separable convolutions.

    Args:
        frames: Frames of the clip.
        image_size: Side, or height and width, in pixels.
        strides: Upsampling factor of each block; the product divides both sides.
        widths: Channels after each block.
        stem: Channels of the coarse feature map.
        hidden: Hidden size of the MLP.
        levels: Frequencies of the positional encoding (l in NeRV).
        base: Ratio of successive frequencies (b in NeRV).
        kernel: Kernel size of the separable convolutions, odd.

    Raises:
        UserError: Strides and widths differ in number, or the strides don't divide a side.
    """

    encodings: Tensor

    def __init__(
        self,
        frames: int,
        image_size: int | tuple[int, int],
        strides: Sequence[int],
        widths: Sequence[int],
        stem: int = 16,
        hidden: int = 512,
        levels: int = 80,
        base: float = 1.25,
        kernel: int = 3,
    ) -> None:
        height, width = (image_size, image_size) if isinstance(image_size, int) else image_size
        step = math.prod(strides)
        if not strides or len(strides) != len(widths):
            raise UserError("codec.decoder: give as many strides as widths, at least one")
        if height % step or width % step:
            raise UserError(
                f"codec.decoder.strides={list(strides)}: their product, {step}, should divide the frames' sides,"
                f" {width} x {height}"
            )
        # The whole clip is one step of the grid; the tokens are the weights.
        super().__init__(width=1, downsample=(frames, height, width), channels=3, direct=True)
        self.size = (frames, height, width)
        self.grid = (stem, height // step, width // step)
        # Precomputed in float64: float32 sines of the highest frequencies depend on the platform.
        self.register_buffer("encodings", _encode_positions(frames, levels, base), persistent=False)
        self.stem = nn.Sequential(
            nn.Linear(2 * levels, hidden), nn.GELU(), nn.Linear(hidden, math.prod(self.grid)), nn.GELU()
        )
        sides = zip([stem, *widths], widths, strides, strict=False)
        self.blocks = nn.Sequential(*(_Block(ins, outs, stride, kernel) for ins, outs, stride in sides))
        self.head = nn.Conv2d(widths[-1], 3, 3, padding=1)

    def forward(
        self,
        latents: Tensor,
        mask: Tensor | None = None,
        grid: list[int] | None = None,
        memory: list[Tensor] | None = None,
    ) -> Tensor:
        """Return frames `(b, 3, h, w)` in [-1, 1]; `latents` are frame indices, int64 `(b,)`."""
        coarse = self.stem(self.encodings[latents]).unflatten(1, self.grid)  # (b, c * h * w) -> (b, c, h, w)
        painted: Tensor = self.head(self.blocks(coarse))
        return painted.tanh()


def _encode_positions(frames: int, levels: int, base: float) -> Tensor:
    """Return the positional encodings of all frames, `(frames, 2 * levels)` (NeRV, section 3.1).

    `sin(pi t base^i)` and `cos(pi t base^i)` for i from 0 to `levels - 1`, t from 0 to 1.
    """
    times = torch.arange(frames, dtype=torch.float64)[:, None] / max(1, frames - 1)
    angles = math.pi * times * base ** torch.arange(levels, dtype=torch.float64)
    return torch.cat([angles.sin(), angles.cos()], dim=1).float()


class _Separable(nn.Module):
    """Residual block of a depthwise and a pointwise convolution."""

    def __init__(self, channels: int, kernel: int) -> None:
        super().__init__()
        self.space = nn.Conv2d(channels, channels, kernel, padding=kernel // 2, groups=channels)
        self.mix = nn.Conv2d(channels, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        mixed: Tensor = self.mix(functional.gelu(self.space(x)))
        return x + mixed


class _Block(nn.Module):
    """Residual block, pixel-shuffle upsampler with a bilinear shortcut, and residual block."""

    def __init__(self, ins: int, outs: int, stride: int, kernel: int) -> None:
        super().__init__()
        self.stride = float(stride)
        self.before = _Separable(ins, kernel)
        self.up = nn.Conv2d(ins, outs * stride**2, 3, padding=1)
        self.shuffle = nn.PixelShuffle(stride)
        self.skip = nn.Conv2d(ins, outs, 1)
        self.after = _Separable(outs, kernel)

    def forward(self, x: Tensor) -> Tensor:
        x = self.before(x)
        around = functional.interpolate(self.skip(x), scale_factor=self.stride, mode="bilinear", align_corners=False)
        above: Tensor = self.after(around + functional.gelu(self.shuffle(self.up(x))))
        return above
