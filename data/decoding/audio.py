"""Decode segments of audio files, at a given sample rate."""

from fractions import Fraction
from functools import lru_cache
from pathlib import Path
from typing import Any, TypeAlias

import av
import numpy as np
import numpy.typing as npt
import soundfile
import torch
from torch import Tensor
from torchaudio.transforms import Resample

from ..batch import BadSample, convert_errors
from ..storage.members import File, Member, open_file

__all__ = ["MOST_SAMPLES", "SUFFIXES", "AudioFile", "decode_audio", "resampled_length"]

Floats = npt.NDArray[np.float32]
SUFFIXES = (
    ".wav", ".flac", ".ogg", ".opus", ".mp3", ".m4a", ".aac", ".aif", ".aiff", ".au", ".caf", ".wma", ".w64", ".webm",
    ".mp4", ".mkv", ".mov",
)  # fmt: skip
MOST_SAMPLES = 1 << 27  # of one read, over all channels: 512 MiB; headers can't be trusted
MOST_CHANNELS = 32
LEAST_RATE, MOST_RATE = 2_000, 768_000  # Hz; a header of 1 Hz would turn each sample into a second
LARGEST = 8.0  # largest peak of a float file; beyond it, the values can't be meant as [-1, 1]
FINEST_RATIO = 512  # largest denominator of a resampling ratio; torchaudio takes 80 s and 11 GB for 44,101 to 16,000 Hz
VIDEO_SUFFIXES = (".mp4", ".webm", ".mkv", ".mov", ".avi", ".m4v", ".mpg", ".mpeg", ".ts", ".3gp", ".ogv")
# FFmpeg also opens playlists, which name other files and URLs: only containers of audio are allowed.
CONTAINERS = "mov,mp4,m4a,3gp,3g2,mj2,matroska,webm,aac,mp3,ogg,flac,wav,w64,aiff,asf,avi,mpeg,mpegts,ac3,eac3,amr,caf"
PREROLL = 0.5  # seconds decoded before the requested segment, until a lossy decoder's state has settled


