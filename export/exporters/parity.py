"""The check that exported files still are the codec that was trained."""

import copy
from collections.abc import Callable, Mapping, Sequence
from itertools import cycle, product
from typing import NamedTuple, Protocol, TypeAlias

import torch
from torch import Tensor

from varitok.codecs.codec import Codec
from varitok.codecs.streaming import ChunkedCodec

__all__ = ["ChunkCoder", "Chunked", "Coder", "Parity", "ParityError", "Size", "check", "draw", "signal_error"]

CODES_EQUAL = 0.9999  # least share of equal codes of the first codebook
SIGNAL_ERROR = 1e-5  # largest error of a signal, over its peak
QUIET = 0.1  # least peak in relative errors: where louder parts cancel, the error is as large as theirs
ENOUGH = 20_000  # tokens over which a share of equal codes means something
BATCHES = (1, 3, 5)
MANY = 64  # signals in a batch where more tokens are needed
CHUNKS = (1, 3, 2)  # of how many wholes a stream's chunks are, in turn

Size: TypeAlias = tuple[int, ...]


class Coder(Protocol):
    """Anything that encodes and decodes as a codec does."""

    def encode(self, signal: Tensor, /) -> Tensor:
        """Turn signals into codes."""

    def decode(self, codes: Tensor, /) -> Tensor:
        """Turn codes into signals."""


class ChunkCoder(Protocol):
    """Anything that goes chunk by chunk; states are float32 `(b, S)`."""

    def state_sizes(self, rows: int = 1, columns: int = 1, /) -> tuple[int, int]:
        """Count the numbers of a sample's state in both directions, given the rows and columns of its latents."""

    def encode_chunk(self, signal: Tensor, state: Tensor, /) -> tuple[Tensor, Tensor]:
        """Turn a chunk of signals into codes."""

    def decode_chunk(self, codes: Tensor, state: Tensor, /) -> tuple[Tensor, Tensor]:
        """Turn a chunk of codes into signals."""


class Chunked:
    """What goes chunk by chunk as if it went whole, in chunks of several sizes, so that it can be compared.

    Args:
        coder: What goes chunk by chunk.
        codec: The trained codec, which knows how long chunks are.
    """

    def __init__(self, coder: ChunkCoder, codec: ChunkedCodec) -> None:
        self.coder = coder
        self.samples = codec.latency
        self.tokens = codec.chunk_tokens
        self.downsample = codec.codec.downsample
        self.causal_pad = codec.codec.layout.causal_pad

    def encode(self, signal: Tensor) -> Tensor:
        """Turn signals into codes, chunk by chunk."""
        grid = [-(-side // step) for side, step in zip(signal.shape[3:], self.downsample[1:], strict=True)]
        state = torch.zeros(len(signal), self.coder.state_sizes(*grid)[0])
        led = torch.cat([signal[:, :, :1]] * self.causal_pad + [signal], dim=2)
        return _through(self.coder.encode_chunk, led, state, self.samples)

    def decode(self, codes: Tensor) -> Tensor:
        """Turn codes into signals, chunk by chunk."""
        state = torch.zeros(len(codes), self.coder.state_sizes(*codes.shape[3:])[1])
        return _through(self.coder.decode_chunk, codes, state, self.tokens)[:, :, self.causal_pad :]


def _through(step: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]], x: Tensor, state: Tensor, whole: int) -> Tensor:
    """Send what has steps along its first axis through `step` in chunks."""
    parts, begin, sizes = [], 0, cycle(CHUNKS)
    while begin < x.shape[2]:
        end = begin + next(sizes) * whole
        part, state = step(x[:, :, begin:end].contiguous(), state)
        parts.append(part)
        begin = end
    return torch.cat(parts, dim=2)


class Parity(NamedTuple):
    """How an artifact compares with the trained codec.

    Attributes:
        tokens: First-codebook tokens that were compared.
        codes_equal: Share of them that are equal.
        signal_error: Largest error of a reconstruction, over the largest value that the codec gave before clamping, at
            least 0.1.
    """

    tokens: int
    codes_equal: float
    signal_error: float


class ParityError(RuntimeError):
    """An artifact differs from the codec that it was exported from; its text names it, the size and the figure."""


def check(
    codec: Codec, artifacts: Mapping[str, Coder], sizes: Sequence[Size], allowed: float = SIGNAL_ERROR
) -> dict[str, Parity]:
    """Compare reloaded artifacts with the trained codec, in evaluation mode on the CPU, at many sizes.

    Batches of 1, 3 and 5 (noise, one flat value, extremes, gradients), and 1, 2, N - 1 and N tokens, 1 and all but one
    of the codebooks. Signals are compared on the trained codec's codes.

    Args:
        codec: The trained codec; it isn't changed.
        artifacts: What is compared, by file name.
        sizes: `(c, *grid)` of its signals.
        allowed: Largest error of a signal over its peak.

    Raises:
        ParityError: Fewer than 99.99 % of the first codebook's codes are equal, or a signal's error exceeds the bound,
            relative to its peak, or to 0.1 if the peak is smaller.
    """
    reference = copy.deepcopy(codec).cpu().float().eval()
    with torch.no_grad():
        return {name: _compare(reference, coder, name, sizes, allowed) for name, coder in artifacts.items()}


