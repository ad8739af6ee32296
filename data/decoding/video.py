"""Files of clips of any kind: only the stretch that is wanted is decoded, at the rate and size that are wanted."""

import stat
import time
from bisect import bisect_left, bisect_right
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
import numpy.typing as npt
import torch
from av.video.reformatter import VideoReformatter
from torch import Tensor

from ..batch import BadSample, convert_errors
from ..storage.members import File, Member, open_file
from .images import SUFFIXES as IMAGE_SUFFIXES
from .images import decode_image

__all__ = ["MOST_PIXELS", "SUFFIXES", "VideoFile", "frames_in"]

Pixels = npt.NDArray[np.uint8]

SUFFIXES = (".mp4", ".m4v", ".mov", ".mkv", ".webm", ".avi", ".mpg", ".mpeg", ".ts", ".3gp", ".ogv", ".gif")
# FFmpeg also opens play lists, which name other files and addresses: only what holds frames itself is allowed.
CONTAINERS = "mov,mp4,m4a,3gp,3g2,mj2,matroska,webm,avi,mpeg,mpegts,mpegvideo,h264,hevc,ogg,gif,flv,asf"
MOST_PIXELS = 1 << 25  # of a frame, 33 megapixels: 8K
MOST_BYTES = 1 << 30  # of a stretch, as it is given
PATIENCE = 60.0  # seconds that a stretch may take; a damaged file can keep a decoder busy without end
LATE = 2  # frames that a file may lack at its end, since headers round: the last one stands in for them


