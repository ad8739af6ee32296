"""The bitrate ladder: the numbers of tokens or codebooks (`TokenLayout`) to which codes are cut."""

import math
from collections.abc import Sequence
from itertools import accumulate
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
    """Interface that an evaluation needs; `varitok.codecs.codec.Codec` implements it."""

    @property
    def layout(self) -> TokenLayout:
        """Layout of the tokens."""

    @property
    def sample_rate(self) -> int | None:
        """Sample rate of audio, in Hz; None for other modalities."""

    @property
    def bottleneck(self) -> Any:
        """Bottleneck, an object with `codebook_sizes`."""

    def bits(self, tokens: int, num_codebooks: int | None = None) -> float:
        """Return the payload of `tokens` tokens with `num_codebooks` codebooks (None for all), in bits."""

    def encode(self, signal: Tensor, lengths: Tensor | None = None) -> Tensor:
        """Encode signals `(b, c, *grid)` in [-1, 1] to codes, int64 `(b, codebooks, N)` or `(b, codebooks, *grid)`."""

    def decode(self, codes: Tensor, size: Sequence[int] | None = None, lengths: Tensor | None = None) -> Tensor:
        """Decode codes, or a prefix of them, to signals."""


class Code(NamedTuple):
    """Codes of a batch, from which shorter ones are cut.

    Attributes:
        codes: Codes as returned by `Evaluable.encode`.
        tokens: int64 `(b * blocks,)`, number of valid tokens of each signal or block.
        size: Grid `(*grid)` of the signals.
        ends: Bytes of an entropy-coded file up to the end of each codebook; empty without an entropy coder.
    """

    codes: Tensor
    tokens: Tensor
    size: Sequence[int]
    ends: Sequence[int] = ()


class Ladder:
    """The rungs (kept numbers of tokens or codebooks) of a codec; encodes, cuts and decodes codes.

    Args:
        codec: Codec to evaluate.
        keeps: Numbers to keep, in any order; if None, the whole layers of a hierarchical bottleneck, and 1, 2, 4, ...
            and all of others (`distributions.ladder`).

    Attributes:
        axis: Column name of the rungs: "k" for tokens, "codebooks" for codebooks.
        keeps: The rungs, ascending.
        runs: Whether a run of equal tokens at a position counts once.
        layers: Numbers of consecutive codebooks that are counted together (`Bottleneck.codebook_layers`).

    Raises:
        UserError: A number is out of range.
    """

    def __init__(self, codec: Evaluable, keeps: Sequence[int] | None = None) -> None:
        self.codec, self.layout = codec, codec.layout
        self.axis = self.layout.column
        self.runs = bool(getattr(codec, "runs", False)) and bool(codec.bottleneck.codebook_sizes)
        most = self.layout.rungs(len(codec.bottleneck.codebook_sizes))
        sizes: tuple[int, ...] = codec.bottleneck.codebook_sizes
        self.layers: tuple[int, ...] = getattr(codec.bottleneck, "codebook_layers", (1,) * len(sizes))
        usual = lengths.ladder(most, () if self.layout.ordered else self.layers)
        self.keeps = sorted(set(usual if keeps is None else keeps))
        if not self.keeps or self.keeps[0] < 1 or self.keeps[-1] > most:
            wrong = next((k for k in self.keeps if not 1 <= k <= most), "no")
            raise UserError(f"{wrong} {self.layout.unit} to keep: this codec keeps from 1 to {most}")

    def encode(self, signal: Tensor, samples: Tensor) -> Code:
        """Encode signals `(b, c, *grid)` whose first `samples` steps, int64 `(b,)`, are valid."""
        size = signal.shape[2:]
        tokens = self.layout.valid(samples, size)
        codes = self.codec.encode(signal, tokens)
        ends = self.codec.compress(codes).ends if isinstance(self.codec, ImplicitCodec) else ()
        return Code(codes, tokens, size, ends)

    def decode(self, code: Code, keep: int) -> Tensor:
        """Decode codes cut to `keep` tokens or codebooks."""
        cut = self.layout.cut_axis
        if self.layout.ordered:  # decodes to the training size
            return self.codec.decode(code.codes.narrow(cut, 0, keep))
        discrete = bool(self.codec.bottleneck.codebook_sizes)
        return self.codec.decode(code.codes.narrow(cut, 0, keep) if discrete else code.codes, code.size, code.tokens)

    def flat(self, code: Code) -> Tensor:
        """Return codes with a flat grid, `(b * blocks, codebooks, n)`."""
        return self.layout.flatten(code.codes)

    def cut(self, code: Code, start: int, end: int) -> Tensor:
        """Return the mask of the valid codes in `[start, end)` of the cut axis, bool, of the shape of `flat`."""
        flat = self.flat(code)
        valid = prefix_mask(code.tokens, flat.shape[2])[:, None].expand_as(flat).clone()
        along = self.layout.cut_axis
        valid.narrow(along, end, valid.shape[along] - end).fill_(False)
        valid.narrow(along, 0, start).fill_(False)
        return valid

    def codebooks(self, keep: int) -> tuple[int, ...]:
        """Return the sizes of a rung's codebooks."""
        sizes: tuple[int, ...] = self.codec.bottleneck.codebook_sizes
        return sizes[: self.layout.count_kept(0, keep)[1]]

    def kept_layers(self, keep: int) -> int:
        """Return the number of layers that a rung keeps, whole or in part."""
        kept = len(self.codebooks(keep))
        return sum(start < kept for start in accumulate(self.layers[:-1], initial=0))

    def price(self, code: Code, keep: int) -> tuple[float, int]:
        """Return a batch's total payload in bits (exact) and packed bytes; of an `ImplicitCodec`, the coded size."""
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
