"""Compare a codec's evaluation with JPEG, WebP and AVIF at the same number of bytes, image by image.

    python benchmarks/classic_images.py DATA_FOLDER --table RUN/evaluation/evaluation.csv --out benchmarks/results/NAME

The table must have been made on the same images: `varitok evaluate RUN --data DATA_FOLDER`. For each of its rows and
each image, the setting is taken whose size is nearest to the codec's bytes: once by the whole file, and once by its
payload, since at some dozens of bytes a file is mostly container (the codec's bytes are payload too). Where a format's
smallest file is larger than the codec's bytes, that one is taken, and the column `at_smallest` says for which share of
the images.
"""

import argparse
import shlex
import sys
from collections.abc import Iterator, Sequence
from io import BytesIO
from pathlib import Path
from typing import Any, NamedTuple

_checkout = Path(__file__).resolve().parents[1] / ".pkg"
if __name__ == "__main__" and _checkout.is_dir():
    # A checkout needs no install (ARCHITECTURE.md, "Where the package is").
    sys.path[0] = str(_checkout)

import numpy as np  # noqa: E402
import PIL  # noqa: E402
import torch  # noqa: E402
from PIL import Image, features  # noqa: E402
from torch import Tensor  # noqa: E402

from varitok import UserError  # noqa: E402
from varitok.codecs.metrics.figure import Curve, draw_curves  # noqa: E402
from varitok.codecs.metrics.image import psnr, ssim  # noqa: E402
from varitok.codecs.metrics.table import Table, read_csv, write_rows  # noqa: E402
from varitok.data.images import PROTOCOL, ImageFolder  # noqa: E402
from varitok.data.module import validation_loader  # noqa: E402

__all__ = ["FORMATS", "Measured", "main", "nearest", "payload"]

ACCOUNTS = ("file", "payload")
LADDER = (0, 1, 2, 3, 5, 7, 10, 15, 20, 25, 30, 40, 50, 60, 70, 80, 90, 95, 100)


class Format(NamedTuple):
    """A classic codec.

    Attributes:
        qualities: Settings to try, the lowest that it has first.
        options: Further settings of Pillow's.
        payload: What is counted once the container is subtracted, for the table's header.
    """

    qualities: tuple[int, ...]
    options: dict[str, Any]
    payload: str


FORMATS = {
    "JPEG": Format(
        LADDER[1:], {"optimize": True}, "entropy-coded scans only; tables, which decoding needs, and markers left out"
    ),
    "WEBP": Format(LADDER, {"method": 6}, "contents of the VP8 chunk; RIFF and chunk headers left out"),
    "AVIF": Format(LADDER, {"speed": 0, "max_threads": 1}, "contents of the mdat box; all other boxes left out"),
}


class Measured(NamedTuple):
    """Every image at every setting of one format, `(images, settings)` each."""

    file: Tensor
    payload: Tensor
    psnr: Tensor
    ssim: Tensor


def payload(kind: str, data: bytes) -> int:
    """Count the bytes of a file that are coded picture, without its container.

    Args:
        kind: A key of `FORMATS`.
        data: The file.
    """
    counts = {"JPEG": _jpeg_scans, "WEBP": _webp_chunks, "AVIF": _avif_boxes}
    return sum(counts[kind](data))


def _jpeg_scans(data: bytes) -> Iterator[int]:
    at = 2  # past the start-of-image marker
    while data[at + 1] != 0xD9:  # end of image
        marker, length = data[at + 1], int.from_bytes(data[at + 2 : at + 4], "big")
        at += 2 + length
        if marker == 0xDA:  # start of scan: data follows, up to a marker that is neither stuffing nor a restart
            start = at
            while not (data[at] == 0xFF and data[at + 1] != 0 and not 0xD0 <= data[at + 1] <= 0xD7):
                at += 1
            yield at - start


def _webp_chunks(data: bytes) -> Iterator[int]:
    at = 12  # past "RIFF", the size and "WEBP"
    while at < len(data):
        length = int.from_bytes(data[at + 4 : at + 8], "little")
        if data[at : at + 4] in (b"VP8 ", b"VP8L", b"ALPH"):
            yield length
        at += 8 + length + length % 2


def _avif_boxes(data: bytes) -> Iterator[int]:
    at = 0
    while at < len(data):
        length, head = int.from_bytes(data[at : at + 4], "big"), 8
        if length == 1:  # a 64-bit length follows the box's name
            length, head = int.from_bytes(data[at + 8 : at + 16], "big"), 16
        length = length or len(data) - at  # 0: up to the end of the file
        if data[at + 4 : at + 8] == b"mdat":
            yield length - head
        at += length


def _measure(kind: str, images: Tensor) -> Measured:
    """Encode and decode images `(n, 3, h, w)`, uint8, at every setting of a format."""
    columns: list[list[Tensor]] = [[] for _ in Measured._fields]
    for quality in FORMATS[kind].qualities:
        sizes, payloads, decoded = [], [], []
        for image in images:
            buffer = BytesIO()
            pixels = Image.fromarray(np.ascontiguousarray(image.permute(1, 2, 0).numpy()))
            pixels.save(buffer, kind, quality=quality, **FORMATS[kind].options)
            sizes.append(len(buffer.getvalue()))
            payloads.append(payload(kind, buffer.getvalue()))
            decoded.append(torch.from_numpy(np.array(Image.open(buffer).convert("RGB"))).permute(2, 0, 1))
        fake = torch.stack(decoded)
        values = (torch.tensor(sizes), torch.tensor(payloads), psnr(fake, images), ssim(fake, images))
        for column, value in zip(columns, values, strict=True):
            column.append(value)
    return Measured(*(torch.stack(column, 1) for column in columns))


