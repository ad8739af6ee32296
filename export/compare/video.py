"""Classical video codecs: H.264, H.265, AV1 and VP9, by FFmpeg.

They encode YUV 4:2:0; the error of chroma subsampling counts as theirs.
"""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from io import BytesIO
from typing import Any, NamedTuple

os.environ.setdefault("SVT_LOG", "1")  # errors only

import av
import numpy as np
import torch
from av.bitstream import BitStreamFilterContext
from torch import Tensor

from .classic import ClassicalCodec, Coded

__all__ = ["CODECS", "Packets", "VideoCodec", "versions"]

RATE = 8.0  # frames a second, if unknown


class Packets(NamedTuple):
    """An encoded clip.

    Attributes:
        packets: Packets of the encoder.
        head: Headers that decoding needs: settings, equal for clips of one size and quality.
        file: Size of an MP4 file with these packets, in bytes.
    """

    packets: list[bytes]
    head: bytes
    file: int

    @property
    def payload(self) -> int:
        """Size of all packets, in bytes."""
        return sum(map(len, self.packets))


@dataclass(frozen=True)
class VideoCodec(ClassicalCodec):
    """A classical video codec. Settings are CRF values, from the best quality to the lowest.

    Attributes:
        decoder: FFmpeg's name of the decoder.
        least: Least side of a frame, in pixels; smaller frames are padded with copies of their last row and column.
            x265 writes out of bounds for sides between 33 and 50.
        filter: FFmpeg's bitstream filter of the packets.
    """

    decoder: str
    least: int
    filter: str = "null"

    def obstacle(self, rate: float, channels: int) -> str:
        """Return which encoder or decoder this PyAV lacks; empty if none."""
        missing = sorted({self.encoder, self.decoder} - av.codecs_available)
        return f"this PyAV has no {missing[0]}" if missing else ""

    def code(self, signal: Tensor, setting: int, rate: float = 0) -> Coded:
        """Encode a clip `(3, t, h, w)`, uint8, at a CRF, and decode it."""
        packets = self.encode(signal, setting, rate or RATE)
        return Coded(packets.file, packets.payload, self.decode(packets, signal.shape[1:]))

    def encode(self, clip: Tensor, quality: int, frame_rate: float) -> Packets:
        """Encode a clip.

        Args:
            clip: uint8 `(3, t, h, w)`.
            quality: CRF.
            frame_rate: Frames a second.
        """
        sides = [max(side + side % 2, self.least) for side in clip.shape[2:]]
        indices = [torch.arange(side).clamp(max=had - 1) for side, had in zip(sides, clip.shape[2:], strict=True)]
        # (3, t, h, w) -> (t, h, w, 3)
        frames = clip[:, :, indices[0]][:, :, :, indices[1]].permute(1, 2, 3, 0).contiguous().numpy()
        buffer, rate = BytesIO(), Fraction(frame_rate).limit_denominator(1000)
        packets: list[bytes] = []
        with av.open(buffer, "w", format="mp4", container_options={"fflags": "+bitexact"}) as container:
            stream: Any = container.add_stream(self.encoder, rate=rate, options={**self.options, "crf": str(quality)})
            stream.width, stream.height, stream.pix_fmt = sides[1], sides[0], "yuv420p"
            stream.codec_context.time_base, stream.codec_context.thread_count = 1 / rate, 1
            filtered = BitStreamFilterContext(self.filter, stream)
            for number, picture in enumerate([*frames, None]):  # None flushes the encoder
                frame = None
                if picture is not None:
                    frame = av.VideoFrame.from_ndarray(picture, format="rgb24")
                    frame.pts, frame.time_base = number, 1 / rate
                for packet in (each for one in stream.encode(frame) for each in filtered.filter(one)):
                    packets.append(bytes(packet))
                    if len(frames) <= 2:  # nothing is reordered, and x265 leaves the decoding time unset
                        packet.dts = packet.pts
                    container.mux(packet)
            head = bytes(stream.codec_context.extradata or b"")
        return Packets(packets, head, len(buffer.getvalue()))

    def decode(self, coded: Packets, size: Sequence[int]) -> Tensor:
        """Decode the packets of `encode` to a clip uint8 `(3, t, h, w)`, where `size` is `(t, h, w)`.

        Raises:
            ValueError: The number of decoded frames differs.
        """
        context: Any = av.CodecContext.create(self.decoder, "r")
        context.thread_count = 1
        if coded.head:
            context.extradata = coded.head
        frames = [frame for packet in coded.packets for frame in context.decode(av.Packet(packet))]
        frames += context.decode(None)
        if len(frames) != size[0]:
            raise ValueError(f"{self.name}: {len(frames)} of {size[0]} frames were decoded")
        pictures = np.stack([frame.to_ndarray(format="rgb24") for frame in frames])
        # (t, h, w, 3) -> (3, t, h, w)
        return torch.from_numpy(pictures).permute(3, 0, 1, 2)[:, :, : size[1], : size[2]].contiguous()


COUNTED = "the encoder's packets, without MP4 and the encoder's headers; no file has notes about the encoder"
NOTELESS = "filter_units=remove_types=6"  # supplemental information: x264's description of itself, 700 bytes
QUIET = {"preset": "slow", "x265-params": "log-level=none:info=0"}  # without x265's description of itself, 2.3 kB
GOOD = {"b": "0", "deadline": "good", "cpu-used": "1"}
CRF = (18, 23, 28, 33, 38, 43, 47, 51)
CODECS = (
    VideoCodec("H.264", "libx264", CRF, {"preset": "veryslow"}, COUNTED, "h264", 2, NOTELESS),
    VideoCodec("H.265", "libx265", CRF, QUIET, COUNTED, "hevc", 64),
    VideoCodec("AV1", "libsvtav1", (25, 35, 45, 50, 55, 60, 63), {"preset": "4"}, COUNTED, "libdav1d", 64),
    VideoCodec("VP9", "libvpx-vp9", (20, 30, 40, 50, 56, 63), GOOD, COUNTED, "vp9", 2),
)


def versions() -> str:
    """Return the names and versions of the libraries."""
    return f"PyAV {av.__version__} (libavcodec {'.'.join(map(str, av.library_versions['libavcodec']))})"
