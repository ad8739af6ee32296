"""Classical audio codecs: Opus and MP3, encoded by FFmpeg and decoded by libsndfile; codec2.

Encoder delay and padding are removed, so that decoded samples are aligned with the original.
"""

from dataclasses import dataclass, replace
from io import BytesIO
from typing import Any

import av
import soundfile
import torch
from torch import Tensor

from varitok.codecs.metrics.audio import round_to_16_bits
from varitok.data.decoding.audio import decode_audio
from varitok.data.storage.members import InMemory

from .classic import ClassicalCodec, Coded
from .codec2 import Codec2

__all__ = ["CODECS", "AudioCodec", "versions"]


@dataclass(frozen=True)
class AudioCodec(ClassicalCodec):
    """A classical audio codec. Settings are bitrates in kbit/s.

    Attributes:
        container: FFmpeg's name of the container.
        rates: Supported sample rates, in Hz.
        level: Gain of the encoder; decoded audio is divided by it.
    """

    container: str
    rates: tuple[int, ...]
    level: float = 1.0

    @property
    def about(self) -> str:
        """Encoder, options, payload and gain, for the table's header."""
        return super().about + ("" if self.level == 1 else f"; the encoder's gain of {self.level:g} undone")

    def obstacle(self, rate: float, channels: int) -> str:
        """Return why sounds can't be coded: no encoder in this PyAV, not mono, or a rate that it doesn't support."""
        if self.encoder not in av.codecs_available:
            return f"this PyAV has no {self.encoder}"
        known = rate in self.rates and channels == 1
        return "" if known else f"codes one channel of {', '.join(map(str, self.rates))} Hz"

    def code(self, signal: Tensor, setting: int, rate: float = 0) -> Coded:
        """Encode a waveform `(1, t)` at `setting` kbit/s, and decode it."""
        file, payload = self.encode(signal, setting, int(rate))
        return Coded(len(file), payload, round_to_16_bits(self.decode(file, signal.shape[1])))

    def encode(self, sound: Tensor, kbps: int, sample_rate: int, **options: str) -> tuple[bytes, int]:
        """Encode a waveform, rounded to 16 bits.

        Args:
            sound: Waveform `(1, t)` in [-1, 1].
            kbps: Bitrate in kbit/s.
            sample_rate: Sample rate in Hz, one that the codec supports.
            options: Replacements for the codec's own, such as Opus' `application`, "audio" or "voip" for speech.

        Returns:
            The file, and the total size of its packets in bytes.
        """
        samples = round_to_16_bits(sound).mul(32768).to(torch.int16).numpy()
        frame = av.AudioFrame.from_ndarray(samples, format="s16", layout="mono")
        frame.sample_rate, frame.pts = sample_rate, 0
        buffer, payload = BytesIO(), 0
        # Reproducible files: no version of FFmpeg, and no random serial number.
        with av.open(buffer, "w", format=self.container, container_options={"fflags": "+bitexact"}) as container:
            every = {**self.options, **options}
            stream: Any = container.add_stream(self.encoder, rate=sample_rate, layout="mono", options=every)
            stream.bit_rate = 1000 * kbps
            for given in (frame, None):  # None flushes the encoder
                for packet in stream.encode(given):
                    payload += packet.size
                    container.mux(packet)
        return buffer.getvalue(), payload

    def decode(self, file: bytes, samples: int) -> Tensor:
        """Decode a file of `encode` to a waveform float32 `(1, samples)` at the original sample rate.

        libsndfile decodes Opus at that rate; FFmpeg would decode at 48 kHz, and resampling back cuts off the highest
        frequencies. It also removes the delay and padding that Ogg's and LAME's headers declare.

        Raises:
            ValueError: The file has fewer samples.
        """
        sound = decode_audio(InMemory(self.name, file))  # (1, t)
        if sound.shape[1] < samples:
            raise ValueError(f"{sound.shape[1]} of {samples} samples were decoded")
        # Very short audio decodes to slightly more samples.
        return torch.from_numpy(sound[:, :samples] / self.level)


OPUS = AudioCodec(
    "Opus",
    "libopus",
    (6, 8, 12, 16, 24, 32, 64),
    {"vbr": "on", "compression_level": "10", "frame_duration": "20", "application": "audio"},
    "Opus packets, with the encoder's padding at both ends; without Ogg's pages and its two headers",
    "ogg",
    (8_000, 12_000, 16_000, 24_000, 48_000),
)
# Its least rates for speech: asked for 4 kbit/s or less it takes 3.8, and long frames have less overhead.
LOW = {**OPUS.options, "frame_duration": "60", "application": "voip"}
CODECS: tuple[ClassicalCodec, ...] = (
    OPUS,
    replace(OPUS, name="Opus 60 ms", settings=(4, 5, 6, 8), options=LOW),
    AudioCodec(
        "MP3",
        "libmp3lame",
        (32, 48, 64, 96, 128),
        {"compression_level": "3"},  # LAME's default; 0, its slowest, is worse by every metric at 16 kHz
        "frames with their headers, which decoding needs, and the encoder's padding at both ends; without LAME's tag",
        "mp3",
        (8_000, 11_025, 12_000, 16_000, 22_050, 24_000, 32_000, 44_100, 48_000),
        0.95,  # LAME attenuates its input against clipping, which spectral distances would count as an error
    ),
    Codec2(
        "codec2",
        "c2enc",
        (700, 1200, 1400, 1600, 2400, 3200),
        {},
        "whole bytes a frame, with the padding at the end; without the header of 7 bytes; sound of 8 kHz",
    ),
)


def versions() -> str:
    """Return the names and versions of the libraries."""
    libavcodec = ".".join(map(str, av.library_versions["libavcodec"]))
    return f"PyAV {av.__version__} (libavcodec {libavcodec}), libsndfile {soundfile.__libsndfile_version__}"
