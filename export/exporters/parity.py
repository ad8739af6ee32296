"""The parity gate: a comparison of exported files with the trained codec."""

import copy
from collections.abc import Callable, Mapping, Sequence
from itertools import cycle, product
from typing import NamedTuple, Protocol, TypeAlias

import torch
from torch import Tensor

from varitok.codecs.codec import Codec
from varitok.codecs.streaming import ChunkedCodec

__all__ = [
    "SAMPLED_ERROR",
    "SIGNAL_ERROR",
    "ChunkCoder",
    "Chunked",
    "Coder",
    "Parity",
    "ParityError",
    "Size",
    "check",
    "draw",
    "signal_error",
]

CODES_EQUAL = 0.9999  # least share of equal codes of the first codebook
SIGNAL_ERROR = 1e-5  # largest error of a signal, relative to its peak
SAMPLED_ERROR = 1e-4  # the same of a decoder that samples, whose steps amplify rounding
QUIET = 0.1  # lower bound of that peak: if louder components cancel, their rounding error remains
ENOUGH = 20_000  # number of tokens that makes a share of equal codes meaningful
BATCHES = (1, 3, 5)
MANY = 64  # signals per batch if more tokens are needed
CHUNKS = (1, 3, 2)  # lengths of a stream's chunks in turn, as multiples of the shortest

Size: TypeAlias = tuple[int, ...]


class Coder(Protocol):
    """An encoder and decoder with a codec's methods."""

    def encode(self, signal: Tensor, /) -> Tensor:
        """Encode signals to codes."""

    def decode(self, codes: Tensor, /) -> Tensor:
        """Decode codes to signals."""


class ChunkCoder(Protocol):
    """A streaming encoder and decoder; states are float32 `(b, S)`."""

    def state_sizes(self, rows: int = 1, columns: int = 1, /) -> tuple[int, int]:
        """Return S for the encoder and for the decoder, given the rows and columns of a frame's latents."""

    def encode_chunk(self, signal: Tensor, state: Tensor, /) -> tuple[Tensor, Tensor]:
        """Encode a chunk of signals; return codes and the next state."""

    def decode_chunk(self, codes: Tensor, state: Tensor, /) -> tuple[Tensor, Tensor]:
        """Decode a chunk of codes; return signals and the next state."""


class Chunked:
    """A streaming coder with the interface of `Coder`: it splits whole signals and codes into chunks of several sizes.

    Args:
        coder: The streaming coder.
        codec: The trained codec, which defines the chunk sizes.
    """

    def __init__(self, coder: ChunkCoder, codec: ChunkedCodec) -> None:
        self.coder = coder
        self.samples = codec.latency
        self.tokens = codec.chunk_tokens
        self.downsample = codec.codec.downsample
        self.causal_pad = codec.codec.layout.causal_pad

    def encode(self, signal: Tensor) -> Tensor:
        """Encode signals chunk by chunk."""
        grid = [-(-side // step) for side, step in zip(signal.shape[3:], self.downsample[1:], strict=True)]
        state = torch.zeros(len(signal), self.coder.state_sizes(*grid)[0])
        led = torch.cat([signal[:, :, :1]] * self.causal_pad + [signal], dim=2)
        return _through(self.coder.encode_chunk, led, state, self.samples)

    def decode(self, codes: Tensor) -> Tensor:
        """Decode codes chunk by chunk."""
        state = torch.zeros(len(codes), self.coder.state_sizes(*codes.shape[3:])[1])
        return _through(self.coder.decode_chunk, codes, state, self.tokens)[:, :, self.causal_pad :]


def _through(step: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]], x: Tensor, state: Tensor, whole: int) -> Tensor:
    """Apply `step` to chunks along axis 2, and concatenate its outputs."""
    parts, begin, sizes = [], 0, cycle(CHUNKS)
    while begin < x.shape[2]:
        end = begin + next(sizes) * whole
        part, state = step(x[:, :, begin:end].contiguous(), state)
        parts.append(part)
        begin = end
    return torch.cat(parts, dim=2)


