"""Files of every mode, and damaged ones: understood or named, counted, never a crash."""

import logging
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from omegaconf import OmegaConf
from PIL import Image

from varitok import UserError
from varitok.codecs.build import build
from varitok.data.batch import Batch
from varitok.data.datamodule import DataModule
from varitok.data.datasets.images import image_folder
from varitok.data.decoding.errors import BadSample
from varitok.data.decoding.images import decode_image

from ..pictures import BROKEN, encoded, fill, picture


def saved(folder: Path, image: Image.Image, name: str = "a.png", **options: Any) -> Path:
    image.save(folder / name, **options)
    return folder / name


def flat(mode: str, color: Any) -> Image.Image:
    return Image.new(mode, (12, 10), color)


@pytest.mark.parametrize(
    ("image", "name", "expected"),
    [
        (flat("RGB", (10, 20, 30)), "a.png", (10, 20, 30)),
        (flat("L", 77), "a.png", (77, 77, 77)),
        (flat("1", 1), "a.png", (255, 255, 255)),
        (flat("RGBA", (10, 20, 30, 255)), "a.png", (10, 20, 30)),
        (flat("RGBA", (10, 20, 30, 0)), "a.png", (255, 255, 255)),
        (flat("LA", (10, 0)), "a.png", (255, 255, 255)),
        (flat("RGB", (200, 20, 30)).quantize(4), "a.png", (200, 20, 30)),
        (flat("RGB", (200, 20, 30)).quantize(4), "a.gif", (200, 20, 30)),
        (flat("I;16", 200 * 256), "a.png", (200, 200, 200)),
        (flat("I;16", 200 * 256), "a.tif", (200, 200, 200)),
        (flat("CMYK", (0, 255, 255, 0)), "a.tif", (255, 0, 0)),
        (flat("CMYK", (0, 255, 255, 0)), "a.jpg", (255, 0, 0)),
        (flat("YCbCr", (100, 128, 128)), "a.jpg", (100, 100, 100)),
    ],
    ids=lambda value: value.mode if isinstance(value, Image.Image) else str(value),
)
def test_every_mode_becomes_rgb(tmp_path: Path, image: Image.Image, name: str, expected: tuple[int, ...]) -> None:
    pixels = decode_image(saved(tmp_path, image, name))
    assert pixels.shape == (10, 12, 3)
    assert pixels.dtype == np.uint8
    assert np.abs(pixels.astype(int) - expected).max() <= 3  # JPEG's rounding


def test_a_transparent_palette_entry_is_white(tmp_path: Path) -> None:
    image = flat("RGB", (200, 20, 30)).quantize(4)
    assert decode_image(saved(tmp_path, image, transparency=image.getpixel((0, 0)))).min() == 255


