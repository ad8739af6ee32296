"""Decode segments of audio files, at a given sample rate."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
import soundfile

from ..storage.members import Source, open_file, to_source
from .errors import BadSample, convert_errors
from .ffmpeg import import_av, open_media
from .resampling import resampled_length, resampler
from .suffixes import VIDEO

__all__ = ["MOST_SAMPLES", "AudioFile", "decode_audio"]

Floats = npt.NDArray[np.float32]
MOST_SAMPLES = 1 << 27  # of one read, over all channels: 512 MiB; headers can't be trusted
MOST_CHANNELS = 32
LEAST_RATE, MOST_RATE = 2_000, 768_000  # Hz; a header of 1 Hz would turn each sample into a second
LARGEST = 8.0  # largest peak of a float file; beyond it, the values can't be meant as [-1, 1]
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
        channels: Number of its channels.
        length: Number of samples at that rate; for some lossy files an estimate.

    Raises:
        BadSample: The file can't be read as audio, or is empty.
    """

    def __init__(self, path: str | Source, sample_rate: int | None = None, channels: int | None = None) -> None:
        self.path = to_source(path)
        with convert_errors(self.path):
            self._decoder = _open(self.path)
            try:
                _check(self.path, self._decoder)
            except BadSample:
                self._decoder.close()
                raise
        self.sample_rate = sample_rate or self._decoder.rate
        self.channels = channels or self._decoder.channels
        self.length = resampled_length(self._decoder.frames, self._decoder.rate, self.sample_rate)
        self._block = 0, np.zeros((self._decoder.channels, 0), np.float32)  # the last that was read, and its start

    @property
    def changes(self) -> str:
        """How the output differs from the file, such as "44100 Hz resampled to 16000 Hz"; empty if it doesn't."""
        rate, channels = self._decoder.rate, self._decoder.channels
        found = [f"{rate} Hz resampled to {self.sample_rate} Hz"] if rate != self.sample_rate else []
        if channels != self.channels:
            how = "averaged" if self.channels == 1 else f"copied to {self.channels}"
            how = f"cut to {self.channels}" if channels > self.channels > 1 else how
            found.append(f"{channels} channel{'s' * (channels > 1)} {how}")
        return ", ".join(found)

    def __enter__(self) -> "AudioFile":
        return self

    def __exit__(self, *_: object) -> None:
        self._decoder.close()

    def read(self, start: int = 0, frames: int | None = None) -> Floats:
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
        with convert_errors(self.path):
            sound = self._read(start, max(0, self.length - start if frames is None else frames))
            if not sound.shape[1]:
                raise BadSample(str(self.path), "no samples")
        return sound

    def chunks(self, frames: int) -> Iterator[Floats]:
        """Read the whole file, `frames` samples at a time; only the last chunk may be shorter.

        Unlike successive calls of `read`, it decodes the file in one pass.

        Raises:
            BadSample: See `read`; also a file without samples.
        """
        yield self.read(0, frames)
        for start in range(frames, self.length, frames):
            with convert_errors(self.path):
                sound = self._read(start, frames)
            if sound.shape[1]:
                yield sound

    def _read(self, start: int, frames: int) -> Floats:
        """Read a segment, perhaps of no samples."""
        frames = min(frames, max(0, self.length - start))
        change = resampler(self._decoder.rate, self.sample_rate)
        if change is None:
            sound = self._read_channels(start, frames)
        else:
            # Read whole periods of the two rates, so that resampling phases equal those of the whole file, plus
            # the kernel's half-width on either side.
            reach = -(-change.width // change.down)
            first = max(0, start // change.up - reach)
            last = (start + frames) // change.up + 1 + reach
            sound = change(self._read_channels(first * change.down, (last - first) * change.down))
            sound = sound[:, start - first * change.up :][:, :frames]
        return np.ascontiguousarray(sound.clip(-1, 1))

    def _read_channels(self, start: int, frames: int) -> Floats:
        """Read a segment at the file's own rate, mixed to the output channels."""
        decoder = self._decoder
        frames = max(0, min(frames, decoder.frames - start))
        if frames * decoder.channels > MOST_SAMPLES:
            raise BadSample(str(self.path), f"{frames / decoder.rate:.0f} s are too long to be read at once")
        raw = self._read_raw(start, frames)
        if decoder.exact and raw.shape[1] < frames:
            raise BadSample(str(self.path), f"ends after {start + raw.shape[1]} of {decoder.frames} samples")
        peak = float(np.abs(raw).max(initial=0))  # NaN if any value is
        if not np.isfinite(peak):
            raise BadSample(str(self.path), "contains values that are not finite")
        if peak > LARGEST:
            raise BadSample(str(self.path), f"contains values up to {peak:.3g}, not in [-1, 1]")
        if self.channels == 1 and len(raw) > 1:
            return np.asarray(raw.mean(0, keepdims=True))
        if self.channels > len(raw) == 1:
            return raw.repeat(self.channels, 0)
        if self.channels > len(raw):
            raise BadSample(str(self.path), f"{len(raw)} channels are fewer than {self.channels}")
        return raw[: self.channels]

    def _read_raw(self, start: int, frames: int) -> Floats:
        """Read a segment at the file's own rate; what the last segment contained isn't decoded again."""
        begin, block = self._block
        known = block[:, start - begin :][:, :frames] if begin <= start <= begin + block.shape[1] else block[:, :0]
        missing = frames - known.shape[1]
        if missing:
            known = np.concatenate([known, self._decoder.read(start + known.shape[1], missing)], 1)
        self._block = start, known
        return known


def decode_audio(
    path: str | Source,
    start: int = 0,
    frames: int | None = None,
    sample_rate: int | None = None,
    channels: int | None = None,
) -> Floats:
    """Read a segment of an audio file; see `AudioFile` and `AudioFile.read`."""
    with AudioFile(path, sample_rate, channels) as sound:
        return sound.read(start, frames)


def _open(path: Source) -> "_Decoder":
    """Open a file with libsndfile, or with FFmpeg if libsndfile doesn't support it."""
    if not _holds_something(path):
        raise BadSample(str(path), "an empty file")
    try:
        return _Libsndfile(path)
    except soundfile.LibsndfileError as error:
        try:
            return _FFmpeg(path)
        except import_av(path).error.InvalidDataError:
            reason = error.error_string.rstrip(".")
            raise BadSample(str(path), f"neither libsndfile nor FFmpeg knows this format ({reason})") from None


def _holds_something(path: Source) -> bool:
    """Return whether a file isn't empty; raise for a bad path, which libsndfile would report as "System error"."""
    if not isinstance(path, Path):  # not opened: over a network, it would be read twice
        return path.size > 0
    with path.open("rb") as file:
        return bool(file.read(1))


def _check(path: Source, decoder: "_Decoder") -> None:
    """Raise `BadSample` if the header has implausible values."""
    if decoder.frames < 1:
        raise BadSample(str(path), "no samples")
    if not 1 <= decoder.channels <= MOST_CHANNELS:
        raise BadSample(str(path), f"{decoder.channels} channels, not 1 to {MOST_CHANNELS}")
    if not LEAST_RATE <= decoder.rate <= MOST_RATE:
        raise BadSample(str(path), f"a sample rate of {decoder.rate} Hz, not {LEAST_RATE} to {MOST_RATE}")


class _Libsndfile:
    """An audio file opened by libsndfile.

    Attributes:
        rate: Sample rate in Hz.
        channels: Number of channels.
        frames: Samples per channel.
        exact: Whether `frames` is exact rather than an estimate.
    """

    def __init__(self, path: Source) -> None:
        self._file = soundfile.SoundFile(open_file(path))
        self.rate: int = self._file.samplerate
        self.channels: int = self._file.channels
        self.frames: int = self._file.frames
        self.exact = self._file.format not in ("MP3", "MPEG")  # these have no header with the length

    def read(self, start: int, frames: int) -> Floats:
        """Read a segment: `(channels, n)`, n < `frames` if the file ends before."""
        # MP3 frames use bits of earlier ones (bit reservoir): after a seek the decoder silently outputs zeros. And
        # soundfile seeks after every read.
        before = 0 if self.exact else min(start, round(PREROLL * self.rate))
        if start:
            self._file.seek(start - before)
        raw = np.asarray(self._file.read(before + frames, "float32", always_2d=True), np.float32)[before:]
        return raw.T

    def close(self) -> None:
        """Close the file."""
        self._file.close()


class _FFmpeg:
    """A file whose audio FFmpeg decodes; its length is the container's. Attributes: see `_Libsndfile`."""

    exact = False

    def __init__(self, path: Source) -> None:
        self._av = import_av(path)
        self._container: Any = open_media(path)
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
            seconds = (self._container.duration or 0) / self._av.time_base
        self.frames = round(seconds * self.rate)
        self._tick = float(stream.time_base) * self.rate
        self._first: int | None = None
        self._at = -1  # the sample after the last that was read
        self._blocks: Iterator[Floats] = iter(())  # those that follow, and the rest of the last one
        self._rest = np.zeros((self.channels, 0), np.float32)

    def _sound_of(self, path: Source) -> Any:
        """Return the audio stream; reject a video with an audio suffix, which is a mistake in the dataset."""
        streams = self._container.streams
        cover = self._av.stream.Disposition.attached_pic
        if path.suffix and path.suffix.lower() not in VIDEO and any(not s.disposition & cover for s in streams.video):
            raise BadSample(str(path), "a video with the suffix of an audio file")
        if not streams.audio:
            raise BadSample(str(path), "has no audio stream")
        if streams.audio[0].codec_context is None:
            raise BadSample(str(path), "its audio codec isn't supported by FFmpeg")
        # In some releases FFmpeg's threads deadlock if reading stops early; loader workers run in parallel instead.
        streams.audio[0].codec_context.thread_count = 1
        return streams.audio[0]

    def read(self, start: int, frames: int) -> Floats:
        """Read a segment `(channels, n)`; if it doesn't follow the last one, seek."""
        if start != self._at:
            self._blocks, self._rest = self._decode(start), self._rest[:, :0]
        parts, have = [self._rest[:, :frames]], min(frames, self._rest.shape[1])
        self._rest = self._rest[:, have:]
        while have < frames and (block := next(self._blocks, None)) is not None:
            parts.append(block[:, : frames - have])
            self._rest = block[:, frames - have :]
            have += parts[-1].shape[1]
        self._at = start + have
        return np.concatenate(parts, 1)

    def _decode(self, start: int) -> Iterator[Floats]:
        """Seek to before a sample, decode, and yield what begins at it in blocks."""
        stream = self._stream
        begin = stream.start_time or 0
        # May be negative: after a seek to exactly the beginning, Matroska loses the first frame.
        before = start / self.rate - PREROLL
        if before > 0 and self._tick > 1 and self._first is None:
            self._container.seek(begin - round(PREROLL / stream.time_base), stream=stream)
            self._first = next((frame.samples for frame in self._container.decode(stream)), None)
        target = begin + round(before / stream.time_base)
        # Raw AAC has no start time, and no negative ones.
        self._container.seek(max(0, target) if stream.start_time is None else target, stream=stream)
        # Interleaved: with more than 8 planes, PyAV 18 reads those beyond the eighth out of bounds.
        interleaved = self._av.AudioResampler(format="flt", layout=stream.layout, rate=stream.rate)
        at = None
        for decoded in self._container.decode(stream):
            at = self._locate(decoded, begin, at)
            for frame in interleaved.resample(decoded):
                block = np.asarray(frame.to_ndarray(), np.float32).reshape(-1, self.channels).T
                wanted = block[:, max(0, start - at) :]
                at += block.shape[1]
                if wanted.shape[1]:
                    start += wanted.shape[1]
                    yield wanted

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


_Decoder: TypeAlias = _Libsndfile | _FFmpeg
