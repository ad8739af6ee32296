"""The classical image codecs: decoded images, and counted bytes."""

from io import BytesIO

import numpy as np
import pytest
import torch
from PIL import Image

from varitok.codecs.metrics.image import psnr
from varitok.export.compare import images
from varitok.export.compare.images import CODECS, payload


def _picture(seed: int, side: int = 64) -> Image.Image:
    y, x = np.mgrid[:side, :side] / side
    noise = np.random.default_rng(seed).normal(0, 12, (side, side, 3))
    return Image.fromarray((np.stack([200 * x, 180 * y, 90 * (x + y)], -1) + noise).clip(0, 255).astype(np.uint8))


def _save(kind: str, seed: int = 0, **options: object) -> bytes:
    buffer = BytesIO()
    _picture(seed).save(buffer, kind, **options)
    return buffer.getvalue()


def test_jpeg_payload_is_what_lies_between_the_scan_header_and_the_end() -> None:
    data = _save("JPEG", quality=50)
    start = data.index(b"\xff\xda")
    header = int.from_bytes(data[start + 2 : start + 4], "big")
    assert payload("JPEG", data) == len(data) - (start + 2 + header) - 2
    progressive = _save("JPEG", quality=50, progressive=True)
    assert progressive.count(b"\xff\xda") > 1 and 0 < payload("JPEG", progressive) < len(progressive)


def test_webp_payload_is_the_file_without_20_bytes() -> None:
    for seed in range(6):
        data = _save("WEBP", seed, quality=10 + seed)
        assert len(data) - 21 <= payload("WebP", data) <= len(data) - 20  # one byte of padding, maybe


def test_metadata_is_not_payload() -> None:
    exif = Image.Exif()
    exif[0x010E] = "a long description" * 20
    for kind, name in (
        ("JPEG", "JPEG"),
        ("WEBP", "WebP"),
    ):
        plain, described = _save(kind, quality=50), _save(kind, quality=50, exif=exif)
        assert len(described) > len(plain) + 300
        assert payload(name, described) == payload(name, plain)


def test_avif_payload_is_most_of_what_is_left_when_boxes_are_gone() -> None:
    sizes = [(len(data), payload("AVIF", data)) for data in (_save("AVIF", quality=q) for q in (1, 50))]
    (small, small_payload), (large, large_payload) = sizes
    assert small - small_payload == large - large_payload > 100  # the boxes around are the same
    assert 0 < small_payload < large_payload


def test_pictures_come_back_smaller_and_worse() -> None:
    image = torch.from_numpy(np.array(_picture(0))).permute(2, 0, 1)
    for classic in (codec for codec in CODECS if not codec.obstacle(0, 3)):
        least, most = (classic.code(image, setting) for setting in (classic.settings[0], classic.settings[-1]))
        assert least.back.shape == image.shape == most.back.shape and least.back.dtype == torch.uint8
        assert 0 < least.payload < most.payload and least.payload <= least.file and most.payload <= most.file
        values = [psnr(coded.back[None], image[None]).item() for coded in (least, most)]
        assert values[1] > values[0] + 2, classic.name


def test_a_codec_that_pillow_lacks_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(images, "find_spec", lambda name: None)
    monkeypatch.setattr(images.features, "check", lambda name: False)
    told = {codec.name: codec.obstacle(0, 3) for codec in CODECS}
    assert told["JPEG XL"] == "needs the package pillow-jxl-plugin" and told["AVIF"] == "this Pillow has no avif"