@pytest.mark.parametrize(("orientation", "turns"), [(1, 0), (3, 2), (6, -1), (8, 1)])
def test_the_exif_rotation_is_applied(tmp_path: Path, orientation: int, turns: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    upright = decode_image(saved(tmp_path, picture(), "upright.png"))
    rotated = decode_image(saved(tmp_path, picture(), "rotated.png", exif=exif))
    assert np.array_equal(rotated, np.rot90(upright, turns))


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_file_is_named_with_its_reason(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    path.write_bytes(BROKEN[name])
    with pytest.raises(BadSample, match=rf"^{re.escape(str(path))}: \S") as caught:
        decode_image(path, least_side=8)
    reason = str(caught.value).removeprefix(f"{path}: ")
    assert "\n" not in reason
    assert str(path) not in reason


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=150)
@given(kind=st.sampled_from(["JPEG", "PNG", "WEBP", "GIF"]), place=st.floats(0, 1, exclude_max=True), flip=st.data())
def test_a_damaged_byte_gives_an_image_or_a_bad_sample(
    tmp_path: Path, kind: str, place: float, flip: st.DataObject
) -> None:
    content = bytearray(encoded(picture(), kind))
    content[int(place * len(content))] ^= flip.draw(st.integers(1, 255))
    path = tmp_path / "damaged"
    path.write_bytes(content)
    try:
        pixels = decode_image(path)
    except BadSample:
        return
    assert pixels.shape[2] == 3
    assert pixels.dtype == np.uint8


def test_a_large_jpeg_decoded_small_looks_the_same(tmp_path: Path) -> None:
    path = saved(tmp_path, picture(640, 480), "a.jpg", quality=95)
    small, whole = decode_image(path, shorter_side=32), decode_image(path)
    assert whole.shape == (480, 640, 3)
    assert 64 <= min(small.shape[:2]) < 480
    reduced = np.asarray(Image.fromarray(whole).resize(small.shape[1::-1], Image.Resampling.BOX))
    assert np.abs(small.astype(int) - reduced).max() < 5


def module(folder: Path, **options: Any) -> DataModule:
    return DataModule(image_folder(root=str(folder), image_size=8), **({"batch_size": 8, "updates": 5} | options))


def batches(loader: Iterable[Any]) -> list[Batch]:
    return list(cast(Iterable[Batch], loader))


def split_folder(folder: Path, good: int, broken: dict[str, bytes]) -> Path:
    """Write the same files as training and validation data, so that which file is where is plain."""
    fill(folder / "train", good, broken)
    fill(folder / "val", good, broken)
    return folder


def test_bad_files_are_counted_and_stood_in_for(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    data = module(
        split_folder(tmp_path, 24, BROKEN), batch_size=8, updates=8, max_bad_share=0.9, workers=0
    )  # two epochs
    with caplog.at_level(logging.WARNING):
        for batch in batches(data.train_dataloader()):
            assert batch.signal.shape == (8, 3, 8, 8)
            data.on_before_batch_transfer(batch, 0)
    assert sorted(Path(name.split(": ")[0]).name for name in data.bad.names) == sorted(BROKEN)
    assert sum("skipped" in record.getMessage() for record in caplog.records) == len(BROKEN)  # each named once
    data.teardown("fit")
    told = f"{len(BROKEN)} unreadable files were skipped, {data.bad.total} times"  # in both epochs, and as stand-ins
    assert caplog.records[-1].getMessage() == told
    assert data.bad.total >= 2 * len(BROKEN)


@pytest.mark.parametrize("workers", [pytest.param(0, marks=pytest.mark.slow), 2])
def test_a_folder_without_a_readable_image_ends_in_one_line(tmp_path: Path, workers: int) -> None:
    data = module(split_folder(tmp_path, 0, BROKEN), workers=workers, updates=1)
    (first, *_) = batches(data.train_dataloader())
    assert len(first.signal) == 0
    with pytest.raises(UserError, match=r"^none of the \d+ files tried could be read; the first: \S+: .+$"):
        data.on_before_batch_transfer(first, 0)


def test_too_many_bad_files_end_the_run(tmp_path: Path) -> None:
    data = module(split_folder(tmp_path, 24, BROKEN), batch_size=8, updates=40, workers=0)
    with pytest.raises(UserError, match=r"% of the last \d+ files could not be read, more than loader\.max_bad_share"):
        for batch in batches(data.train_dataloader()):
            data.on_before_batch_transfer(batch, 0)
    assert data.bad.seen < 80  # early


def test_workers_change_nothing_about_bad_files(tmp_path: Path) -> None:
    split_folder(tmp_path, 10, {"truncated.jpg": BROKEN["truncated.jpg"]})
    alone, together = (module(tmp_path, workers=workers, batch_size=4) for workers in (0, 2))
    for one, two in (
        (alone.train_dataloader(), together.train_dataloader()),
        (alone.val_dataloader(), together.val_dataloader()),
    ):
        for a, b in zip(batches(one), batches(two), strict=True):
            assert torch.equal(a.signal, b.signal)
            assert a.bad == b.bad


TARGET = "varitok.data.datasets.images.image_folder"


@pytest.mark.parametrize("wrong", [{"image_size": 1}, {"least_scale": 0.0}, {"least_scale": 1.5}])
def test_a_number_out_of_range_is_named(tmp_path: Path, wrong: dict[str, Any]) -> None:
    with pytest.raises(UserError, match=rf"data\.{next(iter(wrong))}=.*: must "):
        form = {"_target_": TARGET, "root": str(fill(tmp_path, 2)), "image_size": 8}
        build(OmegaConf.create({"data": form | wrong}).data)