class AudioFile:
    """An open audio file, resampled and mixed to a given sample rate and number of channels; a context manager.

    libsndfile reads WAV, FLAC, OGG, MP3 and more; FFmpeg reads the rest (AAC, WMA, audio of videos). For mono output,
    all channels are averaged. A mono file is copied to all output channels. Otherwise surplus channels are dropped.
    Values above 1 (lossy decoders and resampling overshoot) are clipped.

    Args:
        path: The file.
        sample_rate: Output sample rate in Hz; None keeps the file's.
        channels: Number of output channels; None keeps the file's.

    Attributes:
        sample_rate: Sample rate of the output, in Hz.
        length: Number of samples at that rate; for some lossy files an estimate.

    Raises:
        BadSample: The file can't be read as audio, or is empty.
    """

    def __init__(self, path: str | File, sample_rate: int | None = None, channels: int | None = None) -> None:
        self.path: File = path if isinstance(path, Member) else Path(path)
        with convert_errors(self.path):
            self._source = _open(self.path)
            try:
                _check(self.path, self._source)
            except BadSample:
                self._source.close()
                raise
        self.sample_rate = sample_rate or self._source.rate
        self.channels = channels or self._source.channels
        ratio = _ratio(self._source.rate, self.sample_rate)
        self._down, self._up = ratio.denominator, ratio.numerator
        self.length = resampled_length(self._source.frames, self._source.rate, self.sample_rate)

    def __enter__(self) -> "AudioFile":
        return self

    def __exit__(self, *_: object) -> None:
        self._source.close()

    def read(self, start: int = 0, frames: int | None = None) -> Tensor:
        """Read a segment; its samples equal those of the whole file at that place.

        Args:
            start: First sample, at the output sample rate.
            frames: Number of samples, fewer if the file ends before; None for all that follow.

        Returns:
            float32 `(channels, n)` in [-1, 1].

        Raises:
            BadSample: The segment can't be decoded, isn't finite, or is too long.
            ValueError: `start` is negative.
        """
        if start < 0:
            raise ValueError(f"start={start}: must not be negative")
        frames = max(0, self.length - start if frames is None else min(frames, self.length - start))
        with convert_errors(self.path):
            if self._down == self._up:
                sound = self._read_channels(start, frames)
            else:
                resampler = _resampler(self._down, self._up)
                # Read whole periods of the two rates, so that resampling phases equal those of the whole file, plus
                # the kernel's half-width on either side.
                reach = -(-resampler.width // self._down)
                first = max(0, start // self._up - reach)
                last = (start + frames) // self._up + 1 + reach
                sound = resampler(self._read_channels(first * self._down, (last - first) * self._down))
                sound = sound[:, start - first * self._up :][:, :frames]
            if not sound.shape[1]:
                raise BadSample(str(self.path), "no samples")
        return sound.clamp(-1, 1)

    def _read_channels(self, start: int, frames: int) -> Tensor:
        """Read a segment at the file's own rate, mixed to the output channels."""
        source = self._source
        frames = min(frames, source.frames - start)
        if frames * source.channels > MOST_SAMPLES:
            raise BadSample(str(self.path), f"{frames / source.rate:.0f} s are too long to be read at once")
        raw = source.read(start, frames)
        if source.exact and raw.shape[1] < frames:
            raise BadSample(str(self.path), f"ends after {start + raw.shape[1]} of {source.frames} samples")
        if not raw.shape[1]:
            raise BadSample(str(self.path), "no samples")
        peak = float(np.abs(raw).max(initial=0))  # NaN if any value is
        if not np.isfinite(peak):
            raise BadSample(str(self.path), "contains values that are not finite")
        if peak > LARGEST:
            raise BadSample(str(self.path), f"contains values up to {peak:.3g}, not in [-1, 1]")
        if self.channels == 1 and len(raw) > 1:
            raw = raw.mean(0, keepdims=True)
        elif self.channels < len(raw):
            raw = raw[: self.channels]
        elif self.channels > len(raw) == 1:
            raw = raw.repeat(self.channels, 0)
        elif self.channels > len(raw):
            raise BadSample(str(self.path), f"{len(raw)} channels are fewer than {self.channels}")
        return torch.from_numpy(np.ascontiguousarray(raw))


def resampled_length(samples: int, rate: int, wanted: int) -> int:
    """Return the length of `samples` samples at `rate` after resampling to `wanted`, ceil(samples * wanted / rate)."""
    ratio = _ratio(rate, wanted)
    return -(-samples * ratio.numerator // ratio.denominator)


def _ratio(rate: int, wanted: int) -> Fraction:
    return Fraction(wanted, rate).limit_denominator(FINEST_RATIO)


def decode_audio(
    path: str | File,
    start: int = 0,
    frames: int | None = None,
    sample_rate: int | None = None,
    channels: int | None = None,
) -> Tensor:
    """Read a segment of an audio file; see `AudioFile` and `AudioFile.read`."""
    with AudioFile(path, sample_rate, channels) as sound:
        return sound.read(start, frames)


def _open(path: File) -> "_Source":
    """Open a file with libsndfile, or with FFmpeg if libsndfile doesn't support it."""
    if not _holds_something(path):
        raise BadSample(str(path), "an empty file")
    try:
        return _Libsndfile(path)
    except soundfile.LibsndfileError as error:
        try:
            return _FFmpeg(path)
        except av.error.InvalidDataError:
            reason = error.error_string.rstrip(".")
            raise BadSample(str(path), f"neither libsndfile nor FFmpeg knows this format ({reason})") from None


def _holds_something(path: File) -> bool:
    """Return whether a file isn't empty; raise for a bad path, which libsndfile would report as "System error"."""
    if isinstance(path, Member):  # not opened: over a network, it would be read twice
        return path.size > 0
    with path.open("rb") as file:
        return bool(file.read(1))


def _check(path: File, source: "_Source") -> None:
    """Raise `BadSample` if the header has implausible values."""
    if source.frames < 1:
        raise BadSample(str(path), "no samples")
    if not 1 <= source.channels <= MOST_CHANNELS:
        raise BadSample(str(path), f"{source.channels} channels, not 1 to {MOST_CHANNELS}")
    if not LEAST_RATE <= source.rate <= MOST_RATE:
        raise BadSample(str(path), f"a sample rate of {source.rate} Hz, not {LEAST_RATE} to {MOST_RATE}")


@lru_cache(maxsize=8)
def _resampler(down: int, up: int) -> Resample:
    """Return a cached resampler; its parameters are torchaudio's for "kaiser_best"."""
    return Resample(
        down,
        up,
        resampling_method="sinc_interp_kaiser",
        lowpass_filter_width=64,
        rolloff=0.9475937167399596,
        beta=14.769656459379492,
    )


class _Libsndfile:
    """An audio file opened by libsndfile.

    Attributes:
        rate: Sample rate in Hz.
        channels: Number of channels.
        frames: Samples per channel.
        exact: Whether `frames` is exact rather than an estimate.
    """

    def __init__(self, path: File) -> None:
        self._file = soundfile.SoundFile(open_file(path))
        self.rate: int = self._file.samplerate
        self.channels: int = self._file.channels
        self.frames: int = self._file.frames
        self.exact = self._file.format not in ("MP3", "MPEG")  # these have no header with the length

    def read(self, start: int, frames: int) -> Floats:
        """Read a segment: `(channels, n)`, n < `frames` if the file ends before."""
        # MP3 frames use bits of earlier ones (bit reservoir): right after a seek the decoder silently outputs zeros.
        before = 0 if self.exact else min(start, round(PREROLL * self.rate))
        if start:
            self._file.seek(start - before)
        return np.asarray(self._file.read(before + frames, "float32", always_2d=True), np.float32).T[:, before:]

    def close(self) -> None:
        """Close the file."""
        self._file.close()


class _FFmpeg:
    """A file whose audio FFmpeg decodes; its length is the container's. Attributes: see `_Libsndfile`."""

    exact = False

    def __init__(self, path: File) -> None:
        options = {"format_whitelist": CONTAINERS, "protocol_whitelist": "file"}
        self._container: Any = av.open(open_file(path), options=options)
        try:
            self._stream = self._sound_of(path)
        except BaseException:
            self._container.close()
            raise
        stream = self._stream
        self.rate: int = stream.rate
        self.channels: int = stream.channels
        if stream.duration is not None:
            seconds = float(stream.duration * stream.time_base)
        else:
            seconds = (self._container.duration or 0) / av.time_base
        self.frames = round(seconds * self.rate)
        self._tick = float(stream.time_base) * self.rate
        self._first: int | None = None

    def _sound_of(self, path: File) -> Any:
        """Return the audio stream; reject a video with an audio suffix, which is a mistake in the dataset."""
        streams = self._container.streams
        cover = av.stream.Disposition.attached_pic
        if path.suffix.lower() not in VIDEO_SUFFIXES and any(not s.disposition & cover for s in streams.video):
            raise BadSample(str(path), "a video with the suffix of an audio file")
        if not streams.audio:
            raise BadSample(str(path), "has no audio stream")
        if streams.audio[0].codec_context is None:
            raise BadSample(str(path), "its audio codec isn't supported by FFmpeg")
        # In some releases FFmpeg's threads deadlock if reading stops early; loader workers run in parallel instead.
        streams.audio[0].codec_context.thread_count = 1
        return streams.audio[0]

    def read(self, start: int, frames: int) -> Floats:
        """Read a segment `(channels, n)`: seek to before its start, decode, and trim."""
        stream = self._stream
        begin = stream.start_time or 0
        # May be negative: after a seek to exactly the beginning, Matroska loses the first frame.
        before = start / self.rate - PREROLL
        if before > 0 and self._tick > 1 and self._first is None:
            self._container.seek(begin - round(PREROLL / stream.time_base), stream=stream)
            self._first = next((frame.samples for frame in self._container.decode(stream)), None)
        self._container.seek(begin + round(before / stream.time_base), stream=stream)
        # Interleaved: with more than 8 planes, PyAV 18 reads those beyond the eighth out of bounds.
        interleaved = av.AudioResampler(format="flt", layout=stream.layout, rate=stream.rate)
        parts: list[Floats] = []
        have, at = 0, None
        for decoded in self._container.decode(stream):
            at = self._locate(decoded, begin, at)
            for frame in interleaved.resample(decoded):
                part = np.asarray(frame.to_ndarray(), np.float32).reshape(-1, self.channels).T
                wanted = part[:, max(0, start + have - at) :][:, : frames - have]
                at += part.shape[1]
                if wanted.shape[1]:
                    parts.append(wanted)
                    have += wanted.shape[1]
            if have >= frames:
                break
        return np.concatenate(parts, 1) if parts else np.zeros((self.channels, 0), np.float32)

    def _locate(self, decoded: Any, begin: int, counted: int | None) -> int:
        """Return the index of a frame's first sample; Matroska rounds times to milliseconds, so counting has priority.

        `begin` is the time of the first frame, `counted` the end of the previous one in samples, None after a seek.
        """
        if decoded.pts is None:
            return counted or 0
        timed = round(float((decoded.pts - begin) * self._stream.time_base) * self.rate)
        if counted is not None:
            return counted if abs(timed - counted) <= 2 * self._tick else timed
        if timed and self._first is not None:  # all frames have one size, except the first, which may be shorter
            whole = self._first + round((timed - self._first) / decoded.samples) * decoded.samples
            return whole if abs(whole - timed) <= self._tick else timed
        return timed

    def close(self) -> None:
        """Close the file."""
        self._container.close()


_Source: TypeAlias = _Libsndfile | _FFmpeg
