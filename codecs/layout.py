"""The arrangement of a codec's tokens: their number, their grid, and the axis along which codes are cut.

    OrderedLayout  answers to queries about a whole image  codes (b, q, k)      a shorter code has fewer tokens
    BlockLayout    such answers for each step of a clip    codes (b, q, t, k)   a shorter code has fewer tokens
    PlacedLayout   one token for each step of a grid       codes (b, q, *grid)  a shorter code has fewer codebooks

A signal is brought to whole steps first. Here is a causal clip of 14 frames, with `downsample` 4 and `causal_pad` 3:

    frames  0 0 0 0 | 1 2 3 4 | 5 6 7 8 | 9 10 11 12 | 13 13 13 13      causal pad, and what fills the last step
    steps      0    |    1    |    2    |     3      |     4

Bottlenecks know none of this. To them codes are `(b, q, n)`, and each block is a signal of its own.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from varitok import UserError

from .masking import prefix_mask
from .padding import pad_to_grid

__all__ = ["BlockLayout", "OrderedLayout", "PlacedLayout", "TokenLayout", "token_layout"]

STEPS = {1: "t", 2: "h w", 3: "t h w"}


class TokenLayout(nn.Module, ABC):
    """Arrangement of a codec's tokens; `token_layout` builds one. The base class is that of ordered tokens.

    It has no weights. It is a module so that TorchScript compiles those methods that a frozen codec calls.

    Args:
        downsample: Samples of each axis per step of the grid.
        causal_pad: Copies of the first frame that go before it, so that it alone makes the first step. A causal video
            codec has one less than frames per step: an image is a clip of one frame.
        tokens: The most tokens of a signal, or of its first block, N; 0 for tokens on a grid.
        later_tokens: The most tokens of a block after the first.

    Attributes:
        ordered: Whether a prefix of the tokens is a shorter code; a prefix of the codebooks is otherwise.
        unit: What a shorter code has fewer of.
        column: What the number of these is called in tables.
        cut_axis: Axis of codes, flat or not, along which a shorter code is cut.
        code_axis: Axis of codes along which a graph takes fewer: ordered tokens, or steps of the first axis.
        axes: Axes of codes: b batch, q codebooks, k ordered tokens, t h w steps.
        free_sides: Whether rows and columns may have any number, so that the memory grows with them.
    """

    ordered = True
    unit = "tokens"
    column = "k"
    cut_axis = -1
    code_axis = 2

    def __init__(self, downsample: Sequence[int], causal_pad: int = 0, tokens: int = 0, later_tokens: int = 0) -> None:
        super().__init__()
        self.downsample = list(downsample)
        self.causal_pad = causal_pad
        self.tokens = tokens
        self.later_tokens = later_tokens
        self.axes = "b q k"
        self.free_sides = False

    # How many there are.

    def grid(self, size: Sequence[int]) -> list[int]:
        """Count the steps of a signal of a size `(*grid)`, in samples; the last of them is perhaps not full."""
        pads = (self.causal_pad, *(0 for _ in size[1:]))
        return [-(-(side + pad) // step) for side, pad, step in zip(size, pads, self.downsample, strict=True)]

    def blocks(self, size: Sequence[int]) -> int:
        """Count the blocks with tokens of their own of a signal of a size; 1 for most layouts."""
        return 1

    def count(self, size: Sequence[int]) -> int:
        """Count the tokens of a signal, or of each of its blocks, of a size."""
        return self.tokens

    @abstractmethod
    def valid(self, lengths: Tensor, size: Sequence[int]) -> Tensor:
        """Count the valid tokens, int64 `(b * blocks,)`, of signals with `lengths` valid steps of the first axis."""

    def obstacle(self, unit_latents: bool) -> str:
        """Describe in a few words why tokens can't be made chunk by chunk; nothing if they can."""
        return "its tokens are about the whole signal"

    # Signals.

    def pad(self, signal: Tensor, causal_pad: int) -> Tensor:
        """Pad the last steps of a signal `(b, c, *grid)` after a causal pad (see `padding.py`); scriptable."""
        return pad_to_grid(signal, self.downsample, causal_pad)

    def steps(self, signal: Tensor) -> list[int]:
        """Count the steps of each axis of a signal of whole steps; scriptable."""
        grid: list[int] = []
        for axis, step in enumerate(self.downsample):
            grid.append(signal.shape[axis + 2] // step)
        return grid

    def crop(self, signal: Tensor, size: Sequence[int] | None = None) -> Tensor:
        """Cut a signal of whole steps to a size, without the causal pad."""
        if size is None:
            return self.cut_lead(signal)
        for axis, side in enumerate(size):
            signal = signal.narrow(2 + axis, 0 if axis else self.causal_pad, side)
        return signal

    def cut_lead(self, signal: Tensor) -> Tensor:
        """Cut the causal pad off a signal; scriptable."""
        return signal[:, :, self.causal_pad :] if self.causal_pad > 0 else signal

    def signal_means(self, values: Tensor) -> Tensor:
        """Average values `(b, c, *grid)` over each signal, or each of its blocks: `(b * blocks,)`."""
        return values.flatten(1).mean(1)

    # Latents and codes.

    def normalize(self, latents: Tensor, lengths: Tensor | None = None) -> Tensor:
        """Scale latents `(b * blocks, n, d)` with `lengths` valid tokens to a root mean square of 1; scriptable."""
        return latents * (self.mean_power(latents.square().mean(2, keepdim=True), lengths) + 1e-6).rsqrt()

    def mean_power(self, power: Tensor, lengths: Tensor | None) -> Tensor:
        """Average the power `(b * blocks, n, 1)` over the tokens that every block has; scriptable."""
        return power[:, : self.later_tokens].mean(1, keepdim=True)

    def to_grid(self, codes: Tensor, batch: int, grid: list[int]) -> Tensor:
        """Lay out codes `(b * blocks, q, n)` of signals of `grid` steps, as the codec gives them; scriptable."""
        return codes

    def flatten(self, codes: Tensor) -> Tensor:
        """Bring codes to the shape that a bottleneck knows, `(b * blocks, q, n)`; scriptable."""
        return codes

    def prefix(self, codes: Tensor, lengths: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Extend shorter codes to the bottleneck's shape.

        Args:
            codes: `(b, q, k)`, `(b, q, blocks, k)` or `(b, q, *grid)`.
            lengths: int64 `(b,)`, or of blocks `(b, blocks)`, how many of the tokens are kept; all if None.

        Returns:
            Codes `(b * blocks, q, n)`, of ordered tokens all N, and how many are kept, `(b * blocks,)`; None for all.

        Raises:
            UserError: There is no token, more than N, or a length beyond them.
        """
        kept = codes.shape[-1] if self.tokens else math.prod(codes.shape[2:])
        if not 1 <= kept <= (self.tokens or kept):
            raise UserError(f"{kept} tokens: this codec decodes from 1 {f'to {self.tokens}' if self.tokens else 'on'}")
        if lengths is not None and not 1 <= int(lengths.min()) <= int(lengths.max()) <= kept:
            raise UserError(f"lengths from {int(lengths.min())} to {int(lengths.max())}: there are 1 to {kept} tokens")
        codes = self.flatten(codes)
        if not self.tokens:
            return codes, lengths
        if lengths is None:
            lengths = torch.full((len(codes),), kept, device=codes.device)
        return functional.pad(codes, (0, self.tokens - kept)), lengths

    def code_grid(self, codes: Tensor) -> list[int]:
        """Return the decoder's grid for codes; empty if it has its own; scriptable."""
        grid: list[int] = []
        return grid

    def decoder_grid(self, codes: Tensor, size: Sequence[int] | None) -> list[int]:
        """Return the decoder's grid for signals of a size; that of the codes if None.

        Raises:
            UserError: There are other blocks than the size has.
        """
        return self.code_grid(codes) if size is None else self.grid(size)

    def rungs(self, num_codebooks: int) -> int:
        """Count the lengths that a code of `num_codebooks` codebooks can be cut to."""
        return self.tokens

    def count_kept(self, tokens: int, keep: int) -> tuple[int, int | None]:
        """Count the tokens and the codebooks, None for all, that are left of `tokens` tokens at a length."""
        return min(keep, tokens), None

    # Exports.

    def trial_sizes(self, size: tuple[int, ...]) -> list[tuple[int, ...]]:
        """List sizes `(c, *grid)` at which an export is compared with its codec, that of training being `size`."""
        return [size]

    def describe(self, size: Sequence[int]) -> dict[str, Any]:
        """Describe the layout in a bundle's config.json, beside `tokens`, `hop` and `lead`."""
        return {}


class OrderedLayout(TokenLayout):
    """Answers to an encoder's queries, each about a whole image of the size of training."""

    def grid(self, size: Sequence[int]) -> list[int]:
        """Count the patches of an image.

        Raises:
            UserError: The patch doesn't divide its sides.
        """
        if any(side % step for side, step in zip(size, self.downsample, strict=True)):
            sides = " x ".join(str(side) for side in reversed(size))
            raise UserError(f"image of {sides} pixels: both sides must be multiples of the patch, {self.downsample[0]}")
        return super().grid(size)

    def valid(self, lengths: Tensor, size: Sequence[int]) -> Tensor:
        """Count the tokens: an image has all of them."""
        return torch.full_like(lengths, self.tokens)

    def pad(self, signal: Tensor, causal_pad: int) -> Tensor:
        """Return the image as it is."""
        return signal


class BlockLayout(TokenLayout):
    """Ordered tokens for each block of a clip's frames, a step of the first axis, of frames of the size of training.

    Codes are as wide as the first block's, whose tokens may be more than those of the later ones.
    """

    code_axis = 3

    def __init__(self, downsample: Sequence[int], causal_pad: int, tokens: int, later_tokens: int) -> None:
        super().__init__(downsample, causal_pad, tokens, later_tokens)
        self.axes = "b q t k"

    def blocks(self, size: Sequence[int]) -> int:
        """Count the blocks of a clip."""
        return self.grid(size)[0]

    def valid(self, lengths: Tensor, size: Sequence[int]) -> Tensor:
        """Count the tokens of each block; one that begins beyond its clip has none."""
        begin = torch.arange(self.blocks(size), device=lengths.device) * self.downsample[0] - self.causal_pad
        most = torch.where(begin > 0, self.later_tokens, self.tokens)
        return ((begin.clamp(min=0) < lengths[:, None]) * most).flatten()

    def obstacle(self, unit_latents: bool) -> str:
        """Return nothing: blocks come one after the other."""
        return ""

    def signal_means(self, values: Tensor) -> Tensor:
        """Average over each block, the last of them filled up."""
        steps = self.pad(values, self.causal_pad).transpose(1, 2)
        return steps.reshape(-1, self.downsample[0], *steps.shape[2:]).flatten(1).mean(1)

    def to_grid(self, codes: Tensor, batch: int, grid: list[int]) -> Tensor:
        """Bring the blocks of each clip together: `(b, q, blocks, n)`."""
        return codes.reshape(batch, -1, codes.shape[1], codes.shape[2]).transpose(1, 2)

    def flatten(self, codes: Tensor) -> Tensor:
        """Let blocks follow each other as signals do."""
        return codes.transpose(1, 2).reshape(-1, codes.shape[1], codes.shape[3])

    def prefix(self, codes: Tensor, lengths: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Repeat a clip's length for each of its blocks, if they have none of their own."""
        if lengths is not None:
            blocks = codes.shape[2]
            lengths = lengths.reshape(-1, 1 if lengths.ndim == 1 else blocks).expand(-1, blocks).flatten()
        return super().prefix(codes, lengths)

    def code_grid(self, codes: Tensor) -> list[int]:
        """Return the number of blocks; their sides are those of training."""
        return [codes.shape[2]]

    def decoder_grid(self, codes: Tensor, size: Sequence[int] | None) -> list[int]:
        """Return the number of blocks, and the sides of a size."""
        if size is not None and codes.shape[2] != self.blocks(size):
            blocks = self.blocks(size)
            raise UserError(f"codes of {codes.shape[2]} blocks: a clip of {size[0]} frames has {blocks}")
        return super().decoder_grid(codes, size)

    def trial_sizes(self, size: tuple[int, ...]) -> list[tuple[int, ...]]:
        """List one frame, a block begun, and whole ones."""
        return [(size[0], frames, *size[2:]) for frames in (1, 2 * self.downsample[0] + 1, 3 * self.downsample[0])]

    def describe(self, size: Sequence[int]) -> dict[str, Any]:
        """Describe frames, which have one size, and later blocks, which may have fewer tokens."""
        return {"frame_size": list(size[2:]), "later_tokens": self.later_tokens}


class PlacedLayout(TokenLayout):
    """One token for each step of a grid over a signal of any size; a shorter code has fewer codebooks."""

    ordered = False
    unit = column = "codebooks"
    cut_axis = 1

    def __init__(self, downsample: Sequence[int], causal_pad: int = 0) -> None:
        super().__init__(downsample, causal_pad)
        self.axes = f"b q {STEPS[len(downsample)]}"
        self.free_sides = len(downsample) > 1

    def count(self, size: Sequence[int]) -> int:
        """Count the steps of the grid."""
        return math.prod(self.grid(size))

    def valid(self, lengths: Tensor, size: Sequence[int]) -> Tensor:
        """Count the tokens of the steps that hold a valid sample."""
        steps = (lengths + self.causal_pad + self.downsample[0] - 1) // self.downsample[0] * (lengths > 0)
        return steps * math.prod(self.grid(size)[1:])

    def obstacle(self, unit_latents: bool) -> str:
        """Describe how latents would be scaled, where that takes the whole signal."""
        return "unit_latents scales by the whole signal" if unit_latents and not self.free_sides else ""

    def mean_power(self, power: Tensor, lengths: Tensor | None) -> Tensor:
        """Average over all valid tokens; of frames each is by itself, so that chunks are scaled as the whole."""
        if self.free_sides:
            return power
        if lengths is None:
            return power.mean(1, keepdim=True)
        valid = torch.where(prefix_mask(lengths, power.shape[1]).unsqueeze(2), power, 0.0)
        return valid.sum(1, keepdim=True) / lengths.clamp(min=1)[:, None, None]

    def to_grid(self, codes: Tensor, batch: int, grid: list[int]) -> Tensor:
        """Reshape flat codes to the grid: `(b, q, *grid)`."""
        return codes.reshape([codes.shape[0], codes.shape[1]] + grid) if self.free_sides else codes  # noqa: RUF005

    def flatten(self, codes: Tensor) -> Tensor:
        """Let rows follow each other."""
        return codes.flatten(2)

    def code_grid(self, codes: Tensor) -> list[int]:
        """Return the steps of each axis."""
        return list(codes.shape[2:])

    def decoder_grid(self, codes: Tensor, size: Sequence[int] | None) -> list[int]:
        """Return the steps of each axis, whatever the size."""
        return self.code_grid(codes)

    def rungs(self, num_codebooks: int) -> int:
        """Count the codebooks; a continuous codec has none to leave out."""
        return max(1, num_codebooks)

    def count_kept(self, tokens: int, keep: int) -> tuple[int, int | None]:
        """Keep all tokens, and some of the codebooks."""
        return tokens, keep

    def trial_sizes(self, size: tuple[int, ...]) -> list[tuple[int, ...]]:
        """List a single sample or frame, an incomplete step, and different sizes of each axis, to test graphs with."""
        first, *rest = self.downsample
        return [
            (size[0], 1, *rest),
            (size[0], 2 * first + 1, *(2 * step - 1 for step in rest)),
            (size[0], 7 * first, *(count * step for count, step in zip(range(3, 5), rest, strict=False))),
        ]


def token_layout(
    downsample: Sequence[int], causal_pad: int = 0, tokens: int = 0, later_tokens: int | None = None
) -> TokenLayout:
    """Make the layout of a codec's tokens, out of what its encoder, or a bundle's config.json, says.

    Args:
        downsample: Samples of each axis per step of the grid: one axis for audio, two for images, three for video.
        causal_pad: Copies of the first frame that go before it.
        tokens: The most tokens of a signal, or of its first block; 0 for tokens on a grid.
        later_tokens: The most tokens of a block after the first; equal to `tokens` if None.
    """
    if not tokens:
        return PlacedLayout(downsample, causal_pad)
    if len(downsample) == 3:
        return BlockLayout(downsample, causal_pad, tokens, tokens if later_tokens is None else later_tokens)
    return OrderedLayout(downsample, tokens=tokens, later_tokens=tokens)
