"""Decode segments of video files, at a given frame rate and size."""

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
# FFmpeg also opens playlists, which name other files and URLs: only containers of video are allowed.
CONTAINERS = "mov,mp4,m4a,3gp,3g2,mj2,matroska,webm,avi,mpeg,mpegts,mpegvideo,h264,hevc,ogg,gif,flv,asf"
MOST_PIXELS = 1 << 25  # per frame, 33 megapixels: 8K
MOST_BYTES = 1 << 30  # of one read, decoded
PATIENCE = 60.0  # seconds that a read may take; a damaged file can keep a decoder busy forever
LATE = 2  # frames that may be missing at the end, as headers round durations: copies of the last frame replace them


class VideoFile:
    """An open video file, resampled to a given frame rate; a context manager.

    An output frame is the one displayed at its time, so files of variable frame rate are supported. The rotation in
    the metadata is applied. An image file is a clip of one frame.

    Args:
        path: The file.
        frame_rate: Output frames per second; None keeps the file's (the mean if it varies).

    Attributes:
        frame_rate: Frames per second of the output; for an image the requested one, or 1.
        length: Number of frames at that rate.
        seconds: Duration in seconds; 0 for an image.
        height: Height of the displayed frames, in pixels.
        width: Width of the displayed frames, in pixels.

    Raises:
        BadSample: The file can't be read as video, or has no frames.
    """

    def __init__(self, path: str | File, frame_rate: float | None = None) -> None:
        self.path: File = path if isinstance(path, Member) else Path(path)
        self._file: Any = None
        self._image: Tensor | None = None
        # Reused: building its tables takes as long as decoding a small frame; `frame.reformat` builds them every time.
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
        """Set the attributes from the header and the first frame."""
        streams = [one for one in self._file.streams.video if not one.disposition & av.stream.Disposition.attached_pic]
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
        """Close the file."""
        if self._file is not None:
            self._file.close()

    def read(self, start: int = 0, frames: int | None = None, size: tuple[int, int] | None = None) -> Tensor:
        """Read a segment.

        Args:
            start: First frame, at the output frame rate.
            frames: Number of frames, fewer if the file ends before; None for all that follow.
            size: Height and width to which each frame is resized on decoding (bicubic), which saves memory;
                None keeps the file's.

        Returns:
            uint8 `(3, n, h, w)`.

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
            return _resize(self._image, height, width)[:, None].expand(-1, frames, -1, -1).contiguous()
        clip = np.empty((frames, height, width, 3), np.uint8)
        with convert_errors(self.path):
            done = self._fill(clip, start)
        if done < frames - LATE or (frames and not done):
            raise BadSample(str(self.path), f"ends after {start + done} of {self.length} frames")
        clip[done:] = clip[done - 1 : done]
        return torch.from_numpy(clip).permute(3, 0, 1, 2).contiguous()  # (n, h, w, 3) -> (3, n, h, w)

    def _fill(self, clip: Pixels, start: int) -> int:
        """Decode the frame displayed at each output time into `clip` `(n, h, w, 3)`; return the number decoded."""
        deadline = time.monotonic() + PATIENCE
        slack = 0.5 / self._native  # half a frame, as timestamps may be rounded up
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
        """Seek to the last keyframe before a time."""
        target = self._start + int(max(0.0, seconds) / self._base)
        try:
            self._file.seek(target, stream=self._stream, backward=True)
        except av.error.FFmpegError:  # not seekable: decode from the beginning
            self._file.seek(0)

    def _convert(self, frame: av.VideoFrame, size: tuple[int, ...]) -> Pixels:
        """Convert a frame to RGB, rotate it upright, and resize it: `(h, w, 3)`."""
        turns = _turns(frame)
        height, width = size if turns % 2 == 0 else size[::-1]
        rgb = self._scaler.reformat(frame, width, height, "rgb24", interpolation="BICUBIC", threads=1)
        return np.rot90(rgb.to_ndarray(), turns)


def _turns(frame: av.VideoFrame) -> int:
    """Return the number of counterclockwise 90-degree rotations that bring a frame upright."""
    return round(frame.rotation / 90) % 4


def frames_in(seconds: float, frame_rate: float) -> int:
    """Return the number of frames in a duration, max(1, floor(seconds * frame_rate + 1/2))."""
    return max(1, int(seconds * frame_rate + 0.5))


def _resize(image: Tensor, height: int, width: int) -> Tensor:
    if image.shape[1:] == (height, width):
        return image
    frame = av.VideoFrame.from_ndarray(image.permute(1, 2, 0).contiguous().numpy(), format="rgb24")
    pixels = frame.reformat(width=width, height=height, interpolation="BICUBIC").to_ndarray()
    return torch.from_numpy(pixels).permute(2, 0, 1)  # (h, w, 3) -> (3, h, w)