def _compare(reference: Codec, coder: Coder, name: str, sizes: Sequence[Size], allowed: float) -> Parity:
    generator = torch.Generator().manual_seed(0)
    tokens = equal = 0
    error = 0.0
    for size, batch in product(sizes, BATCHES):
        signal = draw(batch, size, generator)
        codes = reference.encode(signal)
        along = reference.layout.code_axis
        total, num_codebooks = codes.shape[along], len(reference.bottleneck.codebook_sizes)
        where = f"{name}, batch {batch}" + (f", size {' x '.join(map(str, size[1:]))}" if len(sizes) > 1 else "")
        equal += _equal(codes, coder.encode(signal), where)
        tokens += codes[:, 0].numel()
        parts = [(kept, codes.shape[1]) for kept in sorted({1, min(2, total), max(1, total - 1), total})]
        parts += [(total, some) for some in sorted({1, num_codebooks - 1}) if 0 < some < num_codebooks]
        for kept, rows in parts:
            some = codes[:, :rows].narrow(along, 0, kept).contiguous()
            part = f"{where}, {kept} of {total} tokens" + (
                f", {rows} of {num_codebooks} codebooks" if rows < num_codebooks else ""
            )
            off = signal_error(reference.decode(some), coder.decode(some), part, reference.bounded, allowed)
            error = max(error, off)
    # One token on a tie is a large share of few: look at more before judging.
    while equal < tokens < ENOUGH and tokens - equal <= (1 - CODES_EQUAL) * ENOUGH:
        signal = draw(max(1, MANY // len(sizes)), sizes[-1], generator)
        codes = reference.encode(signal)
        equal += _equal(codes, coder.encode(signal), name)
        tokens += codes[:, 0].numel()
    if equal < CODES_EQUAL * tokens:
        share = f"{equal} of {tokens} codes are equal ({equal / tokens:.4%})"
        raise ParityError(f"{name}, batches {BATCHES}: {share}, needed are {CODES_EQUAL:.2%}")
    return Parity(tokens, equal / tokens, error)


def signal_error(
    painted: Tensor, got: Tensor, where: str, bounded: bool = True, allowed: float = SIGNAL_ERROR
) -> float:
    """Compare a reconstruction with the codec's, which is not clamped yet where it should be; relative to its peak.

    Raises:
        ParityError: It is another.
    """
    expected = painted.clamp(-1, 1) if bounded else painted
    peak = painted.abs().max().clamp(min=QUIET)
    if got.shape != expected.shape:
        raise ParityError(f"{where}: signals {tuple(got.shape)}, the codec makes {tuple(expected.shape)}")
    off = float((got - expected).abs().max() / peak)
    if not off <= allowed:  # NaN too fails this
        raise ParityError(f"{where}: signals differ by {off:.2g} of their peak, allowed is {allowed:g}")
    return off


def draw(batch: int, size: Size, generator: torch.Generator) -> Tensor:
    """Make signals in [-1, 1], `(b, *size)`, in turn noise, one flat value, nothing but extremes, smooth gradients."""
    noise = torch.rand(batch, *size, generator=generator) * 2 - 1
    one, two = noise, noise
    for axis in range(2, noise.ndim):
        one, two = one[(slice(None),) * axis + (slice(1),)], two[(slice(None),) * axis + (slice(2),)]
    flat = one.expand_as(noise)
    mode = {2: "linear", 3: "bilinear", 4: "trilinear"}[len(size)]
    smooth = torch.nn.functional.interpolate(two, size[1:], mode=mode, align_corners=True)
    kinds = torch.stack([noise, flat, noise.sign(), smooth])
    return kinds[torch.arange(batch) % len(kinds), torch.arange(batch)].contiguous()


def _equal(expected: Tensor, got: Tensor, where: str) -> int:
    """Count equal codes of the first codebook; continuous ones are equal within the bound of signals."""
    if got.shape != expected.shape or got.dtype != expected.dtype:
        found = f"codes are {got.dtype} {tuple(got.shape)}"
        raise ParityError(f"{where}: {found}, the codec makes {expected.dtype} {tuple(expected.shape)}")
    if expected.is_floating_point():
        return int(((got - expected).abs() <= SIGNAL_ERROR * expected.abs().max().clamp(min=1)).all(1).sum())
    return int((got[:, 0] == expected[:, 0]).sum())
