"""The numbers at which a code is cut: of tokens, or of codebooks (`TokenLayout`)."""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol

from torch import Tensor

from varitok import UserError

from ..implicit.codec import ImplicitCodec
from ..layout import TokenLayout
from ..lengths import distributions as lengths
from ..masking import prefix_mask
from ..metrics.rate import packed_bytes, run_flags

__all__ = ["Code", "Evaluable", "Ladder"]


class Evaluable(Protocol):
    """What a codec needs to be evaluated; `varitok.codecs.codec.Codec` has it, and so can anything else."""

    @property
    def layout(self) -> TokenLayout:
        """The layout of its tokens."""

    @property
    def sample_rate(self) -> int | None:
        """Of sounds, Hz; None if signals are images."""

    @property
    def bottleneck(self) -> Any:
        """Has `codebook_sizes`."""

    def bits(self, tokens: int, num_codebooks: int | None = None) -> float:
        """Count the payload bits of `tokens` tokens with their first `num_codebooks` codebooks, all if None."""

    def encode(self, signal: Tensor, lengths: Tensor | None = None) -> Tensor:
        """Turn signals `(b, c, *grid)` in [-1, 1] into codes, int64 `(b, codebooks, N)` or `(b, codebooks, *grid)`."""

    def decode(self, codes: Tensor, size: Sequence[int] | None = None, lengths: Tensor | None = None) -> Tensor:
        """Turn codes, or a prefix of them, into signals."""


class Code(NamedTuple):
    """A batch's code, from which shorter ones are cut.

    Attributes:
        codes: As `Evaluable.encode` gives them.
        tokens: int64 `(b * blocks,)`, the valid tokens of each signal, or of each block of it.
        size: The signals' size.
        ends: After how many bytes each codebook is known, where an entropy coder made them.
    """

    codes: Tensor
    tokens: Tensor
    size: Sequence[int]
    ends: Sequence[int] = ()


class Ladder:
    """The rungs of a codec, and how a code is cut to one.

    Args:
        codec: What codes.
        keeps: The numbers that are kept; if None the whole layers of a hierarchy, else 1, 2, 4, ... and all; any
            others are sorted.

    Attributes:
        axis: The rungs' name: "k" of tokens, "codebooks" of codebooks.
        keeps: The rungs, upwards.
        runs: Whether a token that is repeated in its place counts once.

    Raises:
        UserError: A number is out of range.
    """

    def __init__(self, codec: Evaluable, keeps: Sequence[int] | None = None) -> None:
        self.codec, self.layout = codec, codec.layout
        self.axis = self.layout.column
        self.runs = bool(getattr(codec, "runs", False)) and bool(codec.bottleneck.codebook_sizes)
        most = self.layout.rungs(len(codec.bottleneck.codebook_sizes))
        usual = getattr(codec.bottleneck, "rungs", lengths.ladder(most))
        self.keeps = sorted(set(usual if keeps is None else keeps))
        if not self.keeps or self.keeps[0] < 1 or self.keeps[-1] > most:
            wrong = next((k for k in self.keeps if not 1 <= k <= most), "no")
            raise UserError(f"{wrong} {self.layout.unit} to keep: this codec keeps from 1 to {most}")

    def encode(self, signal: Tensor, samples: Tensor) -> Code:
        """Code signals `(b, c, *grid)` whose first `samples` samples, int64 `(b,)`, are valid."""
        size = signal.shape[2:]
        tokens = self.layout.valid(samples, size)
        codes = self.codec.encode(signal, tokens)
        ends = self.codec.compress(codes).ends if isinstance(self.codec, ImplicitCodec) else ()
        return Code(codes, tokens, size, ends)

    def decode(self, code: Code, keep: int) -> Tensor:
        """Decode the kept part of a code."""
        cut = self.layout.cut_axis
        if self.layout.ordered:  # and of the size of training
            return self.codec.decode(code.codes.narrow(cut, 0, keep))
        discrete = bool(self.codec.bottleneck.codebook_sizes)
        return self.codec.decode(code.codes.narrow(cut, 0, keep) if discrete else code.codes, code.size, code.tokens)

    def flat(self, code: Code) -> Tensor:
        """Return codes with one axis for the grid, `(b, codebooks, n)`; blocks follow each other as signals do."""
        return self.layout.flatten(code.codes)

    def cut(self, code: Code, start: int, end: int) -> Tensor:
        """Mark the valid codes from `start` up to `end`, bool, of those that `flat` gives."""
        flat = self.flat(code)
        valid = prefix_mask(code.tokens, flat.shape[2])[:, None].expand_as(flat).clone()
        along = self.layout.cut_axis
        valid.narrow(along, end, valid.shape[along] - end).fill_(False)
        valid.narrow(along, 0, start).fill_(False)
        return valid

    def codebooks(self, keep: int) -> tuple[int, ...]:
        """List the sizes of the codebooks that a rung has."""
        sizes: tuple[int, ...] = self.codec.bottleneck.codebook_sizes
        return sizes[: self.layout.count_kept(0, keep)[1]]

    def price(self, code: Code, keep: int) -> tuple[float, int]:
        """Sum bits, exactly, and bytes, packed, of a batch's codes; of a codec of one clip what its coder made."""
        if code.ends:
            return 8.0 * code.ends[keep - 1], code.ends[keep - 1]
        bits, packed = 0.0, 0
        strides = getattr(self.codec.bottleneck, "codebook_strides", ())
        for number, tokens in enumerate(code.tokens.tolist()):
            count, num_codebooks = self.layout.count_kept(tokens, keep)
            ideal, flags = 0.0, 0
            if self.runs:
                steps = tokens // math.prod(code.codes.shape[3:])
                count, ideal, flags = run_flags(code.codes[number, :keep, :steps])
            each = self.codec.bits(count, num_codebooks)
            bits += each + ideal
            whole = packed_bytes(self.codebooks(keep), count, strides) if self.codebooks(keep) else -(-each // 8)
            packed += int(whole) + -(-flags // 8)
        return bits, packed
