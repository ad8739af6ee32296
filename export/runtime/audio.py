"""Run an exported audio codec, with NumPy and ONNX Runtime."""

import math
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt

from varitok import UserError
from varitok.data.decoding.suffixes import AUDIO
from varitok.data.storage.members import File

from .bundle import Array, Bundle, product_of, tensors
from .files import SignalFile, open_input
from .streaming import DecodingStream, EncodingStream

__all__ = ["AudioBundle"]


class AudioBundle(Bundle):
    """An exported audio codec.

    Attributes:
        sample_rate: Sample rate of the audio, in Hz.
        downsample: Hop length: samples per token.

    Example:
        >>> bundle = varitok.load("audio_tokenizer")
        >>> wave = np.zeros(8000, np.float32)  # one second
        >>> codes = bundle.encode(wave, sample_rate=8000)
        >>> codes.shape, bundle.decode(codes).shape  # (b, codebooks, n), (b, c, t)
        ((1, 2, 200), (1, 1, 8000))
    """

    modality = "audio"
    counted = "samples"
    suffixes = AUDIO
    written = ("wav", "flac")
    sample_rate: int

    def _read(self) -> None:
        super()._read()
        self.sample_rate = int(self.config["sampling_rate"])
        self.downsample = int(self.config["hop_length"])
        self.hops = (self.downsample,)

    def __repr__(self) -> str:
        rate, sizes = self.sample_rate / self.downsample, product_of(self.codebook_sizes)
        return f"AudioBundle({str(self.folder)!r}: {self.sample_rate} Hz, {rate:g} tokens of {sizes} codes a second)"

    @tensors
    def encode(self, wave: Any, sample_rate: int, *, num_codebooks: int | None = None) -> Array:
        """Encode waveforms; zeros pad the last token's samples.

        Args:
            wave: float values in [-1, 1] or int16, `(t,)`, `(c, t)` or `(b, c, t)`.
            sample_rate: Sample rate of the waveform in Hz; resample it to the codec's rate first.
            num_codebooks: Number of codebooks to keep; all if None.

        Returns:
            int64 `(b, num_codebooks, n)`; float32 if codes are continuous. n is ceil(t / downsample), and the next
            multiple of `multiple`.

        Raises:
            UserError: The shape, type, a value or the sample rate is not supported.

        Example:
            >>> bundle.encode(np.zeros((2, 1, 8000)), 8000, num_codebooks=1).shape
            (2, 1, 200)
        """
        self._check_rate(sample_rate)
        kept = self.count_kept(num_codebooks)
        values = self.values(wave)
        if not values.size:
            raise UserError(f"wave: samples (batch, {self.channels}, 1 or more) are expected, got {np.shape(wave)}")
        return self.run_encoder(values)[:, :kept]

    def facts(self, size: tuple[int, ...], rate: float | None) -> tuple[int, ...]:
        """Return the sample rate."""
        return (self.sample_rate,)

    @contextmanager
    def open_file(self, path: File) -> Iterator[SignalFile]:
        """Open an audio file, resampled and mixed to the codec's rate and channels; see `AudioFile`."""
        from varitok.data.decoding.audio import AudioFile  # noqa: PLC0415 (arrays don't need it)

        with open_input(path) as source, AudioFile(source, self.sample_rate, self.channels) as sound:
            yield SignalFile(
                sound.length, lambda count: (one[None] for one in sound.chunks(count)), None, sound.changes
            )

    def write_file(
        self, chunks: Iterable[npt.NDArray[np.float32]], facts: tuple[int, ...], to: str, file: BinaryIO
    ) -> dict[str, Any]:
        """Write a 16-bit audio file."""
        import soundfile  # noqa: PLC0415 (arrays don't need it)

        written, form = 0, {"subtype": "PCM_16", "format": to, "closefd": False}
        try:
            # By its descriptor: libsndfile prints the errors of a Python file, such as a full disk.
            with soundfile.SoundFile(file.fileno(), "w", self.sample_rate, self.channels, **form) as sound:
                for wave in chunks:
                    # libsndfile rounds floats differently in each format.
                    sound.write(np.clip(np.rint(wave[0].T * 32768), -32768, 32767).astype(np.int16))
                    written += wave.shape[2]
        except (AssertionError, soundfile.LibsndfileError) as error:  # soundfile asserts that all is written
            raise UserError("the sound can't be written; is the disk full?") from error
        return {"seconds": round(written / self.sample_rate, 3)}

    def describe_signals(self) -> str:
        """Return the sample rate and channels."""
        return f"audio at {self.sample_rate} Hz, {self.channels} channels"

    def describe_rates(self) -> dict[str, Any]:
        """Return tokens per second, and kbit/s for each number of codebooks."""
        rate, whole = self.sample_rate / self.downsample, math.lcm(*self.codebook_strides)
        kept = range(1, len(self.codebook_sizes) + 1) or [None]
        bits = {f"{count or 'all'} codebooks": rate * self.bits(whole, count) / whole for count in kept}
        kilobits = {name: f"{each / 1000:.3f} kbit/s" for name, each in bits.items()}
        return {"tokens": f"{rate:g} a second", "rates": kilobits}

    def encoding(self, sample_rate: int, *, num_codebooks: int | None = None, batch: int = 1) -> EncodingStream:
        """Return a streaming encoder that accepts chunks of any number of samples.

        Its concatenated codes equal `encode` of the whole waveform.

        Args:
            sample_rate: Sample rate of the audio in Hz; it must be the codec's.
            num_codebooks: Number of codebooks to keep; all if None.
            batch: Number of waveforms encoded in parallel.

        Raises:
            UserError: The codec can't stream, or doesn't have this sample rate or number of codebooks.

        Example:
            >>> encode = bundle.encoding(8000)
            >>> [encode(chunk).shape[2] for chunk in np.zeros((3, 50))], encode.flush().shape[2]
            ([1, 1, 1], 1)
        """
        self._check_rate(sample_rate)
        return self.encoding_stream(num_codebooks, batch)

    def decoding(self, *, batch: int = 1) -> DecodingStream:
        """Return a streaming decoder; its concatenated output equals `decode` of all codes.

        Args:
            batch: Number of waveforms decoded in parallel.

        Raises:
            UserError: The codec can't stream.

        Example:
            >>> decode = bundle.decoding()
            >>> decode(np.zeros((1, 2, 3), np.int64)).shape, decode.flush().shape
            ((1, 1, 120), (1, 1, 0))
        """
        return self.decoding_stream(batch)

    def _check_rate(self, sample_rate: int) -> None:
        if sample_rate != self.sample_rate:
            raise UserError(
                f"sample_rate={sample_rate}: this codec takes {self.sample_rate} Hz; resample the audio first"
            )

    def values(self, wave: Any) -> npt.NDArray[np.float32]:
        """Convert waveforms, perhaps of zero samples, to float32 `(b, c, t)` in [-1, 1]."""
        values = np.asarray(wave)
        if values.dtype == np.int16:
            values = values.astype(np.float32) / np.float32(32768)
        if values.dtype.kind != "f":
            raise UserError(f"wave: floats in [-1, 1] or int16 are expected, got {values.dtype}")
        values = values.reshape((1,) * (3 - values.ndim) + values.shape) if values.ndim < 3 else values
        if values.ndim != 3 or values.shape[1] != self.channels or not values.shape[0]:
            raise UserError(f"wave: samples (batch, {self.channels}, 1 or more) are expected, got {np.shape(wave)}")
        if not np.abs(values).max(initial=0) <= 1 + 1e-3:  # also False for NaN
            raise UserError("wave: values must be numbers in [-1, 1]; some aren't")
        return values.astype(np.float32)
