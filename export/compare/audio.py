"""Classical codecs of sounds: Opus and MP3, by FFmpeg's encoders; libsndfile decodes.

What a coder puts before a sound or after it is taken away, so that all samples are back at their places.
"""

from dataclasses import dataclass
from io import BytesIO
from typing import Any

import av
import soundfile
import torch
from torch import Tensor

from varitok.codecs.metrics.audio import round_to_16_bits

from .classic import ClassicalCodec, Coded

__all__ = ["CODECS", "AudioCodec", "versions"]


@dataclass(frozen=True)
class AudioCodec(ClassicalCodec):
    """A classical codec of sounds. Settings are kbit/s.

    Attributes:
        container: What its packets are put into.
        rates: The sample rates that it codes, in Hz.
        level: What a decoded sound is divided by.
    """

    container: str
    rates: tuple[int, ...]
    level: float = 1.0

    @property
    def about(self) -> str:
        """What does the work."""
        return super().about + ("" if self.level == 1 else f"; the coder's level of {self.level:g} undone")

    def accepts(self, rate: float, channels: int) -> bool:
        """Return whether this PyAV has it, and it codes such sounds."""
        return self.encoder in av.codecs_available and rate in self.rates and channels == 1

    def code(self, signal: Tensor, setting: int, rate: float = 0) -> Coded:
        """Encode a sound `(1, t)` at `setting` kbit/s, and decode it."""
        file, payload = self.encode(signal, setting, int(rate))
        return Coded(len(file), payload, round_to_16_bits(self.decode(file, signal.shape[1])))

    def encode(self, sound: Tensor, kbps: int, sample_rate: int, **options: str) -> tuple[bytes, int]:
        """Code a sound `(1, t)`, of values that 16 bits hold.

        Args:
            sound: The sound.
            kbps: kbit/s.
            sample_rate: In Hz, one of the codec's.
            options: In the place of the codec's own, such as Opus' `application`, "audio" or "voip" for speech.

        Returns:
            The file, and the bytes of the coder's packets in it.
        """
        samples = round_to_16_bits(sound).mul(32768).to(torch.int16).numpy()
        frame = av.AudioFrame.from_ndarray(samples, format="s16", layout="mono")
        frame.sample_rate, frame.pts = sample_rate, 0
        buffer, payload = BytesIO(), 0
        # Without FFmpeg's version and a drawn serial number, a file is the same each time.
        with av.open(buffer, "w", format=self.container, container_options={"fflags": "+bitexact"}) as container:
            every = {**self.options, **options}
            stream: Any = container.add_stream(self.encoder, rate=sample_rate, layout="mono", options=every)
            stream.bit_rate = 1000 * kbps
            for given in (frame, None):  # None: all that the coder still has
                for packet in stream.encode(given):
                    payload += packet.size
                    container.mux(packet)
        return buffer.getvalue(), payload

    def decode(self, file: bytes, samples: int) -> Tensor:
        """Decode a file of `encode` to the sound `(1, samples)` that went into it, float32, at the rate that it had.

        libsndfile decodes Opus at that rate (FFmpeg would do so at 48 kHz, and the way back cuts off the highest
        frequencies), and takes away what Ogg's and LAME's headers call delay and padding.

        Raises:
            ValueError: Less samples came back.
        """
        sound, _ = soundfile.read(BytesIO(file), dtype="float32", always_2d=True)
        if len(sound) < samples:
            raise ValueError(f"{len(sound)} of {samples} samples came back")
        # A sound of a few samples comes back a little longer.
        return torch.from_numpy(sound.T[:, :samples] / self.level)


CODECS = (
    AudioCodec(
        "Opus",
        "libopus",
        (6, 8, 12, 16, 24, 32, 64),
        {"vbr": "on", "compression_level": "10", "frame_duration": "20", "application": "audio"},
        "Opus packets, with what the coder adds at both ends of a sound; the pages of Ogg and its two headers left out",
        "ogg",
        (8_000, 12_000, 16_000, 24_000, 48_000),
    ),
    AudioCodec(
        "MP3",
        "libmp3lame",
        (32, 48, 64, 96, 128),
        {"compression_level": "3"},  # LAME's default; 0, its slowest, is worse by every metric at 16 kHz
        "frames with their headers, which decoding needs, and what the coder adds at both ends; LAME's tag left out",
        "mp3",
        (8_000, 11_025, 12_000, 16_000, 22_050, 24_000, 32_000, 44_100, 48_000),
        0.95,  # LAME lowers all that it codes, against clipping, which the spectral distances would count as an error
    ),
)


def versions() -> str:
    """Return the versions of the libraries."""
    libavcodec = ".".join(map(str, av.library_versions["libavcodec"]))
    return f"PyAV {av.__version__} (libavcodec {libavcodec}), libsndfile {soundfile.__libsndfile_version__}"
