"""Layouts of a codec's tokens: their number, their grid, and the axis along which codes are truncated.

    OrderedLayout  ordered tokens of a whole image     codes (b, q, k)      a shorter code has fewer tokens
    BlockLayout    ordered tokens per block of a clip  codes (b, q, t, k)   a shorter code has fewer tokens
    GridLayout   one token per step of a grid        codes (b, q, *grid)  a shorter code has fewer codebooks

Signals are first padded to whole steps. Here is a causal clip of 14 frames, with `downsample` 4 and `causal_pad` 3:

    frames  0 0 0 0 | 1 2 3 4 | 5 6 7 8 | 9 10 11 12 | 13 13 13 13      causal pad first, padding last
    steps      0    |    1    |    2    |     3      |     4

Bottlenecks don't use layouts: their codes are `(b, q, n)`, and each block is a sample of the batch.
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

__all__ = ["BlockLayout", "GridLayout", "OrderedLayout", "TokenLayout", "token_layout"]

STEPS = {1: "t", 2: "h w", 3: "t h w"}


class TokenLayout(nn.Module, ABC):
    """Base of layouts, built by `token_layout`; its defaults are those of ordered tokens.

    It has no weights. It is a module so that TorchScript compiles the methods that a frozen codec calls.

    Args:
        downsample: Samples of each axis per step of the grid.
        causal_pad: Copies of the first frame before it, so that the first step contains this frame only. For a causal
            video codec it is the frames per step minus 1: an image is a clip of one frame.
        tokens: Maximal number of tokens of a signal, or of its first block, N; 0 for tokens on a grid.
        later_tokens: Maximal number of tokens of a block after the first.

    Attributes:
        whole: Samples of each axis that a signal is padded to a multiple of.
        ordered: Whether a shorter code is a prefix of the tokens; otherwise it is a prefix of the codebooks.
        unit: Unit of the length of a code, tokens or codebooks.
        column: Name of the length in tables.
        cut_axis: Axis of codes, flat or not, along which they are truncated.
        code_axis: Axis of codes of dynamic size in a graph: ordered tokens, or steps of the first axis.
        axes: Axes of codes: b batch, q codebooks, k ordered tokens, t h w steps.
        free_sides: Whether height and width are arbitrary, so that the streaming memory grows with them.
    """

    ordered = True
    unit = "tokens"
    column = "k"
    cut_axis = -1
    code_axis = 2

    def __init__(self, downsample: Sequence[int], causal_pad: int = 0, tokens: int = 0, later_tokens: int = 0) -> None:
        super().__init__()
        self.downsample = list(downsample)
        self.whole = list(downsample)
        self.causal_pad = causal_pad
        self.tokens = tokens
        self.later_tokens = later_tokens
        self.axes = "b q k"
        self.free_sides = False

    # Numbers of tokens.

    def grid(self, size: Sequence[int]) -> list[int]:
        """Return the number of steps of each axis of a signal of a size `(*grid)`, in samples, rounded up."""
        pads = (self.causal_pad, *(0 for _ in size[1:]))
        return [-(-(side + pad) // step) for side, pad, step in zip(size, pads, self.downsample, strict=True)]

    def blocks(self, size: Sequence[int]) -> int:
        """Return the number of blocks of a signal of a size; 1 for most layouts."""
        return 1

    def count(self, size: Sequence[int]) -> int:
        """Return the number of tokens of a signal of a size, or of each of its blocks."""
        return self.tokens

    @abstractmethod
    def valid(self, lengths: Tensor, size: Sequence[int]) -> Tensor:
        """Return the valid tokens, int64 `(b * blocks,)`, of signals with `lengths` valid samples, int64 `(b,)`."""

    def obstacle(self, unit_latents: bool) -> str:
        """Return why tokens can't be computed chunk by chunk, in a few words; empty if they can."""
        return "its tokens are about the whole signal"

    # Signals.

    def pad(self, signal: Tensor, causal_pad: int) -> Tensor:
        """Pad a signal `(b, c, *grid)` to whole steps, with a causal pad (see `padding.py`); scriptable."""
        return pad_to_grid(signal, self.whole, causal_pad)

    def steps(self, signal: Tensor) -> list[int]:
        """Return the number of steps of each axis of a signal, without a causal pad, rounded up; scriptable."""
        grid: list[int] = []
        for axis, step in enumerate(self.downsample):
            grid.append((signal.shape[axis + 2] + step - 1) // step)
        return grid

    def crop(self, signal: Tensor, size: Sequence[int] | None = None) -> Tensor:
        """Crop a signal of whole steps to a size `(*grid)`, without the causal pad."""
        if size is None:
            return self.cut_lead(signal)
        for axis, side in enumerate(size):
            signal = signal.narrow(2 + axis, 0 if axis else self.causal_pad, side)
        return signal

    def cut_lead(self, signal: Tensor) -> Tensor:
        """Remove the causal pad of a signal; scriptable."""
        return signal[:, :, self.causal_pad :] if self.causal_pad > 0 else signal

    def signal_means(self, values: Tensor) -> Tensor:
        """Average values `(b, c, *grid)` over each signal, or each of its blocks: `(b * blocks,)`."""
        return values.flatten(1).mean(1)  # (b, c, *grid) -> (b)

    # Latents and codes.

    def normalize(self, latents: Tensor, lengths: Tensor | None = None) -> Tensor:
        """Scale latents `(b * blocks, n, d)` with `lengths` valid tokens to root mean square 1; scriptable."""
        return latents * (self.mean_power(latents.square().mean(2, keepdim=True), lengths) + 1e-6).rsqrt()

    def mean_power(self, power: Tensor, lengths: Tensor | None) -> Tensor:
        """Average the power `(b * blocks, n, 1)` over the tokens common to all blocks; scriptable."""
        return power[:, : self.later_tokens].mean(1, keepdim=True)

    def to_grid(self, codes: Tensor, batch: int, grid: list[int]) -> Tensor:
        """Reshape codes `(b * blocks, q, n)` of signals of `grid` steps to this layout's axes; scriptable."""
        return codes

    def flatten(self, codes: Tensor) -> Tensor:
        """Reshape codes to the bottleneck's axes, `(b * blocks, q, n)`; scriptable."""
        return codes

    def prefix(self, codes: Tensor, lengths: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Reshape codes to the bottleneck's axes, and zero-pad ordered tokens to N.

        Args:
            codes: `(b, q, k)`, `(b, q, blocks, k)` or `(b, q, *grid)`.
            lengths: Tokens kept, int64 `(b,)`, or `(b, blocks)` for each block; all if None.

        Returns:
            Codes `(b * blocks, q, n)`, and the tokens kept, `(b * blocks,)`; None for all.

        Raises:
            UserError: The number of tokens is not in [1, N], or a length exceeds it.
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
        """Return the decoder's grid for codes; empty if the decoder's grid is fixed; scriptable."""
        grid: list[int] = []
        return grid

    def decoder_grid(self, codes: Tensor, size: Sequence[int] | None) -> list[int]:
        """Return the decoder's grid for signals of a size, or for the codes if None.

        Raises:
            UserError: The numbers of blocks of the codes and of the size differ.
        """
        return self.code_grid(codes) if size is None else self.grid(size)

    def rungs(self, num_codebooks: int) -> int:
        """Return the number of lengths to which a code of `num_codebooks` codebooks can be truncated."""
        return self.tokens

    def count_kept(self, tokens: int, keep: int) -> tuple[int, int | None]:
        """Return the tokens and the codebooks (None for all) left of `tokens` tokens at a length `keep`."""
        return min(keep, tokens), None

    # Exports.

    def trial_sizes(self, size: tuple[int, ...]) -> list[tuple[int, ...]]:
        """Return the sizes `(c, *grid)` at which an export is compared with its codec; `size` is that of training."""
        return [size]

    def describe(self, size: Sequence[int]) -> dict[str, Any]:
        """Return the layout's entries in a bundle's config.json, beside `tokens`, `hop` and `lead`."""
        return {}


class OrderedLayout(TokenLayout):
    """Ordered tokens, each of a whole image of the training size."""

    def grid(self, size: Sequence[int]) -> list[int]:
        """Return the rows and columns of patches of an image.

        Raises:
            UserError: The patch size doesn't divide a side.
        """
        if any(side % step for side, step in zip(size, self.downsample, strict=True)):
            sides = " x ".join(str(side) for side in reversed(size))
            raise UserError(f"image of {sides} pixels: both sides must be multiples of the patch, {self.downsample[0]}")
        return super().grid(size)

    def valid(self, lengths: Tensor, size: Sequence[int]) -> Tensor:
        """Return N for each image: all tokens are valid."""
        return torch.full_like(lengths, self.tokens)

    def pad(self, signal: Tensor, causal_pad: int) -> Tensor:
        """Return the image unchanged."""
        return signal


class BlockLayout(TokenLayout):
    """Ordered tokens of clips: each block of frames, one step of the first axis, has its own. Frames have one size.

    The last axis of codes has the first block's number of tokens; later blocks may have fewer.
    """

    code_axis = 3

    def __init__(self, downsample: Sequence[int], causal_pad: int, tokens: int, later_tokens: int) -> None:
        super().__init__(downsample, causal_pad, tokens, later_tokens)
        self.axes = "b q t k"

    def blocks(self, size: Sequence[int]) -> int:
        """Return the number of blocks of a clip."""
        return self.grid(size)[0]

    def valid(self, lengths: Tensor, size: Sequence[int]) -> Tensor:
        """Return the tokens of each block; a block of padding alone has none."""
        begin = torch.arange(self.blocks(size), device=lengths.device) * self.downsample[0] - self.causal_pad
        most = torch.where(begin > 0, self.later_tokens, self.tokens)
        return ((begin.clamp(min=0) < lengths[:, None]) * most).flatten()  # (b, blocks) -> (b * blocks)

    def obstacle(self, unit_latents: bool) -> str:
        """Return an empty string: blocks are independent of later ones."""
        return ""

    def signal_means(self, values: Tensor) -> Tensor:
        """Average over each block, after padding the last."""
        steps = self.pad(values, self.causal_pad).transpose(1, 2)  # (b, c, t, h, w) -> (b, t, c, h, w)
        return steps.reshape(-1, self.downsample[0], *steps.shape[2:]).flatten(1).mean(1)

    def to_grid(self, codes: Tensor, batch: int, grid: list[int]) -> Tensor:
        """Reshape codes `(b * blocks, q, n)` to `(b, q, blocks, n)`."""
        return codes.reshape(batch, -1, codes.shape[1], codes.shape[2]).transpose(1, 2)

    def flatten(self, codes: Tensor) -> Tensor:
        """Reshape codes `(b, q, blocks, n)` to `(b * blocks, q, n)`."""
        return codes.transpose(1, 2).reshape(-1, codes.shape[1], codes.shape[3])

    def prefix(self, codes: Tensor, lengths: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Reshape codes and lengths; a clip's length `(b,)` is repeated for each of its blocks."""
        if lengths is not None:
            blocks = codes.shape[2]
            lengths = lengths.reshape(-1, 1 if lengths.ndim == 1 else blocks).expand(-1, blocks).flatten()
        return super().prefix(codes, lengths)

    def code_grid(self, codes: Tensor) -> list[int]:
        """Return the number of blocks; height and width are fixed."""
        return [codes.shape[2]]

    def decoder_grid(self, codes: Tensor, size: Sequence[int] | None) -> list[int]:
        """Return the blocks, rows and columns of a size; of the codes if None."""
        if size is not None and codes.shape[2] != self.blocks(size):
            blocks = self.blocks(size)
            raise UserError(f"codes of {codes.shape[2]} blocks: a clip of {size[0]} frames has {blocks}")
        return super().decoder_grid(codes, size)

    def trial_sizes(self, size: tuple[int, ...]) -> list[tuple[int, ...]]:
        """Return clips of one frame, of an incomplete block, and of whole blocks."""
        return [(size[0], frames, *size[2:]) for frames in (1, 2 * self.downsample[0] + 1, 3 * self.downsample[0])]

    def describe(self, size: Sequence[int]) -> dict[str, Any]:
        """Return the fixed frame size and the tokens of later blocks."""
        return {"frame_size": list(size[2:]), "later_tokens": self.later_tokens}


class GridLayout(TokenLayout):
    """One token per step of a grid over a signal of any size; a shorter code has fewer codebooks.

    The other arguments are those of `TokenLayout`.

    Args:
        multiple: Number that the steps of the first axis are a multiple of.
    """

    ordered = False
    unit = column = "codebooks"
    cut_axis = 1

    def __init__(self, downsample: Sequence[int], causal_pad: int = 0, multiple: int = 1) -> None:
        super().__init__(downsample, causal_pad)
        self.multiple = multiple
        self.whole[0] *= multiple
        self.axes = f"b q {STEPS[len(downsample)]}"
        self.free_sides = len(downsample) > 1

    def grid(self, size: Sequence[int]) -> list[int]:
        """Return the number of steps of each axis of a signal of a size, rounded up to whole multiples."""
        first, *rest = super().grid(size)
        return [-(-first // self.multiple) * self.multiple, *rest]

    def count(self, size: Sequence[int]) -> int:
        """Return the number of steps of the grid."""
        return math.prod(self.grid(size))

    def valid(self, lengths: Tensor, size: Sequence[int]) -> Tensor:
        """Return the number of tokens whose steps of the first axis, or multiples of them, contain a valid sample."""
        wholes = (lengths + self.causal_pad + self.whole[0] - 1) // self.whole[0] * (lengths > 0)
        return wholes * self.multiple * math.prod(self.grid(size)[1:])

    def obstacle(self, unit_latents: bool) -> str:
        """Return an obstacle if latents are normalized over the whole signal."""
        return "unit_latents scales by the whole signal" if unit_latents and not self.free_sides else ""

    def mean_power(self, power: Tensor, lengths: Tensor | None) -> Tensor:
        """Average over all valid tokens of audio; per token for images and clips, so that chunks equal the whole."""
        if self.free_sides:
            return power
        if lengths is None:
            return power.mean(1, keepdim=True)
        valid = torch.where(prefix_mask(lengths, power.shape[1]).unsqueeze(2), power, 0.0)
        return valid.sum(1, keepdim=True) / lengths.clamp(min=1)[:, None, None]

    def to_grid(self, codes: Tensor, batch: int, grid: list[int]) -> Tensor:
        """Reshape codes `(b, q, n)` to `(b, q, *grid)`."""
        return codes.reshape([codes.shape[0], codes.shape[1]] + grid) if self.free_sides else codes  # noqa: RUF005

    def flatten(self, codes: Tensor) -> Tensor:
        """Reshape codes `(b, q, *grid)` to `(b, q, n)`."""
        return codes.flatten(2)

    def code_grid(self, codes: Tensor) -> list[int]:
        """Return the number of steps of each axis."""
        return list(codes.shape[2:])

    def decoder_grid(self, codes: Tensor, size: Sequence[int] | None) -> list[int]:
        """Return the number of steps of each axis of the codes, whatever the size."""
        return self.code_grid(codes)

    def rungs(self, num_codebooks: int) -> int:
        """Return the number of codebooks; 1 for a continuous codec."""
        return max(1, num_codebooks)

    def count_kept(self, tokens: int, keep: int) -> tuple[int, int | None]:
        """Return the kept numbers of tokens and codebooks: all tokens, and `keep` codebooks."""
        return tokens, keep

    def trial_sizes(self, size: tuple[int, ...]) -> list[tuple[int, ...]]:
        """Return a single sample or frame, an incomplete step, and a different size for each axis."""
        first, *rest = self.downsample
        steps = max(2, min(7, 512 // first)) if len(rest) == 1 else 7  # an image's token may be of 256 x 256 pixels
        return [
            (size[0], 1, *rest),
            (size[0], 2 * first + 1, *(2 * step - 1 for step in rest)),
            (size[0], steps * first, *(count * step for count, step in zip(range(3, 5), rest, strict=False))),
        ]

    def describe(self, size: Sequence[int]) -> dict[str, Any]:
        """Return the number that steps are a multiple of."""
        return {"multiple": self.multiple} if self.multiple > 1 else {}


def token_layout(
    downsample: Sequence[int],
    causal_pad: int = 0,
    tokens: int = 0,
    later_tokens: int | None = None,
    multiple: int = 1,
) -> TokenLayout:
    """Build the layout of a codec's tokens from its encoder's attributes or a bundle's config.json.

    Args:
        downsample: Samples of each axis per step of the grid: one axis for audio, two for images, three for video.
        causal_pad: Copies of the first frame before it.
        tokens: Maximal number of tokens of a signal, or of its first block; 0 for tokens on a grid.
        later_tokens: Maximal number of tokens of a block after the first; equal to `tokens` if None.
        multiple: Number that the steps of the first axis are a multiple of, if tokens are on a grid.
    """
    if not tokens:
        return GridLayout(downsample, causal_pad, multiple)
    if len(downsample) == 3:
        return BlockLayout(downsample, causal_pad, tokens, tokens if later_tokens is None else later_tokens)
    return OrderedLayout(downsample, tokens=tokens, later_tokens=tokens)
