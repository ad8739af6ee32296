"""Classical codecs of sounds: Opus and MP3, by FFmpeg's encoders; libsndfile decodes.

What a coder puts before a sound or after it is taken away, so that all samples are back at their places.
"""

from functools import partial
from io import BytesIO
from typing import Any, NamedTuple

import av
import soundfile
import torch
from torch import Tensor

from varitok.codecs.metrics.audio import written

from .classic import Classic, Coded

__all__ = ["FORMATS", "classics", "code", "decode", "encode", "versions"]


class Format(NamedTuple):
    """A classical codec.

    Attributes:
        encoder: FFmpeg's name of it.
        container: What its packets are put into.
        rates: The sample rates that it codes, in Hz.
        settings: Bit rates to try, in kbit/s.
        options: Further settings of the encoder's.
        payload: What is counted once the container is subtracted, for the table's header.
        level: What a decoded sound is divided by.
    """

    encoder: str
    container: str
    rates: tuple[int, ...]
    settings: tuple[int, ...]
    options: dict[str, str]
    payload: str
    level: float = 1.0


FORMATS = {
    "Opus": Format(
        "libopus",
        "ogg",
        (8_000, 12_000, 16_000, 24_000, 48_000),
        (6, 8, 12, 16, 24, 32, 64),
        {"vbr": "on", "compression_level": "10", "frame_duration": "20"},
        "Opus packets, with what the coder adds at both ends of a sound; the pages of Ogg and its two headers left out",
    ),
    "MP3": Format(
        "libmp3lame",
        "mp3",
        (8_000, 11_025, 12_000, 16_000, 22_050, 24_000, 32_000, 44_100, 48_000),
        (32, 48, 64, 96, 128),
        {"compression_level": "3"},  # LAME's default; 0, its slowest, is worse by every metric at 16 kHz
        "frames with their headers, which decoding needs, and what the coder adds at both ends; LAME's tag left out",
        0.95,  # LAME lowers all that it codes, against clipping, which the spectral distances would count as an error
    ),
}


def classics(sample_rate: int, channels: int) -> list[Classic]:
    """List the codecs that this PyAV has and that take such sounds."""
    return [
        Classic(
            name,
            form.settings,
            f"{form.encoder}, {form.options}; payload: {form.payload}"
            + ("" if form.level == 1 else f"; the coder's level of {form.level:g} undone"),
            partial(code, name, sample_rate),
        )
        for name, form in FORMATS.items()
        if form.encoder in av.codecs_available and sample_rate in form.rates and channels == 1
    ]


def code(name: str, sample_rate: int, sound: Tensor, setting: int) -> Coded:
    """Code a sound `(1, t)` at so many kbit/s, and decode it."""
    file, payload = encode(name, setting, sound, sample_rate)
    return Coded(len(file), payload, written(decode(name, file, sound.shape[1])))


def encode(kind: str, kbps: int, sound: Tensor, sample_rate: int, application: str = "audio") -> tuple[bytes, int]:
    """Code a sound `(1, t)`, of values that 16 bits hold; give the file, and the bytes of the coder's packets in it.

    Args:
        kind: A key of `FORMATS`.
        kbps: kbit/s.
        sound: The sound.
        sample_rate: In Hz, one of the format's.
        application: Of Opus: "audio", or "voip", which favours speech.
    """
    form = FORMATS[kind]
    options = {**form.options, "application": application} if kind == "Opus" else form.options
    frame = av.AudioFrame.from_ndarray(written(sound).mul(32768).to(torch.int16).numpy(), format="s16", layout="mono")
    frame.sample_rate, frame.pts = sample_rate, 0
    buffer, payload = BytesIO(), 0
    # Without FFmpeg's version and a drawn serial number, a file is the same each time.
    with av.open(buffer, "w", format=form.container, container_options={"fflags": "+bitexact"}) as container:
        stream: Any = container.add_stream(form.encoder, rate=sample_rate, layout="mono", options=options)
        stream.bit_rate = 1000 * kbps
        for given in (frame, None):  # None: all that the coder still has
            for packet in stream.encode(given):
                payload += packet.size
                container.mux(packet)
    return buffer.getvalue(), payload


def decode(kind: str, file: bytes, samples: int) -> Tensor:
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
    return torch.from_numpy(sound.T[:, :samples] / FORMATS[kind].level)


def versions() -> str:
    """Say what does the work."""
    libavcodec = ".".join(map(str, av.library_versions["libavcodec"]))
    return f"PyAV {av.__version__} (libavcodec {libavcodec}), libsndfile {soundfile.__libsndfile_version__}"