class Parity(NamedTuple):
    """The agreement of an exported file with the trained codec.

    Attributes:
        tokens: Number of compared codes, all of the first codebook.
        codes_equal: Share of equal codes among them.
        signal_error: Largest error of a reconstruction, from the codec's in float32 or float64 (see `check`), relative
            to the peak of the codec's output before clamping (at least 0.1).
    """

    tokens: int
    codes_equal: float
    signal_error: float


class ParityError(RuntimeError):
    """An exported file differs from its codec; the message names the file, the size and the error."""


def check(
    codec: Codec, artifacts: Mapping[str, Coder], sizes: Sequence[Size], allowed: float = SIGNAL_ERROR
) -> dict[str, Parity]:
    """Compare reloaded files with the trained codec, in evaluation mode on the CPU, at many sizes.

    Rounding grows with a decoder's depth: two float32 results may be further apart than each is from the exact one. So
    a signal that isn't near the codec's must be near that of its weights in float64, or as near as the codec's is.

    Signals (see `draw`) are in batches of 1, 3 and 5. Both sides decode the trained codec's codes: 1, 2, N - 1 and N
    tokens, and 1 and all but one of the codebooks.

    Args:
        codec: The trained codec; it isn't changed.
        artifacts: The reloaded files by name.
        sizes: Shapes `(c, *grid)` of the signals.
        allowed: Largest allowed error of a signal, relative to its peak (at least 0.1).

    Raises:
        ParityError: Fewer than 99.99 % of the first codebook's codes are equal, or an error exceeds `allowed`.
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
            painted, got = reference.decode(some), coder.decode(some)
            try:
                off = signal_error(painted, got, part, reference.bounded, allowed)
            except ParityError:
                exact = _decode_exactly(reference, some)
                if exact is None:
                    raise
                limited = painted.clamp(-1, 1) if reference.bounded else painted
                own = signal_error(exact, limited, part, reference.bounded, torch.inf)
                off = signal_error(exact, got, part, reference.bounded, max(allowed, own))
            error = max(error, off)
    # A single tie is a large share of few tokens: compare more before judging.
    while equal < tokens < ENOUGH and tokens - equal <= (1 - CODES_EQUAL) * ENOUGH:
        signal = draw(max(1, MANY // len(sizes)), sizes[-1], generator)
        codes = reference.encode(signal)
        equal += _equal(codes, coder.encode(signal), name)
        tokens += codes[:, 0].numel()
    if equal < CODES_EQUAL * tokens:
        share = f"{equal} of {tokens} codes are equal ({equal / tokens:.4%})"
        raise ParityError(f"{name}, batches {BATCHES}: {share}, needed are {CODES_EQUAL:.2%}")
    return Parity(tokens, equal / tokens, error)


def _decode_exactly(codec: Codec, codes: Tensor) -> Tensor | None:
    """Decode in float64; None if a layer computes in float32 whatever its weights, as an inverse STFT does."""
    exact = copy.deepcopy(codec).double()
    exact.project_out.register_forward_pre_hook(lambda _, given: (given[0].double(), *given[1:]))
    try:
        return exact.decode(codes)
    except RuntimeError:  # mixed types
        return None


def signal_error(
    painted: Tensor, got: Tensor, where: str, bounded: bool = True, allowed: float = SIGNAL_ERROR
) -> float:
    """Return a reconstruction's error, relative to the peak of the trained codec's unclamped reconstruction.

    Raises:
        ParityError: The shapes differ, or the error exceeds `allowed`.
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
    """Draw signals `(b, *size)` in [-1, 1], in turn of noise, of one value, of 1 and -1 only, of smooth gradients."""
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
    """Count equal codes of the first codebook; continuous latents are equal within `SIGNAL_ERROR`."""
    if got.shape != expected.shape or got.dtype != expected.dtype:
        found = f"codes are {got.dtype} {tuple(got.shape)}"
        raise ParityError(f"{where}: {found}, the codec makes {expected.dtype} {tuple(expected.shape)}")
    if expected.is_floating_point():
        return int(((got - expected).abs() <= SIGNAL_ERROR * expected.abs().max().clamp(min=1)).all(1).sum())
    return int((got[:, 0] == expected[:, 0]).sum())
