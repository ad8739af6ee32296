"""Run an exported video codec, with NumPy and ONNX Runtime."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from fractions import Fraction
from typing import Any, BinaryIO, ClassVar

import numpy as np
import numpy.typing as npt

from varitok import UserError
from varitok.data.decoding.framing import center_box, covering
from varitok.data.decoding.suffixes import IMAGES, VIDEO
from varitok.data.storage.members import File

from .bundle import Array, product_of, tensors
from .files import SignalFile, open_input
from .pixels import PixelBundle
from .streaming import DecodingStream, EncodingStream

__all__ = ["VideoBundle"]

FRAME_RATE = 8.0  # frames per second, if neither the file nor the codec has a rate


class VideoBundle(PixelBundle):
    """An exported video codec, of clips of any number of frames of any size; an image is a clip of one frame.

    If each block of frames has ordered tokens (`tokens` > 0), frames must have the size of training.

    Attributes:
        downsample: Downsampling factors of time, height and width.
        causal_pad: Copies of the first frame that are prepended, so that the first latent frame depends on it alone;
            0 if the codec isn't causal.
        frame_rate: Frame rate of training, in frames per second; None if unknown.
        frame_size: Height and width of frames; None for any.
        later_tokens: Maximum number of tokens of each block after the first; the decoder ignores codes beyond it.

    Example:
        >>> bundle = varitok.load("video_tokenizer")
        >>> frames = np.zeros((8, 32, 48, 3), np.uint8)  # (t, h, w, c)
        >>> codes = bundle.encode(frames)
        >>> codes.shape, bundle.pixels(bundle.decode(codes, size=(8, 32, 48))).shape
        ((1, 2, 2, 4, 6), (1, 8, 32, 48, 3))
    """

    modality = "video"
    counted = "frames"
    suffixes: ClassVar[tuple[str, ...]] = (*VIDEO, *IMAGES)
    written: ClassVar[tuple[str, ...]] = ("mp4", "mkv")
    axes = 3
    given = "frames"
    sides = "frames, height, width"
    steps = "frames, rows, columns"

    def _read(self) -> None:
        super()._read()
        self.downsample = self.hops = tuple(int(step) for step in self.config["hop"])
        self.causal_pad = int(self.config["lead"])
        rate = self.config.get("frame_rate")
        self.frame_rate = None if rate is None else float(rate)
        if self.tokens:
            self.axes = 2
            self.frame_size = tuple(int(side) for side in self.config["frame_size"])
        self.later_tokens = int(self.config.get("later_tokens", self.tokens))

    def valid(self, codes: Array) -> npt.NDArray[np.int64]:
        """Return the number of valid tokens in each block of codes `(b, codebooks, t, k)`: int64 `(t,)`.

        Raises:
            UserError: The codec has tokens on a grid, which are all valid.
        """
        if not self.tokens:
            raise UserError("valid: this codec has tokens on a grid, all of them valid")
        most = np.full(codes.shape[2], self.later_tokens)
        most[:1] = self.tokens
        valid: npt.NDArray[np.int64] = np.minimum(most, codes.shape[3]).astype(np.int64)
        return valid

    def __repr__(self) -> str:
        steps, sizes = " x ".join(map(str, self.downsample)), product_of(self.codebook_sizes)
        name = f"{type(self).__name__}({str(self.folder)!r}"
        if self.tokens:
            return f"{name}: up to {self.tokens} tokens of {sizes} codes for {self.downsample[0]} frames)"
        return f"{name}: a token of {sizes} codes for {steps} frames, rows, columns)"

    def grid(self, frames: int, height: int, width: int) -> tuple[int, int, int]:
        """Return the size of a clip's code grid (t', h', w'), ceil(size / downsample) per axis.

        Example:
            >>> bundle.grid(frames=8, height=30, width=48)
            (2, 4, 6)
        """
        first, second, third = self._grid((frames, height, width))
        return first, second, third

    @tensors
    def encode(
        self, frames: Any, *, tokens: int | None = None, num_codebooks: int | None = None, tile: int | None = None
    ) -> Array:
        """Encode clips; the last frame, row and column are repeated up to a multiple of `downsample`.

        Args:
            frames: uint8 pixels `(t, h, w, c)` or `(b, t, h, w, c)`, or float values `(b, c, t, h, w)` in [-1, 1].
            tokens: Number of tokens to keep in each block, 1 to N; all if None. Must be None for tokens on a grid.
            num_codebooks: Number of codebooks to keep; all if None.
            tile: Maximum height and width of a tile in pixels, to save memory: larger frames are encoded in
                overlapping tiles (`tiling.py`). None: whole frames.

        Returns:
            int64 `(b, num_codebooks, t', h', w')`, see `grid`, or `(b, num_codebooks, t', tokens)`; float32 if codes
            are continuous.

        Raises:
            UserError: The shape, type or a value is not supported.

        Example:
            >>> bundle.encode(np.zeros((4, 64, 64, 3), np.uint8), num_codebooks=1, tile=32).shape
            (1, 1, 1, 8, 8)
        """
        self.check_kept(tokens, num_codebooks)
        values = self.values(frames)
        if not values.size:
            raise UserError(f"frames: 1 or more are expected, got {np.shape(frames)}")
        return self.encode_values(values, tokens=tokens, num_codebooks=num_codebooks, tile=tile)

    @tensors
    def decode(
        self, codes: Any, size: tuple[int, int, int] | None = None, *, tile: int | None = None
    ) -> npt.NDArray[np.float32]:
        """Decode the output of `encode` into clips, float32 `(b, c, t, h, w)` in [-1, 1].

        Args:
            codes: Codes of any integer type, in all or the first codebooks; continuous codes are floats and need all
                channels.
            size: Frames, height and width of the clips; None: a multiple of `downsample`.
            tile: Maximum height and width of a tile in pixels, as in `encode`; overlapping tiles are blended.

        Raises:
            UserError: The shape, type or a code is not the codec's, or the codes are not of this size.

        Example:
            >>> bundle.decode(np.zeros((1, 2, 1, 4, 4), np.int64), size=(3, 30, 30)).shape
            (1, 3, 3, 30, 30)
        """
        return self._decode(codes, size, tile)

    def facts(self, size: tuple[int, ...], rate: float | None) -> tuple[int, ...]:
        """Return the height and width of frames, and the number of frames in 1,000 s."""
        return (*size[1:], round(1000 * (rate or 0)))

    def signal_size(self, codes: Array, units: int | None, facts: tuple[int, ...]) -> tuple[int, ...]:
        """Return the frames, height and width of a container's clip."""
        if len(facts) != 3:
            raise UserError("the container lacks its frames' height, width and rate; encode the clip again")
        size = *super().signal_size(codes, units, facts), *facts[:2]
        self._check_grid(codes, size)
        return size

    @contextmanager
    def open_file(self, path: File) -> Iterator[SignalFile]:
        """Open a video or image file; frames are resized and center-cropped if the codec has a frame size.

        A clip keeps its frame rate; one of variable rate has its mean rate.
        """
        from varitok.data.decoding.video import VideoFile  # noqa: PLC0415 (arrays don't need it)

        with open_input(path) as source, VideoFile(source) as clip:
            whole = clip.height, clip.width
            if self.frame_size:
                whole = covering(whole, self.frame_size)
            (top, height), (left, width) = center_box(whole, self.frame_size or whole)

            def chunks(count: int) -> Iterator[npt.NDArray[np.float32]]:
                for start in range(0, clip.length, count):
                    frames = clip.read(start, count, whole)
                    yield self.values(frames[:, top : top + height, left : left + width])

            yield SignalFile(clip.length, chunks, None if clip.is_image else clip.frame_rate)

    def write_file(
        self, chunks: Iterable[npt.NDArray[np.float32]], facts: tuple[int, ...], to: str, file: BinaryIO
    ) -> dict[str, Any]:
        """Write an H.264 file (CRF 12); odd sides lose their last row or column."""
        av, rate, written = _av(), facts[2] / 1000 or self.frame_rate or FRAME_RATE, 0
        with av.open(file, "w", format="matroska" if to == "mkv" else to) as clip:
            stream = clip.add_stream("libx264", rate=Fraction(rate).limit_denominator(1000))
            stream.pix_fmt, stream.options = "yuv420p", {"crf": "12", "preset": "fast"}
            for chunk in chunks:
                sides = [side // 2 * 2 for side in chunk.shape[3:]]  # 4:2:0 subsamples chroma by 2
                if not written:
                    stream.height, stream.width = sides
                elif [stream.height, stream.width] != sides:
                    raise UserError("its clips have frames of several sizes; decode them one by one")
                for at in range(chunk.shape[2]):
                    frame = self.pixels(chunk[:, :, at : at + 1])[0, 0, : sides[0], : sides[1]]
                    picture = av.VideoFrame.from_ndarray(np.ascontiguousarray(frame), format="rgb24")
                    clip.mux(stream.encode(picture))
                    written += 1
            clip.mux(stream.encode(None))
        return {"frames": written}

    def describe_signals(self) -> str:
        """Return the frame size, channels and frame rate."""
        size = " x ".join(map(str, reversed(self.frame_size))) if self.frame_size else "any number of"
        rate = "" if self.frame_rate is None else f", trained at {self.frame_rate:g} a second"
        return f"clips of any number of frames of {size} {self.unit}, {self.channels} channels{rate}"

    def describe_rates(self) -> dict[str, Any]:
        """Return the bits per pixel of a grid, or the payload of a block's tokens."""
        if self.tokens:
            return {"tokens": f"1 to {self.tokens} for {self.downsample[0]} frames"} | self._describe_lengths("a block")
        return self._describe_grid()

    def encoding(self, *, num_codebooks: int | None = None, batch: int = 1) -> EncodingStream:
        """Return a streaming encoder that accepts chunks of any number of frames, in the form of `encode`.

        Its concatenated codes equal `encode` of the whole clip.

        Args:
            num_codebooks: Number of codebooks to keep; all if None.
            batch: Number of clips encoded in parallel.

        Raises:
            UserError: The codec can't stream, or has fewer codebooks.

        Example:
            >>> encode = bundle.encoding()  # 4 frames per latent frame
            >>> encode(np.zeros((6, 16, 16, 3), np.uint8)).shape, encode.flush().shape
            ((1, 2, 1, 2, 2), (1, 2, 1, 2, 2))
        """
        return self.encoding_stream(num_codebooks, batch)

    def decoding(self, *, batch: int = 1) -> DecodingStream:
        """Return a streaming decoder; its concatenated output equals `decode` of all codes.

        Args:
            batch: Number of clips decoded in parallel.

        Raises:
            UserError: The codec can't stream.

        Example:
            >>> decode = bundle.decoding()
            >>> decode(np.zeros((1, 2, 1, 2, 2), np.int64)).shape
            (1, 3, 4, 16, 16)
        """
        return self.decoding_stream(batch)


def _av() -> Any:
    try:
        import av  # noqa: PLC0415 (an extra)
    except ImportError as error:
        raise UserError("clips need the package av; pip install 'varitok[video]'") from error
    return av
