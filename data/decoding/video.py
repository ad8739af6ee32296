"""Decode segments of video files, at a given frame rate and size."""

import stat
import struct
import time
from bisect import bisect_left, bisect_right
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
from PIL import Image

from ..storage.members import Source, open_file, to_source
from .errors import BadSample, convert_errors
from .ffmpeg import PATIENCE, import_av, open_media
from .images import decode_image
from .suffixes import ALL, IMAGES, VIDEO

__all__ = ["MOST_PIXELS", "VideoFile", "frames_in"]

Pixels = npt.NDArray[np.uint8]

MOST_PIXELS = 1 << 25  # per frame, 33 megapixels: 8K
MOST_BYTES = 1 << 30  # of one read, decoded
LATE = 2  # frames that may be missing at the end, as headers round durations: copies of the last frame replace them


class VideoFile:
    """An open video file, resampled to a given frame rate; a context manager.

    An output frame is the one displayed at its time, so files of variable frame rate are supported. The rotation and
    mirroring in the metadata are applied. An image file is a clip of one frame.

    Args:
        path: The file.
        frame_rate: Output frames per second; None keeps the file's (the mean if it varies).

    Attributes:
        frame_rate: Frames per second of the output; for an image the requested one, or 1.
        length: Number of frames at that rate.
        seconds: Duration in seconds; 0 for an image.
        height: Height of the displayed frames, in pixels.
        width: Width of the displayed frames, in pixels.
        is_image: Whether the file is an image.

    Raises:
        BadSample: The file can't be read as video, or has no frames.
    """

    def __init__(self, path: str | Source, frame_rate: float | None = None) -> None:
        self.path = to_source(path)
        self._file: Any = None
        self._image: Pixels | None = None
        self.is_image = _is_image(self.path)
        if self.is_image:
            self._image = decode_image(self.path)
            self.frame_rate, self.length, self.seconds = frame_rate or 1.0, 1, 0.0
            self.height, self.width = self._image.shape[:2]
            return
        with convert_errors(self.path):
            if isinstance(self.path, Path) and not stat.S_ISREG(self.path.stat().st_mode):
                raise BadSample(str(self.path), "not a regular file")
            self._av = import_av(self.path)
            self._file = open_media(self.path)
        # Reused: building its tables takes as long as decoding a small frame; `frame.reformat` builds them every time.
        self._scaler = self._av.video.reformatter.VideoReformatter()
        self._next = -1  # the frame after the last that was read
        self._decoded: Iterator[Any] = iter(())  # frames that follow
        self._ahead: Any = None  # the first of them, if it was decoded already
        self._shown: Any = None  # the frame displayed before them
        try:
            with convert_errors(self.path):
                self._look(frame_rate)
        except BadSample:
            self.close()
            raise

    def _look(self, frame_rate: float | None) -> None:
        """Set the attributes from the header and the first frame."""
        streams = [
            one for one in self._file.streams.video if not one.disposition & self._av.stream.Disposition.attached_pic
        ]
        if not streams:
            raise BadSample(str(self.path), "has no video frames")
        self._stream = stream = streams[0]
        context = stream.codec_context
        context.thread_count = 1  # with many workers, decoder threads starve, and some hang when they are stopped
        if context.width * context.height > MOST_PIXELS:
            raise BadSample(str(self.path), f"{context.width} x {context.height} pixels are too many")
        first = next(self._file.decode(stream), None)
        if first is None:
            raise BadSample(str(self.path), "has no video frames")
        rate = float(stream.average_rate or stream.guessed_rate or 0)
        self._base = Fraction(stream.time_base or Fraction(1, 1000))
        self._start = first.pts if first.pts is not None else 0
        self.seconds = seconds = self._seconds(rate)
        self._native = rate if 0 < rate <= 1000 else max(1.0, stream.frames / seconds if seconds else 1.0)
        self.frame_rate = frame_rate or self._native
        self.length = frames_in(seconds, self.frame_rate)
        shown = first.height, first.width
        self.height, self.width = shown[::-1] if _orientation(first).transposed else shown

    def _seconds(self, rate: float) -> float:
        """Return the duration of the file, from its header or else from its packets."""
        if self._stream.duration:
            return float(self._stream.duration * self._base)
        if self._stream.frames and rate:
            return float(self._stream.frames / rate)
        if self._file.duration:
            return float(self._file.duration / self._av.time_base)
        self._file.seek(0)
        ends = [one.pts + (one.duration or 0) for one in self._file.demux(self._stream) if one.pts is not None]
        return float((max(ends) - self._start) * self._base) if ends else 0.0

    def __enter__(self) -> "VideoFile":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the file."""
        if self._file is not None:
            self._file.close()

    def read(self, start: int = 0, frames: int | None = None, size: tuple[int, int] | None = None) -> Pixels:
        """Read a segment; one that follows the last read is decoded without seeking.

        Args:
            start: First frame, at the output frame rate.
            frames: Number of frames, fewer if the file ends before; None for all that follow.
            size: Height and width to which each frame is resized on decoding (bicubic), which saves memory;
                None keeps the file's.

        Returns:
            uint8 `(n, h, w, 3)`.

        Raises:
            BadSample: The segment can't be decoded, is damaged or too long, or decoding takes too long.
            ValueError: `start` is negative.
        """
        if start < 0:
            raise ValueError(f"start={start}: must not be negative")
        frames = max(0, self.length - start if frames is None else min(frames, self.length - start))
        height, width = size or (self.height, self.width)
        if frames * height * width * 3 > MOST_BYTES:
            raise BadSample(str(self.path), f"{frames} frames of {width} x {height} pixels are too many for one read")
        if self._image is not None:
            return _resize(self._image, height, width)[None].repeat(frames, 0)
        clip = np.empty((frames, height, width, 3), np.uint8)
        with convert_errors(self.path):
            done = self._fill(clip, start)
            if done < frames:
                if self._shown is None or start + done < self.length - LATE:
                    raise BadSample(str(self.path), f"ends after {start + done} of {self.length} frames")
                clip[done:] = self._convert(self._shown, (height, width))
        return clip

    def _fill(self, clip: Pixels, start: int) -> int:
        """Decode the frame displayed at each output time into `clip` `(n, h, w, 3)`; return the number decoded."""
        deadline = time.monotonic() + PATIENCE
        slack = 0.5 / self._native  # half a frame, as timestamps may be rounded up
        moments = [(start + number) / self.frame_rate + slack for number in range(len(clip))]
        if start != self._next:
            self._seek(moments[0] if moments else 0.0)
            self._decoded, self._ahead, self._shown = self._file.decode(self._stream), None, None
        self._next = start + len(clip)
        done, at = 0, 0.0 if self._shown is None else self._time(self._shown)
        while (frame := self._ahead or next(self._decoded, None)) is not None:
            self._ahead = None
            if time.monotonic() > deadline:
                raise BadSample(str(self.path), f"took longer than {PATIENCE:g} s to decode")
            at = self._time(frame)
            end = bisect_left(moments, at)
            if self._shown is not None and end > done:
                clip[done:end] = self._convert(self._shown, clip.shape[1:3])
                done = end
            if done == len(clip):
                self._ahead = frame
                return done
            if frame.is_corrupt:
                raise BadSample(str(self.path), f"damaged at {at:.2f} s")
            self._shown = frame
        end = bisect_right(moments, at + 1.5 / self._native)
        if self._shown is not None and end > done:
            clip[done:end] = self._convert(self._shown, clip.shape[1:3])
            done = end
        return done

    def _time(self, frame: Any) -> float:
        """Return a frame's time in seconds from the first frame's."""
        return 0.0 if frame.pts is None else float((frame.pts - self._start) * self._base)

    def _seek(self, seconds: float) -> None:
        """Seek to the last keyframe before a time."""
        target = self._start + int(max(0.0, seconds) / self._base)
        try:
            self._file.seek(target, stream=self._stream, backward=True)
        except self._av.error.FFmpegError:  # not seekable: decode from the beginning
            self._file.seek(0)

    def _convert(self, frame: Any, size: tuple[int, ...]) -> Pixels:
        """Convert a frame to RGB, make it upright, and resize it: `(h, w, 3)`."""
        upright = _orientation(frame)
        height, width = size[::-1] if upright.transposed else size
        pixels = self._scaler.reformat(frame, width, height, "rgb24", interpolation="BICUBIC", threads=1).to_ndarray()
        pixels = pixels.swapaxes(0, 1) if upright.transposed else pixels
        return np.asarray(pixels[:: -1 if upright.flips_rows else 1, :: -1 if upright.flips_columns else 1])


class _Orientation(NamedTuple):
    """How decoded rows and columns become displayed ones: transposed first, then reversed."""

    transposed: bool
    flips_rows: bool
    flips_columns: bool


def _orientation(frame: Any) -> _Orientation:
    """Return the orientation that is closest to a frame's display matrix.

    The matrix ((a, b), (c, d)) displays column x and row y in column a x + c y and row b x + d y (ISO/IEC 14496-12,
    section 6.2.2). Phones write rotations; front cameras and editors also mirror.
    """
    matrix = frame.side_data.get("DISPLAYMATRIX")
    if matrix is None:
        return _Orientation(False, False, False)
    a, b, _, c, d = struct.unpack("=5i", bytes(matrix)[:20])
    if abs(a) + abs(d) >= abs(b) + abs(c):
        return _Orientation(False, d < 0, a < 0)
    return _Orientation(True, b < 0, c < 0)


def frames_in(seconds: float, frame_rate: float) -> int:
    """Return the number of frames in a duration, max(1, floor(seconds * frame_rate + 1/2))."""
    return max(1, int(seconds * frame_rate + 0.5))


def _is_image(file: Source) -> bool:
    """Return whether a file is an image, by its suffix, or by its content if it has no known suffix."""
    suffix = file.suffix.lower()
    if suffix in ALL:
        return suffix in IMAGES and suffix not in VIDEO  # a GIF is a clip
    try:
        with Image.open(open_file(file)) as image:
            return image.format != "GIF"
    except Exception:  # not an image, or unreadable, which decoding reports
        return False


def _resize(image: Pixels, height: int, width: int) -> Pixels:
    if image.shape[:2] == (height, width):
        return image
    resized = Image.fromarray(image).resize((width, height), Image.Resampling.BICUBIC)
    return np.asarray(resized)
