"""Encode and decode signals of any length within a given memory, with NumPy and ONNX Runtime.

    the signal fits                 its graph runs once
    else, the codec can stream      chunk by chunk, with the codes and the signal of the whole
    else                            in overlapping windows (`tiling.py`), and frames that don't fit in tiles

An image is one frame. If the network attends to all of it, so that its memory grows with the square of the area, tiles
are not larger than the images of training: it has learned no others.

Which of them, and the sizes of chunks, windows and tiles, follow from the memory, the bundle and the signal's size: a
command gives the same codes on every machine.
"""

import math
from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Literal, NamedTuple

import numpy as np

from varitok import UserError, progress

from .bundle import Array, Bundle
from .files import SignalFile
from .streaming import stream_form
from .tiling import Floats, Passage, decode_windows, encode_windows

__all__ = [
    "MEMORY",
    "Coded",
    "Plan",
    "Side",
    "decode_within",
    "encode_within",
    "passage",
    "plan",
    "require_memory",
]

MEMORY = 2.0  # GB
GIGABYTE = 1e9
PROCESS = 0.35  # GB of Python, its libraries, and an H.264 encoder's frames
COPIES = 4  # of a signal in memory, beside the graphs: as read, joined, cut and converted
SLACK = 2  # ONNX Runtime's memory over that of weights, which it packs, and of activations, whose memory it pools
STREAMED = 4  # a chunk's memory over that of a whole signal of its length: layers join it to what they keep of the past
UNKNOWN = 2e8, 2048.0, 0.0  # `Bundle.memory` of older exports
LEAST = 4  # steps along time of a window of whole frames; if fewer fit, frames are tiled
READ = 1 << 16  # samples of a sound that are read at once
TRAINED = 256  # pixels, the side of a tile if the bundle doesn't say at which size its network was trained
UNBOUNDED = 1 << 40  # steps
FLAT = 1e-7  # bytes a squared pixel: no more is rounding

Side = Literal["encoder", "decoder"]


class Plan(NamedTuple):
    """How a signal is coded.

    Attributes:
        whole: Most steps of the first axis that are coded at once.
        steps: If there are more, the steps of a chunk or window.
        streams: Whether chunks are streamed; otherwise windows overlap.
        tile: Maximum height and width of a window's tiles; None for whole frames.
    """

    whole: int
    steps: int
    streams: bool
    tile: tuple[int, ...] | None = None


class Coded(NamedTuple):
    """The codes of a file.

    Attributes:
        codes: `(1, codebooks, steps, *inner)`.
        size: Size of the signal: samples; or frames, height and width.
        whole: Whether the signal was encoded at once.
    """

    codes: Array
    size: tuple[int, ...]
    whole: bool


def require_memory(memory: float) -> None:
    """Check the value of the option `--memory`, in GB.

    Raises:
        UserError: It isn't above 0.
    """
    if not memory > 0:  # also true for NaN
        raise UserError(f"--memory {memory:g}: must be above 0")


