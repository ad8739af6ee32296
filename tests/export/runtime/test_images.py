"""A bundle in the hands of someone who has numpy and ONNX Runtime."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

import varitok
from varitok import UserError
from varitok.data.batch import normalize, to_uint8
from varitok.data.datasets.images import image_folder
from varitok.export.runtime.load import load

from ...codecs.examples import SIZE, TOKENS

ROOT = Path(varitok.__file__).parents[1]


@pytest.fixture(scope="session")
def bundle(exported):
    return varitok.load(exported[1])


@pytest.fixture
def copied(exported, tmp_path):
    return shutil.copytree(exported[1], tmp_path / "bundle")


def noise(*shape):
    return np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)


def test_what_it_says_of_itself(exported, bundle):
    codec = exported[0]
    assert (bundle.tokens, bundle.codebook_sizes, bundle.image_size) == (TOKENS, codec.bottleneck.codebook_sizes, SIZE)
    assert bundle.bits(3) == pytest.approx(codec.bits(3)) and bundle.config["modality"] == "image"
    assert f"16 x 16 images, up to {TOKENS} tokens" in repr(bundle)


@torch.no_grad()
def test_every_way_to_give_an_image(exported, bundle):
    pixels = noise(2, SIZE, SIZE, 3)
    signal = normalize(torch.from_numpy(pixels).permute(0, 3, 1, 2))
    expected = exported[0].encode(signal).numpy()
    assert np.array_equal(bundle.encode(pixels), expected)
    assert np.array_equal(bundle.encode(pixels[0]), expected[:1])
    assert np.array_equal(bundle.encode(Image.fromarray(pixels[1])), expected[1:])
    for kind in (np.float32, np.float64):
        assert np.array_equal(bundle.encode(signal.numpy().astype(kind)), expected)
    assert np.array_equal(bundle.encode(pixels, tokens=2), expected[..., :2])


def test_other_sizes_are_cropped_and_resized_as_for_evaluation(bundle, tmp_path):
    pixels = noise(50, 37, 3)
    Image.fromarray(pixels).save(tmp_path / "a.png")
    for index in range(20):  # a folder needs enough images to hold some out
        Image.fromarray(pixels).save(tmp_path / f"{index}.png")
    shown = image_folder(str(tmp_path), image_size=SIZE).val[0, 0]
    expected = bundle.encode(normalize(shown[None]).numpy())
    same = [bundle.encode(given) for given in (pixels, Image.fromarray(pixels))]
    assert np.array_equal(*same)
    # Pillow and torchvision resize alike but for the last bit of a pixel.
    assert (same[0] == expected).mean() >= 0.5
    assert bundle.encode(Image.fromarray(pixels).convert("L")).shape == (1, 1, TOKENS)


def test_pixels_are_rounded_as_in_the_evaluation(bundle):
    signal = np.linspace(-1.2, 1.2, 3 * SIZE * SIZE, dtype=np.float32).reshape(1, 3, SIZE, SIZE)
    assert np.array_equal(bundle.pixels(signal), to_uint8(torch.from_numpy(signal)).permute(0, 2, 3, 1))


@given(batch=st.integers(1, 4), kept=st.integers(1, TOKENS), seed=st.integers(0, 9))
@settings(max_examples=15)
def test_any_prefix_decodes_as_the_codec_does(exported, bundle, batch, kept, seed):
    codec = exported[0]
    codes = np.random.default_rng(seed).integers(0, codec.bottleneck.codebook_sizes[0], (batch, 1, kept))
    with torch.no_grad():
        expected = codec.decode(torch.from_numpy(codes)).clamp(-1, 1).numpy()
    for kind in (np.int64, np.uint16):
        np.testing.assert_allclose(bundle.decode(codes.astype(kind)), expected, atol=1e-5)


def test_codes_out_of_range_are_told(bundle):
    size = bundle.codebook_sizes[0]
    for wrong in (-1, size, 10**9):
        codes = np.zeros((2, 1, 3), np.int64)
        codes[1, 0, 2] = wrong
        with pytest.raises(UserError, match=f"^codes: codebook 0 has codes 0 to {size - 1}, got {wrong}$"):
            bundle.decode(codes)
    bundle.decode(np.full((1, 1, 1), size - 1))


@pytest.mark.parametrize("shape", [(1, 1, 0), (1, 1, TOKENS + 1), (1, 2, 3), (1, 3), (3,), (0, 1, 2)])
def test_codes_of_another_shape_are_told(bundle, shape):
    with pytest.raises(UserError, match=f"1 to {TOKENS}"):
        bundle.decode(np.zeros(shape, np.int64))


def test_codes_of_another_type_are_told(bundle):
    for codes in (np.zeros((1, 1, 2), np.float32), np.zeros((1, 1, 2), bool), "codes", None):
        with pytest.raises(UserError, match="whole numbers"):
            bundle.decode(codes)


@pytest.mark.parametrize("tokens", [0, -1, TOKENS + 1])
def test_other_numbers_of_tokens_are_told(bundle, tokens):
    with pytest.raises(UserError, match=f"^{tokens} tokens: this codec takes from 1 to {TOKENS}$"):
        bundle.encode(noise(SIZE, SIZE, 3), tokens=tokens)


@pytest.mark.parametrize(
    ("image", "told"),
    [
        (np.zeros((1, 3, SIZE, SIZE + 8), np.float32), "24 x 16 pixels, this codec takes 16 x 16"),
        (np.zeros((3, SIZE, SIZE), np.float32), "float values"),
        (np.zeros((0, 3, SIZE, SIZE), np.float32), "float values"),
        (np.full((1, 3, SIZE, SIZE), np.nan, np.float32), "must be numbers"),
        (np.full((1, 3, SIZE, SIZE), 255.0, np.float32), r"must be numbers in \[-1, 1\]"),
        (np.zeros((1, 3, SIZE, SIZE), np.int64), "uint8 pixels or floats"),
        (np.zeros((SIZE, SIZE), np.uint8), "pixels"),
        (np.zeros((1, 3, SIZE, SIZE), np.uint8), "pixels"),
        ("photo.png", "uint8 pixels or floats"),
    ],
)
def test_wrong_images_are_told(bundle, image, told):
    with pytest.raises(UserError, match=f"^image: .*{told}") as caught:
        bundle.encode(image)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["config.json", "export.json", "onnx/encoder_model.onnx", "onnx/decoder_model.onnx"])
def test_missing_files_are_told(copied, name):
    (copied / name).unlink()
    with pytest.raises(UserError, match=name) as caught:
        load(copied)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["config.json", "onnx/encoder_model.onnx", "onnx/decoder_model.onnx"])
def test_altered_files_are_told(copied, name):
    content = (copied / name).read_bytes()
    (copied / name).write_bytes(content + b" ")
    with pytest.raises(UserError, match=rf"{name}: altered since it was exported"):
        load(copied)


def test_a_damaged_graph_is_told_even_unverified(copied):
    (copied / "onnx" / "decoder_model.onnx").write_bytes(b"no graph")
    bundle = load(copied, verify=False)
    assert bundle.encode(noise(SIZE, SIZE, 3)).shape == (1, 1, TOKENS)
    with pytest.raises(UserError, match=r"decoder_model\.onnx: ONNX Runtime can't read it .*export it again"):
        bundle.decode(np.zeros((1, 1, 1), np.int64))


@pytest.mark.parametrize("version", [0, 3, "1", None])
def test_another_format_is_told(copied, version):
    config = json.loads((copied / "config.json").read_text()) | {"format_version": version}
    (copied / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match=rf"config\.json: format_version {version!r}, .* update varitok"):
        load(copied)


@pytest.mark.parametrize("content", ["{", "[]", "{}", '{"format_version": 2}'])
def test_a_config_that_is_none_is_told(copied, content):
    (copied / "config.json").write_text(content)
    with pytest.raises(UserError, match=r"config\.json: .*export it again"):
        load(copied, verify=False)


def test_what_is_no_bundle_is_told(tmp_path):
    for path in (tmp_path, tmp_path / "nowhere"):
        with pytest.raises(UserError, match=r"is .* a bundle of varitok"):
            varitok.load(path)


def test_an_unknown_provider_is_told(exported):
    with pytest.raises(UserError, match=r"^providers: Abacus is not available; .*CPUExecutionProvider"):
        load(exported[1], providers=["Abacus"])


def test_neither_torch_nor_codecs_are_loaded(exported):
    code = f"""
import sys, numpy, varitok
bundle = varitok.load({str(exported[1])!r})
codes = bundle.encode(numpy.zeros(({SIZE}, {SIZE}, 3), numpy.uint8), tokens=2)
assert bundle.pixels(bundle.decode(codes)).shape == (1, {SIZE}, {SIZE}, 3)
loaded = {{"torch", "varitok.codecs", "onnx", "PIL"}} & set(sys.modules)
sys.exit(f"loaded: {{loaded}}" if loaded else 0)
"""
    environment = {"PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
