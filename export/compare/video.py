"""Classical codecs of clips: H.264, H.265, AV1 and VP9, by FFmpeg.

Coders work on 4:2:0, whose loss is theirs.
"""

import os
from collections.abc import Sequence
from fractions import Fraction
from functools import partial
from io import BytesIO
from typing import Any, NamedTuple

os.environ.setdefault("SVT_LOG", "1")  # errors only

import av
import numpy as np
import torch
from torch import Tensor

from .classic import Classic, Coded

__all__ = ["FORMATS", "Packets", "classics", "code", "decode", "encode", "versions"]

RATE = 8.0  # frames a second, where none is known


class Format(NamedTuple):
    """A classical codec.

    Attributes:
        encoder: FFmpeg's name of it.
        decoder: Likewise.
        settings: Qualities to try (CRF), from the best to the lowest that there is.
        options: Further settings of the encoder's.
        least: Pixels that a side must have; smaller frames are filled up with copies of their last row and column.
            x265 writes beyond its memory where sides are between 33 and 50.
    """

    encoder: str
    decoder: str
    settings: tuple[int, ...]
    options: dict[str, str]
    least: int


FORMATS = {
    "H.264": Format("libx264", "h264", (18, 23, 28, 33, 38, 43, 47, 51), {"preset": "veryslow"}, 2),
    "H.265": Format(
        "libx265", "hevc", (18, 23, 28, 33, 38, 43, 47, 51), {"preset": "slow", "x265-params": "log-level=none"}, 64
    ),
    "AV1": Format("libsvtav1", "libdav1d", (25, 35, 45, 50, 55, 60, 63), {"preset": "4"}, 64),
    "VP9": Format("libvpx-vp9", "vp9", (20, 30, 40, 50, 56, 63), {"b": "0", "deadline": "good", "cpu-used": "1"}, 2),
}


class Packets(NamedTuple):
    """A clip as packets.

    Attributes:
        packets: Of the coder.
        head: Headers that decoding needs: settings, which clips of one size and quality share.
        file: Bytes of an MP4 file of them.
    """

    packets: list[bytes]
    head: bytes
    file: int

    @property
    def payload(self) -> int:
        """Count the bytes of all packets."""
        return sum(map(len, self.packets))


def classics(frame_rate: float | None) -> list[Classic]:
    """List the codecs that this PyAV has."""
    return [
        Classic(
            name,
            form.settings,
            f"{form.encoder}, {form.options}; payload: the coder's packets, without MP4 and its own headers",
            partial(code, name, frame_rate or RATE),
        )
        for name, form in FORMATS.items()
        if {form.encoder, form.decoder} <= av.codecs_available
    ]


def code(name: str, frame_rate: float, clip: Tensor, setting: int) -> Coded:
    """Code a clip `(3, t, h, w)`, uint8, at a quality (CRF), and decode it."""
    packets = encode(name, setting, clip, frame_rate)
    return Coded(packets.file, packets.payload, decode(name, packets, clip.shape[1:]))


def encode(kind: str, quality: int, clip: Tensor, frame_rate: float) -> Packets:
    """Code a clip.

    Args:
        kind: A key of `FORMATS`.
        quality: CRF.
        clip: uint8 `(3, t, h, w)`.
        frame_rate: Frames a second.
    """
    form = FORMATS[kind]
    sides = [max(side + side % 2, form.least) for side in clip.shape[2:]]
    places = [torch.arange(side).clamp(max=had - 1) for side, had in zip(sides, clip.shape[2:], strict=True)]
    frames = clip[:, :, places[0]][:, :, :, places[1]].permute(1, 2, 3, 0).contiguous().numpy()
    buffer, rate = BytesIO(), Fraction(frame_rate).limit_denominator(1000)
    packets: list[bytes] = []
    with av.open(buffer, "w", format="mp4", container_options={"fflags": "+bitexact"}) as container:
        stream: Any = container.add_stream(form.encoder, rate=rate, options={**form.options, "crf": str(quality)})
        stream.width, stream.height, stream.pix_fmt = sides[1], sides[0], "yuv420p"
        stream.codec_context.time_base, stream.codec_context.thread_count = 1 / rate, 1
        for number, picture in enumerate([*frames, None]):  # None: all that the coder still has
            frame = None
            if picture is not None:
                frame = av.VideoFrame.from_ndarray(picture, format="rgb24")
                frame.pts, frame.time_base = number, 1 / rate
            for packet in stream.encode(frame):
                packets.append(_without_notes(bytes(packet)) if kind == "H.264" else bytes(packet))
                if len(frames) <= 2:  # nothing to put in another order, and x265 leaves the time of decoding unset
                    packet.dts = packet.pts
                container.mux(packet)
        head = bytes(stream.codec_context.extradata or b"")
    return Packets(packets, head, len(buffer.getvalue()))


def _without_notes(packet: bytes) -> bytes:
    """Drop what x264 writes about itself, 700 bytes: units of type 6, supplemental enhancement information."""
    start = b"\x00\x00\x01"
    units = [unit.rstrip(b"\x00") for unit in packet.split(start) if unit.rstrip(b"\x00")]
    return b"".join(start + unit for unit in units if unit[0] & 31 != 6)


def decode(kind: str, coded: Packets, size: Sequence[int]) -> Tensor:
    """Decode what `encode` gave to a clip, uint8 `(3, t, h, w)`, of the size `(t, h, w)` that went into it.

    Raises:
        ValueError: As many frames did not come back.
    """
    context: Any = av.CodecContext.create(FORMATS[kind].decoder, "r")
    context.thread_count = 1
    if coded.head:
        context.extradata = coded.head
    frames = [frame for packet in coded.packets for frame in context.decode(av.Packet(packet))]
    frames += context.decode(None)
    if len(frames) != size[0]:
        raise ValueError(f"{kind}: {len(frames)} of {size[0]} frames came back")
    pictures = np.stack([frame.to_ndarray(format="rgb24") for frame in frames])
    return torch.from_numpy(pictures).permute(3, 0, 1, 2)[:, :, : size[1], : size[2]].contiguous()


def versions() -> str:
    """Say what does the work."""
    return f"PyAV {av.__version__} (libavcodec {'.'.join(map(str, av.library_versions['libavcodec']))})"
