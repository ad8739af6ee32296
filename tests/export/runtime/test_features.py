"""A bundle of feature clips: floats of any size in and out, fewer tokens behind the first frame, no pixels."""

import copy
import re

import numpy as np
import pytest
import torch

import varitok
from varitok import UserError
from varitok.codecs.evaluation.evaluate import evaluate
from varitok.data.batch import Sample, collate
from varitok.export.adapters.codec import BundleCodec
from varitok.export.exporters.bundle import export_bundle
from varitok.export.runtime.features import FeatureBundle

from ...codecs.metrics.test_feature import CHANNELS, FIRST, LATER, SIZE, clip, tiny

pytestmark = pytest.mark.slow  # a bundle takes long to export, and this one is a clip's but for its face


@pytest.fixture(scope="module")
def codec():
    made = copy.deepcopy(tiny(unit_latents=True, depth=1))
    with torch.no_grad():
        made.decoder.map.weight.mul_(20)  # so that what comes back is far beyond [-1, 1]
        made.feature_mean.copy_(torch.arange(CHANNELS))
        made.feature_deviation.fill_(4)
    return made


@pytest.fixture(scope="module")
def folder(codec, tmp_path_factory):
    path = tmp_path_factory.mktemp("features") / "bundle"
    parity = export_bundle(codec, path)["parity"]
    assert set(parity) == {"model.safetensors", "codec.ts", "onnx"}
    assert all(one["codes_equal"] == 1 for one in parity.values())
    return path


@pytest.fixture(scope="module")
def bundle(folder):
    return varitok.load(folder)


def test_it_codes_as_the_codec(codec, folder, bundle):
    signal = 3 * clip(4)
    with torch.no_grad():
        wanted = codec.encode(signal)
        back = codec.decode(wanted)
    assert isinstance(bundle, FeatureBundle)
    codes = bundle.encode(signal.numpy())
    assert np.array_equal(codes, wanted.numpy())
    decoded = bundle.decode(codes, (4, *SIZE))
    np.testing.assert_allclose(decoded, back.numpy(), rtol=0, atol=1e-4)
    assert np.abs(decoded).max() > 2, "features are not clamped"
    script = torch.jit.load(folder / "codec.ts")
    assert torch.equal(script.encode(signal), wanted)
    torch.testing.assert_close(script.decode(wanted), back, rtol=0, atol=1e-4)


def test_blocks_have_their_own_numbers_of_tokens(bundle):
    assert bundle.later_tokens == LATER and "FeatureBundle" in repr(bundle) and "up to 7" in repr(bundle)
    codes = bundle.encode(clip(4).numpy())
    assert bundle.valid(codes).tolist() == [FIRST, LATER, LATER, LATER]
    assert bundle.valid(bundle.encode(clip(4).numpy(), tokens=2)).tolist() == [2] * 4
    changed = codes.copy()
    changed[:, :, 1:, LATER:] = 0
    np.testing.assert_allclose(bundle.decode(changed), bundle.decode(codes), rtol=0, atol=1e-5)
    assert sum(bundle.bits(int(count)) for count in bundle.valid(codes)) == 9 * (FIRST + 3 * LATER)


def test_features_are_standardised_by_what_was_measured_in_training(bundle):
    features = 4 * clip(2).numpy() + np.arange(CHANNELS).reshape(-1, 1, 1, 1)
    standardized = bundle.standardize(features.astype(np.float32))
    np.testing.assert_allclose(standardized, clip(2).numpy(), atol=1e-6)
    np.testing.assert_allclose(bundle.restore_scale(standardized), features, atol=1e-5)


def test_what_it_does_not_take_is_one_line(bundle):
    signal = clip(2).numpy()
    for call, message in [
        (lambda: bundle.encode(np.zeros((2, *SIZE, CHANNELS), np.uint8)), "features are expected, floats (batch, 6,"),
        (lambda: bundle.encode(signal[0]), "(batch, 6, frames, rows, columns) are expected, got (6, 2, 3, 5)"),
        (lambda: bundle.encode(signal[:, :3]), "are expected, got (2, 3, 2, 3, 5)"),
        (lambda: bundle.encode(signal[..., :4]), "4 x 3 positions, this codec takes 5 x 3"),
        (lambda: bundle.encode(signal * np.nan), "some are NaN or infinite"),
        (lambda: bundle.encode(signal[:, :, :0]), "1 or more are expected"),
        (lambda: bundle.encode(signal, tile=2), "frames have a fixed size"),
        (lambda: bundle.pixels(signal), "decodes to features"),
        (bundle.encoding, "can't stream"),
    ]:
        with pytest.raises(UserError) as told:
            call()
        assert message in str(told.value) and "\n" not in str(told.value)


def test_examples_of_the_card_run(folder, monkeypatch):
    text = (folder / "README.md").read_text()
    monkeypatch.chdir(folder)
    for example in re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL):
        exec(example, {})
    assert "feature clips" in text and "block but the first has 3 at most" in text and "pixel" not in text
    assert "| 7 | 1.8 |" in text, "of a long clip: 3 tokens of 9 bits for 15 positions"


def test_it_streams(tmp_path):
    codec = tiny("mask_token", window=2)
    assert "onnx, streaming" in export_bundle(codec, tmp_path / "bundle")["parity"]
    bundle, signal = varitok.load(tmp_path / "bundle"), clip(5).numpy()
    encode, decode, codes = bundle.encoding(batch=2), bundle.decoding(batch=2), bundle.encode(signal)
    parts = [encode(signal[:, :, :1]), encode(signal[:, :, 1:3]), encode(signal[:, :, 3:])]
    assert np.array_equal(np.concatenate(parts, axis=2), codes)
    frames = [decode(part) for part in parts]
    np.testing.assert_allclose(np.concatenate(frames, axis=2), bundle.decode(codes), rtol=0, atol=1e-4)


@torch.no_grad()
def test_it_is_measured_as_its_codec(codec, bundle):
    batches = [collate([Sample(3 * one)]) for one in clip(4)]
    own, theirs = (evaluate(one, batches).rows for one in (codec, BundleCodec(bundle)))
    assert len({row["bits"] for row in own}) == len(own) > 1  # though later blocks have fewer tokens
    for mine, other in zip(own, theirs, strict=True):
        assert mine == pytest.approx(other, rel=1e-3, nan_ok=True)
