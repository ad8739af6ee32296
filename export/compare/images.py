"""Classical image codecs: JPEG, WebP, AVIF, JPEG 2000 and JPEG XL, by Pillow."""

from collections.abc import Iterator
from dataclasses import dataclass
from importlib import import_module
from importlib.metadata import version
from importlib.util import find_spec
from io import BytesIO
from typing import Any

import numpy as np
import PIL
import torch
from PIL import Image, features
from torch import Tensor

from varitok.data.decoding.images import decode_image
from varitok.data.storage.members import InMemory

from .classic import ClassicalCodec, Coded

__all__ = ["CODECS", "ImageCodec", "payload", "versions"]

PACKAGES = {"pillow_jxl": "pillow-jxl-plugin"}  # on the package index; its license is the GPL
LADDER = (0, 1, 2, 3, 5, 7, 10, 15, 20, 25, 30, 40, 50, 60, 70, 80, 90, 95, 100)


@dataclass(frozen=True)
class ImageCodec(ClassicalCodec):
    """A classical image codec. Settings are qualities; for JPEG 2000 compression ratios against 8-bit pixels.

    Attributes:
        feature: Pillow's name of the library or feature that it needs; empty for a plugin.
        plugin: Module that registers the codec with Pillow, if Pillow itself hasn't any.
    """

    feature: str
    plugin: str = ""

    @property
    def about(self) -> str:
        """Encoder, options and payload, for the table's header."""
        return f"Pillow's {super().about}"

    def obstacle(self, rate: float, channels: int) -> str:
        """Return what Pillow lacks; empty if it has the codec."""
        if self.plugin:
            return "" if find_spec(self.plugin) else f"needs the package {PACKAGES[self.plugin]}"
        return "" if features.check(self.feature) else f"this Pillow has no {self.feature}"

    def code(self, signal: Tensor, setting: int, rate: float = 0) -> Coded:
        """Encode an image `(3, h, w)`, uint8, and decode it."""
        buffer = BytesIO()
        if self.plugin:
            import_module(self.plugin)
        quality: dict[str, Any] = {"quality_layers": [setting]} if self.name == "JPEG 2000" else {"quality": setting}
        pixels = Image.fromarray(np.ascontiguousarray(signal.permute(1, 2, 0).numpy()))  # (3, h, w) -> (h, w, 3)
        pixels.save(buffer, self.encoder, **quality, **self.options)
        data = buffer.getvalue()
        back = torch.from_numpy(decode_image(InMemory(self.name, data))).permute(2, 0, 1)  # (h, w, 3) -> (3, h, w)
        return Coded(len(data), payload(self.name, data), back)


CODECS = (
    ImageCodec(
        "JPEG",
        "JPEG",
        LADDER[1:],
        {"optimize": True},
        "entropy-coded scans only, without markers and the tables that decoding needs",
        "jpg",
    ),
    ImageCodec(
        "WebP", "WEBP", LADDER, {"method": 6}, "contents of the VP8 chunk, without RIFF and chunk headers", "webp"
    ),
    ImageCodec(
        "AVIF",
        "AVIF",
        LADDER,
        {"speed": 4, "max_threads": 1},
        "contents of the mdat box, without all other boxes",
        "avif",
    ),
    ImageCodec(
        "JPEG 2000",
        "JPEG2000",
        (400, 300, 200, 150, 100, 70, 50, 35, 25, 18, 12, 8, 5, 3),
        {"quality_mode": "rates", "irreversible": True, "no_jp2": True},
        "tile data after each start-of-data marker, without the codestream's headers",
        "jpg_2000",
    ),
    ImageCodec(
        "JPEG XL",
        "JXL",
        LADDER[:-1],  # the plugin fails at 100
        {"effort": 7},
        "the whole file, a codestream without boxes",
        "",
        "pillow_jxl",
    ),
)


def versions() -> str:
    """Return the names and versions of the libraries."""
    own = [f"{form.feature} {features.version(form.feature)}" for form in CODECS if form.feature]
    plugins = [f"{package} {version(package)}" for plugin, package in PACKAGES.items() if find_spec(plugin)]
    return ", ".join([f"Pillow {PIL.__version__}", *own, *plugins])


def payload(name: str, data: bytes) -> int:
    """Return the size of the coded image in a file, without its container, in bytes.

    Args:
        name: Name of one of `CODECS`.
        data: Bytes of the file.
    """
    counts = {"JPEG": _jpeg_scans, "WebP": _webp_chunks, "AVIF": _avif_boxes, "JPEG 2000": _tile_parts}
    return sum(counts[name](data)) if name in counts else len(data)


def _jpeg_scans(data: bytes) -> Iterator[int]:
    at = 2  # after the start-of-image marker
    while data[at + 1] != 0xD9:  # end of image
        marker, length = data[at + 1], int.from_bytes(data[at + 2 : at + 4], "big")
        at += 2 + length
        if marker == 0xDA:  # start of scan: its data ends at a marker that is neither stuffing nor a restart
            start = at
            while not (data[at] == 0xFF and data[at + 1] != 0 and not 0xD0 <= data[at + 1] <= 0xD7):
                at += 1
            yield at - start


def _webp_chunks(data: bytes) -> Iterator[int]:
    at = 12  # after "RIFF", the size and "WEBP"
    while at < len(data):
        length = int.from_bytes(data[at + 4 : at + 8], "little")
        if data[at : at + 4] in (b"VP8 ", b"VP8L", b"ALPH"):
            yield length
        at += 8 + length + length % 2


def _avif_boxes(data: bytes) -> Iterator[int]:
    at = 0
    while at < len(data):
        length, head = int.from_bytes(data[at : at + 4], "big"), 8
        if length == 1:  # a 64-bit length follows the type of the box
            length, head = int.from_bytes(data[at + 8 : at + 16], "big"), 16
        length = length or len(data) - at  # 0: the box ends with the file
        if data[at + 4 : at + 8] == b"mdat":
            yield length - head
        at += length


def _tile_parts(data: bytes) -> Iterator[int]:
    at = 2  # after the start-of-codestream marker
    while data[at : at + 2] != b"\xff\xd9":  # end of codestream
        length = int.from_bytes(data[at + 2 : at + 4], "big")
        if data[at : at + 2] != b"\xff\x90":  # a marker segment of the main header
            at += 2 + length
            continue
        end = int.from_bytes(data[at + 6 : at + 10], "big")  # length in the start of a tile-part
        end = at + end if end else len(data) - 2
        start = data.index(b"\xff\x93", at) + 2  # start of data
        yield end - start
        at = end