def plan(bundle: Bundle, side: Side, frame: tuple[int, ...], memory: float) -> Plan:
    """Return how signals with frames of a size are coded.

    Args:
        bundle: The bundle.
        side: Whether to encode or decode.
        frame: Height and width of an image or of a clip's frames; empty for sound.
        memory: Peak memory of the process in GB.

    Raises:
        UserError: The bundle needs more memory.
    """
    weights, linear, quadratic = (SLACK * each for each in bundle.memory.get(side, UNKNOWN))
    linear += COPIES * 4 * bundle.channels
    room = (memory - PROCESS) * GIGABYTE - weights
    free = bundle.axes == len(bundle.hops) > 1  # frames may have any size
    (hop, *hops), least, most = bundle.hops, LEAST, UNBOUNDED
    if not bundle.splits:  # an image is a clip of one frame
        hop, hops, least = 1, list(bundle.hops), 1
        if quadratic > FLAT:
            most = max(2, int(bundle.config.get("image_size", TRAINED)) // max(hops))

    def cost(steps: int, sides: Sequence[int]) -> float:
        length, area = steps * hop, math.prod(sides)
        return length * area * (linear + quadratic * (area if free else length))

    # Images always go in tiles, as large as they may be.
    whole = _most(lambda steps: cost(steps, frame), room) if bundle.splits else 0
    if bundle.config.get("streaming") and not (side == "decoder" and bundle.int8):
        form = stream_form(bundle.config, side)
        grid = [-(-length // step) for length, step in zip(frame, hops, strict=True)]
        state = 4 * form.state_size(grid)
        chunk = _most(lambda steps: STREAMED * cost(steps, frame) + 3 * state, room)  # given, found, and in the layers
        each = form.whole // hop if side == "encoder" else form.whole
        if chunk >= each:
            return Plan(whole, chunk // each * each, True)
    if free and whole < least:
        frames = COPIES * 4 * bundle.channels * least * hop * math.prod(frame)  # bytes
        sides = _most(lambda count: cost(least, [count * step for step in hops]), room - frames)
        if sides > 1:
            return Plan(whole, least, False, tuple(min(sides, most) * step for step in hops))
    if whole < 2:
        needed = frames + cost(least, [2 * step for step in hops]) if free else cost(2, frame)
        needed = memory + (needed - room) / GIGABYTE
        raise UserError(f"--memory {memory:g}: {bundle.folder} needs {needed:.2g} GB; give that or more")
    return Plan(whole, whole, False)


def _most(cost: Callable[[int], float], room: float) -> int:
    """Return the most steps whose cost is within `room`."""
    return bisect_right(range(1, UNBOUNDED), room, key=cost)


def passage(bundle: Bundle, file: SignalFile) -> Passage:
    """Return a file's signal, read from its begin as it is needed."""
    return Passage(file.chunks(READ if bundle.axes == 1 else bundle.hops[0]))


def encode_within(
    bundle: Bundle, file: SignalFile, memory: float, *, tokens: int | None = None, num_codebooks: int | None = None
) -> Coded:
    """Encode a file within a given memory.

    Args:
        bundle: The bundle to encode with.
        file: The file, as `Bundle.open_file` returns it.
        memory: Peak memory of the process in GB.
        tokens: Number of ordered tokens to keep; all if None.
        num_codebooks: Number of codebooks to keep; all if None.

    Raises:
        UserError: The file can't be read, or the bundle needs more memory.
    """
    encode: Callable[..., Array] = partial(bundle.encode_values, tokens=tokens, num_codebooks=num_codebooks)
    if not bundle.splits:
        values = file.read()
        size = values.shape[2:]
        return Coded(encode(values, **_tiled(bundle, "encoder", size, memory)), size, True)
    hop, pad = bundle.hops[0], bundle.causal_pad
    signal = passage(bundle, file)
    frame = signal.frame
    chosen = plan(bundle, "encoder", frame, memory)
    most = chosen.whole * hop - pad
    if signal.reach(most + 1) <= most:
        return Coded(encode(signal.take(0, most)), (signal.end, *frame), True)
    if chosen.streams:
        stream, chunk = bundle.encoding_stream(num_codebooks), chosen.steps * hop
        begins = progress(signal.begins(chunk), -(-file.length // chunk), "chunks")
        parts = [stream(signal.take(begin, begin + chunk)) for begin in begins]
        codes = np.concatenate([*parts, stream.flush()], axis=2)[..., :tokens]
    else:
        if chosen.tile:
            encode = partial(encode, tile=chosen.tile)
        codes = encode_windows(encode, signal, file.length, chosen.steps, hop, pad, bundle.group)
    return Coded(codes, (signal.end, *frame), False)


def decode_within(bundle: Bundle, codes: Array, size: tuple[int, ...], memory: float) -> Iterator[Floats]:
    """Decode codes within a given memory; yield the signal in consecutive parts `(1, c, n, ...)`.

    Args:
        bundle: The bundle to decode with.
        codes: Valid codes of the bundle, `(1, codebooks, steps, *inner)`.
        size: Size of the signal, as `Bundle.signal_size` returns it.
        memory: Peak memory of the process in GB.

    Raises:
        UserError: The bundle needs more memory.
    """
    left = size[0]
    for part in _decode(bundle, codes, size, memory):
        cut = part[(slice(None), slice(None), slice(left), *map(slice, size[1:]))]
        left -= cut.shape[2]
        if cut.shape[2]:
            yield cut


def _decode(bundle: Bundle, codes: Array, size: tuple[int, ...], memory: float) -> Iterator[Floats]:
    decode: Callable[..., Floats] = bundle.decode
    if not bundle.splits:
        yield decode(codes, **_tiled(bundle, "decoder", size, memory))
        return
    steps, chosen = codes.shape[2], plan(bundle, "decoder", size[1:], memory)
    if steps <= chosen.whole:
        yield bundle.run_decoder(codes)
    elif chosen.streams:
        stream, begins = bundle.decoding_stream(), range(0, steps, chosen.steps)
        for begin in progress(begins, len(begins), "chunks"):
            yield stream(codes[:, :, begin : begin + chosen.steps])
        yield stream.flush()
    else:
        if chosen.tile:
            decode = partial(decode, tile=chosen.tile)
        yield from decode_windows(decode, codes, chosen.steps, bundle.hops[0], bundle.causal_pad, bundle.group)


def _tiled(bundle: Bundle, side: Side, size: tuple[int, ...], memory: float) -> dict[str, tuple[int, ...] | None]:
    """Return the tile of an image as an option of `encode_values` or `decode`; none if all images have one size."""
    return {} if bundle.tokens else {"tile": plan(bundle, side, size, memory).tile}
