"""A bundle of a codec of sounds."""

import copy
import pickle
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import varitok
from varitok import UserError
from varitok.codecs.build import build_codec
from varitok.codecs.evaluation.evaluate import evaluate
from varitok.data.batch import Sample, collate
from varitok.export.adapters.codec import BundleCodec
from varitok.export.exporters.bundle import export_bundle

from ...codecs.examples import HOP, RATE
from ...composing import composed

ROOT = Path(varitok.__file__).parents[1]


@pytest.fixture(scope="module")
def exported(exported_sounds):
    return exported_sounds


@pytest.fixture(scope="module")
def bundle(exported):
    return varitok.load(exported[1])


def test_every_artifact_agrees(exported):
    _, _, report = exported
    assert set(report["parity"]) == {"model.safetensors", "codec.ts", "onnx"}
    assert all(parity["codes_equal"] == 1 for parity in report["parity"].values())


@torch.no_grad()
@settings(max_examples=15, deadline=None)
@given(batch=st.integers(1, 3), samples=st.integers(1, 6 * HOP), codebooks=st.integers(1, 4))
def test_any_length_and_any_depth(exported, bundle, batch, samples, codebooks):
    codec = exported[0]
    sound = torch.rand(batch, 1, samples, generator=torch.Generator().manual_seed(0)) * 2 - 1
    codes = bundle.encode(sound.numpy(), RATE, num_codebooks=codebooks)
    np.testing.assert_array_equal(codes, codec.encode(sound)[:, :codebooks].numpy())
    expected = codec.decode(torch.from_numpy(codes)).clamp(-1, 1)
    np.testing.assert_allclose(bundle.decode(codes), expected.numpy(), atol=1e-5)


@pytest.mark.slow
@torch.no_grad()
def test_steps_come_in_multiples_of_windows_and_coarse_codes(tmp_path):
    """SNAC, whose decoder adds noise."""
    torch.manual_seed(0)
    narrow = ["encoder.base=4", "encoder.width=16", "encoder.strides=[2,3]", "encoder.multiple=8", "decoder.base=4"]
    narrow += [
        f"{side}.inner.{size}" for side in ("encoder", "decoder") for size in ("width=16", "heads=2", "window=4")
    ]
    words = [f"codec.{word}" for word in narrow] + ["bottleneck.level.dim=16", "bottleneck.level.codebook_size=16"]
    codec = build_codec(composed("experiment=audio/snac_44k", *words)).eval()
    export_bundle(codec, tmp_path / "snac", formats=("onnx",))
    bundle = varitok.load(tmp_path / "snac")
    assert bundle.multiple == bundle.group == 8 and codec.downsample == (6,)
    for samples in (1, 48, 100):
        sound = torch.rand(1, 1, samples) * 2 - 1
        codes = bundle.encode(sound.numpy(), 44100)
        np.testing.assert_array_equal(codes, codec.encode(sound).numpy())
        assert bundle.steps_of(np.array([samples]), 0).tolist() == [codes.shape[2]]
        assert BundleCodec(bundle).layout.grid((samples,)) == [codes.shape[2]]
        wanted = codec.decode(torch.from_numpy(codes)).clamp(-1, 1)
        np.testing.assert_allclose(bundle.decode(codes), wanted.numpy(), atol=1e-5)


def test_a_bundle_is_pickled_before_and_after_use(exported):
    """As a data set's worker process gets it."""
    sound = np.sin(np.arange(3 * HOP) / 5).astype(np.float32)
    fresh = varitok.load(exported[1])
    used = pickle.loads(pickle.dumps(fresh))
    codes = used.encode(sound, RATE)
    decoded = used.decode(codes)
    again = pickle.loads(pickle.dumps(used))
    np.testing.assert_array_equal(again.encode(sound, RATE), codes)
    np.testing.assert_array_equal(copy.deepcopy(again).decode(codes), decoded)


def test_other_ways_to_give_a_sound(bundle):
    sound = np.sin(np.arange(3 * HOP) / 5).astype(np.float32) * 0.5
    codes = bundle.encode(sound, RATE)
    np.testing.assert_array_equal(codes, bundle.encode(sound[None], RATE))
    assert (bundle.encode((sound * 32768).astype(np.int16), RATE) == codes).mean() > 0.9
    assert bundle.bits(codes.shape[2]) == codes.shape[2] * 20
    assert f"{RATE} Hz" in repr(bundle)


@pytest.mark.parametrize(
    ("sound", "rate", "told"),
    [
        (np.zeros(100, np.float32), RATE + 1, "resample the audio first"),
        (np.zeros((2, 100), np.float32), RATE, r"\(batch, 1, 1 or more\)"),
        (np.zeros(0, np.float32), RATE, "1 or more"),
        (np.zeros(100, np.int32), RATE, "floats in .* or int16"),
        (np.full(100, np.nan, np.float32), RATE, "must be numbers"),
        (np.full(100, 2.0, np.float32), RATE, r"must be numbers in \[-1, 1\]"),
    ],
)
def test_wrong_sounds_are_told(bundle, sound, rate, told):
    with pytest.raises(UserError, match=told):
        bundle.encode(sound, rate)


def test_wrong_codes_are_told(bundle):
    with pytest.raises(UserError, match="5 codebooks: this codec has 4"):
        bundle.encode(np.zeros(100, np.float32), RATE, num_codebooks=5)
    with pytest.raises(UserError, match="codebook 1 has codes 0 to 31, got 32"):
        bundle.decode(np.array([[[0], [32]]]))
    with pytest.raises(UserError, match="0 tokens: this codec takes from 1 on"):
        bundle.decode(np.zeros((1, 4, 0), np.int64))


@pytest.mark.slow  # a process that loads torch
def test_examples_of_the_card_run(exported):
    _, folder, _ = exported
    examples = re.findall(r"```python\n(.*?)```", (folder / "README.md").read_text(), flags=re.DOTALL)
    assert len(examples) == 3
    for example in examples:
        done = subprocess.run(
            [sys.executable, "-W", "ignore", "-c", f"{example}assert back.shape == (1, 1, {RATE}), back.shape"],
            cwd=folder, env={"PYTHONPATH": str(ROOT)}, capture_output=True, text=True, check=False,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr


def test_it_is_measured_as_its_codec(exported, bundle):
    batches = [collate([Sample(torch.rand(1, samples) - 0.5)]) for samples in (9 * HOP + 3, 1000)]
    own, theirs = (evaluate(one, batches).rows for one in (exported[0], BundleCodec(bundle)))
    assert own[0]["bytes"] > 0 and [row.keys() for row in own] == [row.keys() for row in theirs]
    for mine, other in zip(own, theirs, strict=True):
        assert mine == pytest.approx(other, rel=1e-4, nan_ok=True)
