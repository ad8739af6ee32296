"""A clip as a network: from the number of a frame to the frame (NeRV, arXiv 2110.13903; NeRV++, arXiv 2402.18305)."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional

from varitok import UserError

from .contract import Decoder

__all__ = ["NeRV"]


class NeRV(Decoder):
    """Paints the frames of one clip (NeRV++, section 3).

    A frame's time goes through a positional encoding and a small MLP, becomes a coarse grid of features, and is
    upsampled block by block. An upsampler (convolution, pixel shuffle) stands between residual blocks of separable
    convolutions, and bilinear interpolation goes around it.

    Args:
        frames: Frames of the clip.
        image_size: Side, or height and width, in pixels.
        strides: Upsampling of each block; their product divides both sides.
        stem: Channels of the coarse grid.
        widths: Channels after each block.
        hidden: Width of the MLP.
        levels: Sines, and cosines, of the positional encoding (l of NeRV).
        base: Base of their frequencies (b of NeRV).
        kernel: Side of the separable convolutions, odd.

    Raises:
        UserError: A number is out of range, or the strides don't divide a side.
    """

    encodings: Tensor

    def __init__(
        self,
        frames: int,
        image_size: int | Sequence[int],
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
        if len(strides) != len(widths) or min([frames, stem, hidden, levels, *strides, *widths], default=0) < 1:
            raise UserError("codec.decoder: strides and widths should be as many, and all numbers at least 1")
        if height % step or width % step:
            raise UserError(
                f"codec.decoder.strides={list(strides)}: their product, {step}, should divide the frames' sides,"
                f" {width} x {height}"
            )
        # Of its code each weight is a token, and one step of the grid the whole clip.
        super().__init__(width=1, downsample=(frames, height, width), channels=3, direct=True)
        self.size = (frames, height, width)
        self.grid = (stem, height // step, width // step)
        # A table: sines of the highest frequencies, computed in float32, would depend on the platform.
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
        """Return frames `(b, 3, h, w)` in [-1, 1]; its latents are their numbers, int64 `(b,)`, from 0 on."""
        coarse = self.stem(self.encodings[latents]).unflatten(1, self.grid)
        painted: Tensor = self.head(self.blocks(coarse))
        return painted.tanh()


def _encode_positions(frames: int, levels: int, base: float) -> Tensor:
    """Encode the times of all frames, 0 to 1: sines and cosines `(frames, 2 * levels)` (NeRV, section 3.1)."""
    times = torch.arange(frames, dtype=torch.float64)[:, None] / max(1, frames - 1)
    angles = math.pi * times * base ** torch.arange(levels, dtype=torch.float64)
    return torch.cat([angles.sin(), angles.cos()], dim=1).float()


class _Separable(nn.Module):
    """A residual block: each channel by itself, then each pixel by itself."""

    def __init__(self, channels: int, kernel: int) -> None:
        super().__init__()
        self.space = nn.Conv2d(channels, channels, kernel, padding=kernel // 2, groups=channels)
        self.mix = nn.Conv2d(channels, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        mixed: Tensor = self.mix(functional.gelu(self.space(x)))
        return x + mixed


class _Block(nn.Module):
    """Upsamples by a stride."""

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
