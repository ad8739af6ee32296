"""Measure H.264, H.265, AV1 and VP9 over qualities, on the clips and by the metrics that varitok evaluates with.

    python benchmarks/classic_video.py DATA_FOLDER --size 64 --frames 9 --frame-rate 8 --out benchmarks/results/NAME.csv

Clips are made as `data=video_folder` makes them to evaluate on: the first frames, resized, cropped to their centre.
Both sides are compared as 8-bit RGB values; coders work on 4:2:0, whose loss is theirs. Bits are those of the packets
that the coder gave out (payload), without a container and without the headers that all clips of a kind could share.
"""

import argparse
import os
import shlex
import sys
from collections.abc import Sequence
from fractions import Fraction
from importlib.metadata import version
from pathlib import Path
from typing import NamedTuple

_checkout = Path(__file__).resolve().parents[1] / ".pkg"
if __name__ == "__main__" and _checkout.is_dir():
    # A checkout needs no install (ARCHITECTURE.md, "Where the package is").
    sys.path[0] = str(_checkout)

os.environ.setdefault("SVT_LOG", "1")  # errors only

import av  # noqa: E402
import numpy as np  # noqa: E402
import torch  # noqa: E402
from torch import Tensor  # noqa: E402

from varitok import UserError  # noqa: E402
from varitok.codecs.metrics.medium import Clips  # noqa: E402
from varitok.codecs.metrics.table import write_rows  # noqa: E402
from varitok.data.batch import BadSample  # noqa: E402
from varitok.data.videos import video_folder  # noqa: E402

__all__ = ["FORMATS", "Coded", "Format", "decode", "encode", "main"]

METRICS = ("psnr", "ssim", "flicker")


class Format(NamedTuple):
    """A classic codec.

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


class Coded(NamedTuple):
    """A clip as packets.

    Attributes:
        packets: Of the coder.
        head: Headers that decoding needs: settings, which clips of one size and quality share.
    """

    packets: list[bytes]
    head: bytes

    @property
    def payload(self) -> int:
        """Count the bytes of all packets."""
        return sum(map(len, self.packets))


def encode(kind: str, quality: int, clip: Tensor, frame_rate: float) -> Coded:
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
    context = av.CodecContext.create(form.encoder, "w")
    context.width, context.height, context.pix_fmt = sides[1], sides[0], "yuv420p"
    context.framerate = Fraction(frame_rate).limit_denominator(1000)
    context.time_base = 1 / context.framerate
    context.thread_count = 1
    context.options = {**form.options, "crf": str(quality)}
    context.flags |= av.codec.context.Flags.global_header
    packets = []
    for number, picture in enumerate(frames):
        frame = av.VideoFrame.from_ndarray(picture, format="rgb24")
        frame.pts, frame.time_base = number, context.time_base
        packets += context.encode(frame)
    packets += context.encode(None)
    payloads = [bytes(packet) for packet in packets]
    if kind == "H.264":
        payloads = [_without_notes(payload) for payload in payloads]
    return Coded(payloads, bytes(context.extradata or b""))


def _without_notes(packet: bytes) -> bytes:
    """Drop what x264 writes about itself, 700 bytes: units of type 6, supplemental enhancement information."""
    start = b"\x00\x00\x01"
    units = [unit.rstrip(b"\x00") for unit in packet.split(start) if unit.rstrip(b"\x00")]
    return b"".join(start + unit for unit in units if unit[0] & 31 != 6)


def decode(kind: str, coded: Coded, size: Sequence[int]) -> Tensor:
    """Decode what `encode` gave to a clip, uint8 `(3, t, h, w)`, of the size `(t, h, w)` that went into it.

    Raises:
        ValueError: As many frames did not come back.
    """
    context = av.CodecContext.create(FORMATS[kind].decoder, "r")
    context.thread_count = 1
    if coded.head:
        context.extradata = coded.head
    frames = [frame for packet in coded.packets for frame in context.decode(av.Packet(packet))]
    frames += context.decode(None)
    if len(frames) != size[0]:
        raise ValueError(f"{kind}: {len(frames)} of {size[0]} frames came back")
    pictures = np.stack([frame.to_ndarray(format="rgb24") for frame in frames])
    return torch.from_numpy(pictures).permute(3, 0, 1, 2)[:, :, : size[1], : size[2]].contiguous()


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line; a user's mistake ends in one line and exit code 2."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("data", type=Path, metavar="DATA_FOLDER", help="clips; its val/, or the share held out of it")
    parser.add_argument("--size", type=int, default=64, metavar="PIXELS", help="side of the crop; default: %(default)s")
    parser.add_argument("--frames", type=int, default=9, metavar="N", help="the first; default: %(default)s")
    parser.add_argument("--frame-rate", type=float, default=8.0, metavar="HZ", help="default: %(default)s")
    parser.add_argument("--codecs", nargs="+", choices=FORMATS, default=list(FORMATS), help="default: all")
    parser.add_argument("--out", type=Path, required=True, metavar="CSV", help="the table to write")
    options = parser.parse_args(arguments)
    words = sys.argv[1:] if arguments is None else arguments
    try:
        _compare(options, shlex.join(["python", "benchmarks/classic_video.py", *words]))
    except UserError as error:
        print(f"classic_video: {error}", file=sys.stderr)
        sys.exit(2)


def _compare(options: argparse.Namespace, command: str) -> None:
    """Read, code, measure and write."""
    form = {"image_size": options.size, "frame_rate": options.frame_rate}
    splits = video_folder(str(options.data), crop_tokens=options.frames, hop=1, lead=0, **form)
    clips = []
    for index in range(len(splits.val)):  # type: ignore[arg-type]
        try:
            clips.append(splits.val[0, index])
        except BadSample as error:
            print(f"left out: {error}", file=sys.stderr)
    if not clips:
        raise UserError(f"{options.data}: no clip could be read")
    medium = Clips()
    metrics = {name: medium.comparison(name, torch.device("cpu")) for name in METRICS}
    pixels = sum(clip[0].numel() for clip in clips)
    rows: list[dict[str, object]] = []
    for kind in options.codecs:
        for quality in FORMATS[kind].settings:
            payload, values = 0, {name: [] for name in metrics}  # type: dict[str, list[float]]
            for clip in clips:
                coded = encode(kind, quality, clip, options.frame_rate)
                payload += coded.payload
                back, length = decode(kind, coded, clip.shape[1:]), torch.tensor([clip.shape[1]])
                for name, metric in metrics.items():
                    values[name].append(metric(back[None], clip[None], length).item())
            means = {name: float(np.nanmean(found)) for name, found in values.items()}
            sizes = {"bytes": payload / len(clips), "bpp": payload * 8 / pixels}
            rows.append({"codec": kind, "crf": quality, **sizes, **means})
            print(", ".join(f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v}" for k, v in rows[-1].items()))
    header = {
        "dataset": f"{options.data}, validation split, {len(clips)} clips",
        "protocol": splits.about["protocol"],
        "column crf": "the quality asked for; larger is worse",
        "column bytes": "mean payload of a clip: the coder's packets; no container, no global headers",
        "column bpp": f"bits of payload / ({medium.rate_meaning.partition('(')[2]}",
        **{f"column {name}": text for name, text in medium.definitions(METRICS, options.size).items()},
        **{f"settings {kind}": f"{FORMATS[kind].encoder}, {FORMATS[kind].options}" for kind in options.codecs},
        "command": command,
        "versions": f"PyAV {version('av')}, torch {torch.__version__}",
    }
    write_rows(options.out, header, rows)
    print(f"written to {options.out}")


if __name__ == "__main__":
    main()
