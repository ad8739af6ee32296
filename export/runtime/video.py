"""Exported codecs of clips, of their features, and of one clip; numpy and ONNX Runtime alone, as `runtime.py`."""

from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from varitok import UserError

from .bundle import DECODER, Array, Bundle, Opened, tensors, to_pixels
from .streaming import DecodingStream, EncodingStream, stream_form
from .tiling import decode_tiled, encode_tiled

__all__ = ["ClipBundle", "FeatureBundle", "VideoBundle"]

AT_ONCE = 8  # frames that a network paints at once


class VideoBundle(Bundle):
    """A codec of clips, of any number of frames of any size; an image is a clip of one frame.

    Where each block of frames has ordered tokens of its own (`tokens` isn't 0), frames have the size of training.

    Attributes:
        hop: Frames, rows and columns of pixels to a latent.
        lead: Copies of the first frame that go before it, so that it alone makes the first latent frame; 0 where the
            codec isn't causal.
        frame_rate: That of training, frames a second; None where it isn't known.
        frame_size: Height and width of frames; None for any.
        later_tokens: The most tokens of a block behind the first, where blocks have tokens. Codes of such a block
            beyond them say nothing, and none is read.
    """

    axes = 3
    unit = "pixels"

    def _read(self) -> None:
        super()._read()
        self.hop = tuple(int(step) for step in self.config["hop"])
        self.lead = int(self.config["lead"])
        self.frame_rate = _rate(self.config)
        self.frame_size: tuple[int, ...] | None = None
        if self.tokens:
            self.axes = 2
            self.frame_size = tuple(int(side) for side in self.config["frame_size"])
        self.later_tokens = int(self.config.get("later_tokens", self.tokens))

    def valid(self, codes: Array) -> npt.NDArray[np.int64]:
        """Count the tokens that say something in each block of codes `(b, books, t, k)`: int64 `(t,)`.

        Raises:
            UserError: Tokens lie on a grid, where all do.
        """
        if not self.tokens:
            raise UserError("valid: this codec's tokens lie on a grid, and all of them say something")
        most = np.full(codes.shape[2], self.later_tokens)
        most[:1] = self.tokens
        valid: npt.NDArray[np.int64] = np.minimum(most, codes.shape[3]).astype(np.int64)
        return valid

    def __repr__(self) -> str:
        hop, books = " x ".join(map(str, self.hop)), " x ".join(str(size) for size in self.book_sizes)
        name = f"{type(self).__name__}({str(self.folder)!r}"
        if self.tokens:
            return f"{name}: up to {self.tokens} tokens of {books} codes for {self.hop[0]} frames)"
        return f"{name}: a token of {books} codes for {hop} frames, rows, columns)"

    def grid(self, frames: int, height: int, width: int) -> tuple[int, int, int]:
        """Count the steps of a clip's codes along each axis."""
        first, second, third = (
            -(-side // step) for side, step in zip((frames + self.lead, height, width), self.hop, strict=True)
        )
        return first, second, third

    @tensors
    def encode(
        self, frames: Any, *, tokens: int | None = None, books: int | None = None, tile: int | None = None
    ) -> Array:
        """Turn clips into codes; the last frame, row and column are repeated until all steps are full.

        Args:
            frames: uint8 pixels `(t, h, w, c)` or `(b, t, h, w, c)`, or float values `(b, c, t, h, w)` in [-1, 1].
            tokens: Keep only so many of each block, 1 to N; all where None, or where tokens lie on a grid.
            books: Keep only so many books; all where None.
            tile: Most pixels of a side that go through the codec at once, so that large frames need little memory; the
                rest comes in tiles that overlap (`tiles.py`). None: whole frames.

        Returns:
            int64 `(b, books, t', h', w')`, see `grid`, or `(b, books, t', tokens)`; float32 where codes are continuous.

        Raises:
            UserError: A shape, type or value that the codec doesn't take.
        """
        kept = self.kept(books)
        if tokens is not None:
            if not self.tokens:
                raise UserError(f"{tokens} tokens: this codec's lie on a grid; keep fewer books instead")
            self._check_tokens(tokens)
        if tile is None:
            codes = self._encoded(frames)
        else:
            pixels = np.asarray(frames)
            axes = (
                (pixels.ndim - 3, pixels.ndim - 2) if pixels.dtype == np.uint8 else (pixels.ndim - 2, pixels.ndim - 1)
            )
            codes = encode_tiled(self._encoded, pixels, axes, self._tiled(), tile)
        return codes[:, :kept] if tokens is None else codes[:, :kept, :, :tokens]

    def _encoded(self, frames: Any) -> Array:
        values = self.values(frames)
        if not values.size:
            raise UserError(f"frames: 1 or more are expected, got {np.shape(frames)}")
        return self.run_encoder(values)

    @tensors
    def decode(
        self, codes: Any, size: tuple[int, int, int] | None = None, *, tile: int | None = None
    ) -> npt.NDArray[np.float32]:
        """Turn codes, as `encode` gives them, into clips, float32 `(b, c, t, h, w)` in [-1, 1].

        Args:
            codes: Of any integer type, a prefix of the books; continuous ones are floats, all channels.
            size: Frames, height and width of the clips; None gives whole steps.
            tile: Most pixels of a side that go through the codec at once, as in `encode`; where tiles overlap, one
                fades into the other.

        Raises:
            UserError: A shape, type or code that the codec doesn't have, or a size that isn't these codes'.
        """
        codes = self._codes(codes)
        if not codes.size:
            raise UserError(f"codes: shape {codes.shape} has none")
        if self.tokens:
            self._check_tokens(codes.shape[3])
        if size is not None:
            grid = self.grid(*size)
            if self.tokens:
                self._check_size(*size[1:])
                grid = grid[0], codes.shape[3], 0
            if grid[: self.axes] != codes.shape[2:]:
                raise UserError(f"size: {size} has codes {grid[: self.axes]}, these are {codes.shape[2:]}")
        if tile is None:
            clips = self.run_decoder(codes)
        else:
            clips = decode_tiled(self.run_decoder, codes, self._tiled(), tile)
        return clips if size is None else clips[:, :, : size[0], : size[1], : size[2]]

    def pixels(self, clips: npt.ArrayLike) -> npt.NDArray[np.uint8]:
        """Turn clips `(b, c, t, h, w)` in [-1, 1] into uint8 `(b, t, h, w, c)`, rounded to the nearest."""
        return to_pixels(clips)

    def encoding(self, *, books: int | None = None, batch: int = 1) -> EncodingStream:
        """Start a stream of frames into codes: it takes chunks of any number of frames, as `encode` takes clips.

        All its codes together are those that `encode` gives for the whole clip.

        Args:
            books: Keep only so many books; all where None.
            batch: Clips that go side by side.

        Raises:
            UserError: The codec can't stream, or doesn't have so many books.
        """
        graph = self.streaming_graphs[0]
        return EncodingStream(graph, self.values, stream_form(self.config, "encoder"), batch, self.kept(books))

    def decoding(self, *, batch: int = 1) -> DecodingStream:
        """Start a stream of codes into frames: all its frames together are what `decode` gives for all codes.

        Args:
            batch: Clips that go side by side.

        Raises:
            UserError: The codec can't stream.
        """
        graph = self.streaming_graphs[1]
        return DecodingStream(graph, self._codes, stream_form(self.config, "decoder"), batch, self.channels)

    def values(self, frames: Any) -> npt.NDArray[np.float32]:
        """Bring whatever clips are given as, perhaps of no frames, to float32 `(b, c, t, h, w)` in [-1, 1]."""
        values, c = np.asarray(frames), self.channels
        if values.dtype == np.uint8:
            values = values[None] if values.ndim == 4 else values
            if values.ndim != 5 or values.shape[4] != c or not all(values.shape[2:4]):
                raise UserError(f"frames: pixels (frames, height, width, {c}) are expected, got {np.shape(frames)}")
            self._check_size(*values.shape[2:4])
            return np.moveaxis(values, -1, 1).astype(np.float32) / np.float32(127.5) - 1
        if values.dtype.kind != "f":
            raise UserError(f"frames: uint8 pixels or floats in [-1, 1] are expected, got {values.dtype}")
        if values.ndim != 5 or values.shape[1] != c or not all(values.shape[3:]) or not values.shape[0]:
            shape = f"(batch, {c}, frames, height, width)"
            raise UserError(f"frames: float values {shape} are expected, got {values.shape}")
        if not np.abs(values).max(initial=0) <= 1 + 1e-3:  # NaN too fails this
            raise UserError("frames: float values must lie in [-1, 1]; some don't, or aren't numbers")
        self._check_size(*values.shape[3:])
        return values.astype(np.float32)

    def _tiled(self) -> tuple[int, ...]:
        """Give the hop of tiles' sides."""
        if self.tokens:
            raise UserError("tile: this codec's frames have one size, they can't be tiles of others")
        return self.hop[1:]

    def _check_size(self, height: int, width: int) -> None:
        if self.frame_size not in (None, (height, width)):
            assert self.frame_size is not None
            there = " x ".join(map(str, reversed(self.frame_size)))
            raise UserError(f"frames: {width} x {height} {self.unit}, this codec takes {there}; resize them before")


class FeatureBundle(VideoBundle):
    """A codec of the features that a vision transformer sees in clips: floats of any size, standardised.

    Codes, blocks and streams are those of a `VideoBundle`; what comes back is not clamped, and has no `pixels`:
    `codec.restored(codec.decode(codec.encode(codec.standardised(features))))` are the features as the transformer gives
    them.
    """

    unit = "positions"

    def standardised(self, features: npt.ArrayLike) -> npt.NDArray[np.float32]:
        """Bring each channel of a transformer's features `(b, c, t, rows, columns)` to mean 0 and variance 1."""
        return (self.values(features) - self._of_channels("feature_mean")) / self._of_channels("feature_deviation")

    def restored(self, clips: npt.ArrayLike) -> npt.NDArray[np.float32]:
        """Give decoded clips the scale of a transformer's features back."""
        return self.values(clips) * self._of_channels("feature_deviation") + self._of_channels("feature_mean")

    def _of_channels(self, name: str) -> npt.NDArray[np.float32]:
        return np.array(self.config[name], np.float32)[:, None, None, None]

    def pixels(self, clips: npt.ArrayLike) -> npt.NDArray[np.uint8]:
        """Refuse: what this codec gives back are features.

        Raises:
            UserError: Always.
        """
        raise UserError("pixels: this codec gives features back, from which a generator has to paint")

    def values(self, frames: Any) -> npt.NDArray[np.float32]:
        """Check feature clips, perhaps of no frames: float32 `(b, c, t, rows, columns)`."""
        values, shape = np.asarray(frames), f"(batch, {self.channels}, frames, rows, columns)"
        if values.dtype.kind != "f":
            raise UserError(f"frames: features are expected, floats {shape}, got {values.dtype}")
        if values.ndim != 5 or values.shape[1] != self.channels or not all(values.shape[3:]) or not values.shape[0]:
            raise UserError(f"frames: features {shape} are expected, got {values.shape}")
        if not np.isfinite(values).all():
            raise UserError("frames: some features aren't numbers")
        self._check_size(*values.shape[3:])
        return values.astype(np.float32)


class ClipBundle(Opened):
    """One clip, as a network that paints its frames.

    Attributes:
        frames: How many it has.
        height: Of a frame, in pixels.
        width: Likewise.
        frame_rate: Frames a second; None where it isn't known.
    """

    graphs = (DECODER,)

    def _read(self) -> None:
        self.frames, self.height, self.width = (int(self.config[key]) for key in ("frames", "height", "width"))
        self.frame_rate = _rate(self.config)

    def __repr__(self) -> str:
        return f"ClipBundle({str(self.folder)!r}: {self.frames} frames of {self.width} x {self.height} pixels)"

    def decode(self, frames: Any = None) -> npt.NDArray[np.uint8]:
        """Paint frames, in any order: uint8 `(t, h, w, 3)`.

        Args:
            frames: Their numbers, from 0 on, or one number; all where None.

        Raises:
            UserError: It has no such frame.
        """
        numbers = np.atleast_1d(np.asarray(range(self.frames) if frames is None else frames))
        if numbers.dtype.kind not in "iu" or numbers.ndim != 1:
            raise UserError(f"frames: whole numbers (t,) are expected, got {numbers.dtype} {numbers.shape}")
        for wrong in numbers[(numbers < 0) | (numbers >= self.frames)]:
            raise UserError(f"frames: {wrong} is not there; this clip has 0 to {self.frames - 1}")
        blocks = (numbers[at : at + AT_ONCE] for at in range(0, len(numbers), AT_ONCE))
        painted = [to_pixels(self.run_decoder(block.astype(np.int64))) for block in blocks]
        return np.concatenate(painted)

    def run_decoder(self, numbers: Array) -> npt.NDArray[np.float32]:
        """Paint frames of these numbers, int64 `(t,)`: float32 `(t, 3, h, w)` in [-1, 1]; nothing is checked."""
        graph = self._decoder
        painted: npt.NDArray[np.float32] = graph.run(None, {graph.get_inputs()[0].name: numbers})[0]
        return painted


def _rate(config: Mapping[str, Any]) -> float | None:
    """Give the frame rate, where it is known."""
    rate = config.get("frame_rate")
    return None if rate is None else float(rate)