def nearest(measured: Measured, account: str, target: float) -> dict[str, float]:
    """Take each image's setting whose size is nearest to `target` bytes, the better one of equals; give the means.

    Args:
        measured: All images at all settings.
        account: "file" or "payload".
        target: Bytes.
    """
    sizes = getattr(measured, account).double()
    gap = (sizes - target).abs()
    tied = gap == gap.min(1, keepdim=True).values
    best = measured.psnr.masked_fill(~tied, -torch.inf).argmax(1, keepdim=True)
    taken = sizes.gather(1, best)
    return {
        "bytes": taken.mean().item(),
        "psnr": measured.psnr.double().gather(1, best).mean().item(),
        "ssim": measured.ssim.double().gather(1, best).mean().item(),
        "at_smallest": (taken == sizes.min(1, keepdim=True).values).double().mean().item(),
    }


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line; a user's mistake ends in one line and exit code 2."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("data", type=Path, metavar="DATA_FOLDER", help="images; its val/, or the share held out of it")
    parser.add_argument("--table", type=Path, required=True, help="what varitok evaluate wrote for these images")
    parser.add_argument("--size", type=int, default=64, help="side of the images, pixels; default: %(default)s")
    parser.add_argument("--out", type=Path, required=True, help="where to write, without an ending")
    speed = "AVIF's effort, 0 (best, slow) to 10; 4 takes an eighth of the time and loses some tenths of a dB"
    parser.add_argument("--avif-speed", type=int, choices=range(11), default=0, metavar="N", help=speed)
    options = parser.parse_args(arguments)
    words = sys.argv[1:] if arguments is None else arguments
    try:
        _compare(options, shlex.join(["python", "benchmarks/classic_images.py", *words]))
    except UserError as error:
        print(f"classic_images: {error}", file=sys.stderr)
        sys.exit(2)


def _compare(options: argparse.Namespace, command: str) -> None:
    """Measure, choose, write and draw."""
    table = read_csv(options.table)
    if missing := {"bytes", "psnr", "ssim", "images"} - table.rows[0].keys():
        raise UserError(f"{options.table}: has no column {', '.join(sorted(missing))}; evaluate with these metrics")
    if not features.check("avif"):
        raise UserError("this Pillow has no AVIF; install Pillow 11.3 or newer")
    batches = list(validation_loader(ImageFolder(options.data, "val", image_size=options.size), 64))
    images = torch.cat([batch.signal for batch in batches if len(batch.signal)] or [torch.empty(0)])
    wanted = table.rows[0]["images"]
    if len(images) != wanted:
        raise UserError(
            f"{options.data} gives {len(images)} images, and {options.table} is about {wanted};"
            f" make it by varitok evaluate RUN --data {options.data}"
        )
    FORMATS["AVIF"].options["speed"] = options.avif_speed
    measured = {kind: _measure(kind, images) for kind in FORMATS}
    rows: list[dict[str, object]] = []
    for row in table.rows:
        common = {"k": row["k"], "target": row["bytes"]}
        ours = {"bytes": float(row["bytes"]), "psnr": row["psnr"], "ssim": row["ssim"], "at_smallest": ""}
        rows.append({**common, "codec": "varitok", "counted": "payload", **ours})
        for kind in FORMATS:
            for account in ACCOUNTS:
                rows.append(
                    {**common, "codec": kind, "counted": account, **nearest(measured[kind], account, row["bytes"])}
                )
    write_rows(options.out.with_suffix(".csv"), _header(options, command, table, len(images)), rows)
    for account in ACCOUNTS:
        curves = [_curve(rows, kind, account) for kind in FORMATS]
        title = f"Quality per byte of {account}: {len(images)} images of {options.size} x {options.size} pixels"
        path = options.out.with_name(f"{options.out.name}_{account}.png")
        draw_curves(path, table.curve("varitok, at its tokens"), curves, title)
    print(f"written to {options.out}.csv and two plots beside it")


def _curve(rows: list[dict[str, object]], kind: str, account: str) -> Curve:
    mine: list[Any] = [row for row in rows if row["codec"] == kind and row["counted"] == account]
    sizes, psnr, ssim = ([row[name] for row in mine] for name in ("bytes", "psnr", "ssim"))
    return Curve(kind, sizes, {"psnr": psnr, "ssim": ssim})


def _header(options: argparse.Namespace, command: str, table: Table, images: int) -> dict[str, str]:
    settings = {
        f"settings {kind}": f"quality {list(entry.qualities)}, {entry.options}; payload: {entry.payload}"
        for kind, entry in FORMATS.items()
    }
    ours = {f"varitok's {key}": table.header[key] for key in ("codec", "dataset", "command") if key in table.header}
    return {
        "dataset": f"{options.data}, validation split, {images} images",
        "protocol": f"{PROTOCOL}; {options.size} x {options.size} pixels",
        "choice": "means over images of the setting whose size is nearest to target, the codec's bytes",
        "column at_smallest": "share of images for which the setting taken is the format's smallest possible",
        **settings,
        **ours,
        "command": command,
        "versions": f"Pillow {PIL.__version__}, "
        + ", ".join(f"{name} {features.version(name)}" for name in ("jpg", "webp", "avif")),
    }


if __name__ == "__main__":
    main()
