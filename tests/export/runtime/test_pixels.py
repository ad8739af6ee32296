"""A bundle of images on a grid: any size, in tiles, as files, with numpy and ONNX Runtime."""

import re
import runpy

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

import varitok
from varitok import UserError
from varitok.codecs.codec import Codec
from varitok.export.adapters.codec import as_codec
from varitok.export.bitstream.media_files import decode_file, encode_file
from varitok.export.cli.info import describe
from varitok.export.exporters.torchscript import load_torchscript

from ...codecs.examples import photo_codec
from ..conftest import awake
from .test_examples import write_bundle

SIDES = st.integers(1, 40)


@pytest.fixture(scope="module")
def bundle(tmp_path_factory):
    """Hand-made graphs: a code is the mean of 8 x 8 pixels."""
    folder = tmp_path_factory.mktemp("photo") / "bundle"
    write_bundle(folder, "photo")
    return varitok.load(folder)


def noise(*shape):
    return np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)


@settings(max_examples=25, deadline=None)
@given(height=SIDES, width=SIDES)
def test_images_of_any_size(bundle, height, width):
    image = np.full((height, width, 3), 90, np.uint8)
    codes = bundle.encode(image)
    assert codes.shape == (1, 2, *bundle.grid(height, width)) == (1, 2, -(-height // 8), -(-width // 8))
    assert bundle.decode(codes).shape[2:] == tuple(8 * side for side in codes.shape[2:])
    back = bundle.pixels(bundle.decode(codes, (height, width)))[0]
    assert back.shape == image.shape and (back == 85).all()  # the code below
    assert np.array_equal(bundle.encode(Image.fromarray(image), num_codebooks=1), codes[:, :1])
    assert np.array_equal(bundle.encode(bundle.values(image)), codes)


@pytest.mark.parametrize("size", [(1, 1), (300, 1000), (257, 3)])
def test_large_images_go_in_tiles(bundle, size):
    image = noise(*size, 3)
    codes, whole = bundle.encode(image, tile=256), bundle.encode(image)
    assert np.array_equal(codes, whole)  # these graphs see no further than a patch
    one = bundle.decode(codes, size, tile=(256, 128))
    np.testing.assert_allclose(one, bundle.decode(codes, size), atol=1e-6)
    assert one.shape == (1, 3, *size)


@pytest.mark.parametrize("size", [(37, 50), (1, 1), (8, 16)])
def test_a_file_and_back(bundle, tmp_path, size):
    path, codes, back = tmp_path / "a.png", tmp_path / "a.vtk", tmp_path / "b.png"
    Image.fromarray(noise(*size, 3)).save(path)
    about = encode_file(bundle, path, codes, coding="packed")
    rows, columns = bundle.grid(*size)
    assert about["codebooks"] == 2 and about["payload bytes"] == rows * columns
    assert decode_file(bundle, codes, back) == {"codebooks": 2, "whole": True}
    with Image.open(path) as first, Image.open(back) as last:
        wanted = bundle.pixels(bundle.decode(bundle.encode(first), size))
        assert first.size == last.size and np.array_equal(np.asarray(last), wanted[0])
    assert describe(codes)["codes"] == [[2, rows, columns]] and describe(codes)["images"] == 1


def test_of_a_file_that_was_cut_the_upper_rows_remain(bundle, tmp_path):
    path, codes, back = tmp_path / "a.png", tmp_path / "a.vtk", tmp_path / "b.png"
    Image.fromarray(noise(37, 50, 3)).save(path)
    encode_file(bundle, path, codes, coding="packed")
    codes.write_bytes(codes.read_bytes()[:-12])  # a row of 7 codes in two codebooks, the checksum and the end
    assert not decode_file(bundle, codes, back)["whole"]
    with Image.open(path) as first, Image.open(back) as last:
        assert last.size == (50, 32)
        wanted = bundle.pixels(bundle.decode(bundle.encode(first), (37, 50)))[0, :32]
        assert np.array_equal(np.asarray(last), wanted)


def test_mistakes_are_one_line(bundle):
    codes = bundle.encode(noise(20, 30, 3))
    for call, message in [
        (lambda: bundle.encode(noise(20, 30)), "pixels (height, width, 3) are expected, got (20, 30)"),
        (lambda: bundle.encode(noise(0, 30, 3)), "pixels (height, width, 3) are expected, got (0, 30, 3)"),
        (lambda: bundle.encode(np.zeros((1, 1, 8, 8))), "float values (batch, 3, height, width) are expected"),
        (lambda: bundle.encode(noise(20, 30, 3), tokens=2), "the number of tokens follows from the signal's size"),
        (lambda: bundle.encode(noise(20, 30, 3), num_codebooks=3), "3 codebooks: this codec has 2"),
        (lambda: bundle.encode(noise(20, 30, 3), tile=8), "tile=8: tiles must have at least two steps, 16 pixels"),
        (lambda: bundle.decode(codes[0]), "shape (batch, 1 to 2, rows, columns) is expected"),
        (lambda: bundle.decode(codes + 16), "codebook 0 has codes 0 to 15"),
        (lambda: bundle.decode(codes[:, :, :0]), "has none"),
        (lambda: bundle.decode(codes, (30, 20)), "size: (30, 20) has codes (4, 3), these are (3, 4)"),
        (lambda: bundle.decode(codes, (20, 30, 3)), "size: (height, width), each 1 or more, are expected"),
    ]:
        with pytest.raises(UserError, match=re.escape(message)) as caught:
            call()
        assert "\n" not in str(caught.value)


@pytest.fixture(scope="module")
def codec() -> Codec:
    return awake(photo_codec())


@pytest.fixture(scope="module")
def exported(once, codec):
    folder, report = once("photo", codec)
    assert set(report["parity"]) == {"model.safetensors", "codec.ts", "onnx"}
    assert all(one["codes_equal"] == 1 for one in report["parity"].values())
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("size", [(37, 50), (64, 16)])
@torch.no_grad()
def test_every_format_is_the_codec_at_any_size(codec, exported, size):
    bundle, scripted = varitok.load(exported), load_torchscript(exported / "codec.ts")[0]
    signal = torch.from_numpy(bundle.values(noise(2, *size, 3)))
    wanted = codec.encode(signal)
    assert np.array_equal(bundle.encode(signal.numpy()), wanted) and torch.equal(scripted.encode(signal), wanted)
    back = codec.decode(wanted, size).clamp(-1, 1)
    found = bundle.decode(wanted.numpy(), size), scripted.decode(wanted)[:, :, : size[0], : size[1]].numpy()
    for one in (*found, as_codec(bundle).decode(wanted, size).numpy()):
        np.testing.assert_allclose(one, back, rtol=0, atol=1e-5)


@pytest.mark.slow
def test_what_it_says_of_itself(exported, monkeypatch):
    about = describe(exported)
    assert about["signals"] == "images of any size, 3 channels" and "4 x 4 pixels" in about["tokens"]
    assert "a token of 200 codes for 4 x 4 pixels" in repr(varitok.load(exported))
    monkeypatch.chdir(exported)
    blocks = re.findall(r"```python\n(.*?)```", (exported / "README.md").read_text(), re.DOTALL)
    assert len(blocks) == 3
    for number, block in enumerate(blocks):
        path = exported.parent / f"block_{number}.py"
        path.write_text(block)
        runpy.run_path(str(path))