class VideoFile:
    """A file of frames, open, at the frame rate that is wanted; a context manager.

    A frame is the one that is shown at its moment, so that files of variable frame rate are understood. Phones'
    rotation is applied. An image file is a clip of one frame.

    Args:
        path: The file.
        frame_rate: Frames a second; None keeps the file's (its mean, where it varies).

    Attributes:
        frame_rate: Frame rate of the output; of an image the requested one, or 1.
        length: Frames at that rate.
        seconds: How long it is; an image 0.
        height: Height of the displayed frames, in pixels.
        width: Width of the displayed frames, in pixels.

    Raises:
        BadSample: The file can't be read as frames, or holds none.
    """

    def __init__(self, path: str | File, frame_rate: float | None = None) -> None:
        self.path: File = path if isinstance(path, Member) else Path(path)
        self._file: Any = None
        self._image: Tensor | None = None
        # Kept, for its tables take as long to make as a small frame to decode; PyAV's own of a frame is new each time.
        self._scaler = VideoReformatter()
        suffix = self.path.suffix.lower()
        if suffix in IMAGE_SUFFIXES and suffix not in SUFFIXES:  # a GIF is a clip
            self._image = decode_image(self.path)
            self.frame_rate, self.length, self.seconds = frame_rate or 1.0, 1, 0.0
            self.height, self.width = self._image.shape[1:]
            return
        with convert_errors(self.path):
            if isinstance(self.path, Path) and not stat.S_ISREG(self.path.stat().st_mode):
                raise BadSample(str(self.path), "not a regular file")
            options = {"format_whitelist": CONTAINERS}
            self._file = av.open(open_file(self.path), options=options, timeout=PATIENCE)
        try:
            with convert_errors(self.path):
                self._look(frame_rate)
        except BadSample:
            self.close()
            raise

    def _look(self, frame_rate: float | None) -> None:
        """Find out what there is, from the header and the first frame."""
        streams = [one for one in self._file.streams.video if not one.disposition & av.stream.Disposition.attached_pic]
        if not streams:
            raise BadSample(str(self.path), "holds no frames")
        self._stream = stream = streams[0]
        context = stream.codec_context
        context.thread_count = 1  # threads of many workers' decoders starve, and some hang when they are stopped
        if context.width * context.height > MOST_PIXELS:
            raise BadSample(str(self.path), f"{context.width} x {context.height} pixels are too many")
        first = next(self._file.decode(stream), None)
        if first is None:
            raise BadSample(str(self.path), "holds no frames")
        rate = float(stream.average_rate or stream.guessed_rate or 0)
        self._base = Fraction(stream.time_base or Fraction(1, 1000))
        self._start = first.pts if first.pts is not None else 0
        self.seconds = seconds = self._seconds(rate)
        self._native = rate if 0 < rate <= 1000 else max(1.0, stream.frames / seconds if seconds else 1.0)
        self.frame_rate = frame_rate or self._native
        self.length = frames_in(seconds, self.frame_rate)
        shown = first.height, first.width
        self.height, self.width = shown if _turns(first) % 2 == 0 else shown[::-1]

    def _seconds(self, rate: float) -> float:
        """Return the duration of the file, from its header or else from its packets."""
        if self._stream.duration:
            return float(self._stream.duration * self._base)
        if self._stream.frames and rate:
            return float(self._stream.frames / rate)
        if self._file.duration:
            return float(self._file.duration / av.time_base)
        self._file.seek(0)
        ends = [one.pts + (one.duration or 0) for one in self._file.demux(self._stream) if one.pts is not None]
        return float((max(ends) - self._start) * self._base) if ends else 0.0

    def __enter__(self) -> "VideoFile":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Let go of the file."""
        if self._file is not None:
            self._file.close()

    def read(self, start: int = 0, frames: int | None = None, size: tuple[int, int] | None = None) -> Tensor:
        """Read a stretch.

        Args:
            start: First frame, at the frame rate that is wanted.
            frames: How many; None for all that follow. Where the file ends before, there are fewer.
            size: Height and width that each frame is resized to as it is decoded (bicubic), so that a stretch of large
                frames needs little memory; None keeps them.

        Returns:
            uint8 `(3, n, h, w)`.

        Raises:
            BadSample: What is there can't be decoded, is damaged, too long, or takes too long.
            ValueError: `start` is negative.
        """
        if start < 0:
            raise ValueError(f"start={start}: must not be negative")
        frames = max(0, self.length - start if frames is None else min(frames, self.length - start))
        height, width = size or (self.height, self.width)
        if frames * height * width * 3 > MOST_BYTES:
            raise BadSample(str(self.path), f"{frames} frames of {width} x {height} pixels are too many for one read")
        if self._image is not None:
            return _resize(self._image, height, width)[:, None].expand(-1, frames, -1, -1).contiguous()
        clip = np.empty((frames, height, width, 3), np.uint8)
        with convert_errors(self.path):
            done = self._fill(clip, start)
        if done < frames - LATE or (frames and not done):
            raise BadSample(str(self.path), f"ends after {start + done} of {self.length} frames")
        clip[done:] = clip[done - 1 : done]
        return torch.from_numpy(clip).permute(3, 0, 1, 2).contiguous()

    def _fill(self, clip: Pixels, start: int) -> int:
        """Decode the displayed frame at each output time; return how many there were."""
        deadline = time.monotonic() + PATIENCE
        slack = 0.5 / self._native  # a frame's time may be rounded up to half a frame late
        moments = [(start + number) / self.frame_rate + slack for number in range(len(clip))]
        self._seek(moments[0] if moments else 0.0)
        last: av.VideoFrame | None = None
        done, at = 0, 0.0
        for frame in self._file.decode(self._stream):
            if time.monotonic() > deadline:
                raise BadSample(str(self.path), f"took longer than {PATIENCE:g} s to decode")
            at = 0.0 if frame.pts is None else float((frame.pts - self._start) * self._base)
            end = bisect_left(moments, at)
            if last is not None and end > done:
                clip[done:end] = self._convert(last, clip.shape[1:3])
                done = end
            if done == len(clip):
                return done
            if frame.is_corrupt:
                raise BadSample(str(self.path), f"damaged at {at:.2f} s")
            last = frame
        end = bisect_right(moments, at + 1.5 / self._native)
        if last is not None and end > done:
            clip[done:end] = self._convert(last, clip.shape[1:3])
            done = end
        return done

    def _seek(self, seconds: float) -> None:
        """Go to the last key frame before a moment."""
        target = self._start + int(max(0.0, seconds) / self._base)
        try:
            self._file.seek(target, stream=self._stream, backward=True)
        except av.error.FFmpegError:  # what can't be sought is read from its beginning
            self._file.seek(0)

    def _convert(self, frame: av.VideoFrame, size: tuple[int, ...]) -> Pixels:
        """Return a frame upright, in RGB, resized."""
        turns = _turns(frame)
        height, width = size if turns % 2 == 0 else size[::-1]
        rgb = self._scaler.reformat(frame, width, height, "rgb24", interpolation="BICUBIC", threads=1)
        return np.rot90(rgb.to_ndarray(), turns)


def _turns(frame: av.VideoFrame) -> int:
    """Return the counterclockwise quarter turns that bring a frame upright."""
    return round(frame.rotation / 90) % 4


def frames_in(seconds: float, frame_rate: float) -> int:
    """Count the frames of a time: n at r a second last n / r; half a frame is left to rounding."""
    return max(1, int(seconds * frame_rate + 0.5))


def _resize(image: Tensor, height: int, width: int) -> Tensor:
    if image.shape[1:] == (height, width):
        return image
    frame = av.VideoFrame.from_ndarray(image.permute(1, 2, 0).contiguous().numpy(), format="rgb24")
    pixels = frame.reformat(width=width, height=height, interpolation="BICUBIC").to_ndarray()
    return torch.from_numpy(pixels).permute(2, 0, 1)
