"""A bundle of clips: any size, alone and chunk by chunk, with numpy and ONNX Runtime."""

import re
import runpy

import numpy as np
import pytest
import torch

import varitok
from varitok import UserError
from varitok.codecs.streaming import ChunkedCodec
from varitok.export.exporters.bundle import export_bundle

from ...codecs.examples import clip_codec
from .test_examples import write_bundle

NEAR = 1e-4  # of values that are clamped to [-1, 1]; the codec's own reach to 5


# Hand-made graphs, which code the mean of a step; of the exported codecs the causal one has four graphs, two of them
# with states that grow with the frames' size.
CAUSAL = {"causal": True, "looks_ahead": False}


@pytest.fixture(scope="module", params=["hand_made", *(pytest.param(name, marks=pytest.mark.slow) for name in CAUSAL)])
def codec(request):
    return clip_codec(causal=CAUSAL[request.param]) if request.param in CAUSAL else None


@pytest.fixture(scope="module")
def folder(codec, tmp_path_factory):
    path = tmp_path_factory.mktemp("clip") / "bundle"
    if codec is None:
        write_bundle(path, "video")
        return path
    parity = export_bundle(codec, path)["parity"]
    assert {"model.safetensors", "codec.ts", "onnx"} <= set(parity)
    assert {"codec.ts, streaming", "onnx, streaming"} <= set(parity) or not ChunkedCodec(codec).streams
    assert all(one["codes_equal"] == 1 for one in parity.values())
    return path


@pytest.fixture(scope="module")
def bundle(folder):
    return varitok.load(folder)


@pytest.fixture
def exported(codec):
    if codec is None:
        pytest.skip("made by hand")
    return codec


@pytest.fixture
def causal(codec, bundle):
    if codec is not None and not ChunkedCodec(codec).streams:
        pytest.skip("looks ahead")
    return bundle


@pytest.fixture(scope="module")
def clip():
    return np.random.default_rng(0).integers(0, 256, (11, 20, 30, 3), np.uint8)


@pytest.mark.slow
def test_it_codes_as_the_codec(exported, bundle, clip):
    codec = exported
    codes = bundle.encode(clip)
    signal = torch.from_numpy(clip).permute(3, 0, 1, 2)[None] / 127.5 - 1
    with torch.no_grad():
        wanted = codec.encode(signal)
        back = codec.decode(wanted, (11, 20, 30)).clamp(-1, 1)
    assert np.array_equal(codes, wanted.numpy()) and codes.shape[2:] == bundle.grid(11, 20, 30)
    clips = bundle.decode(codes, (11, 20, 30))
    np.testing.assert_allclose(clips, back.numpy(), rtol=0, atol=NEAR)
    assert bundle.pixels(clips).shape == (1, 11, 20, 30, 3)
    assert np.array_equal(bundle.encode(signal.numpy()), codes)
    assert "4 x 8 x 8" in repr(bundle) and bundle.latency_ms == (500 if ChunkedCodec(codec).streams else None)
    assert bundle.frame_rate == 8


def test_large_frames_go_in_tiles(bundle):
    scene = np.random.default_rng(1).integers(0, 256, (5, 6, 9, 3)).repeat(16, 1).repeat(16, 2).astype(np.uint8)
    size = scene.shape[:3]
    codes, tiled = bundle.encode(scene), bundle.encode(scene, tile=64)
    # Not all: those near a seam see the filling beyond it. One of 512 would be equal by chance.
    assert tiled.shape == codes.shape and np.mean(tiled == codes) > 0.75
    signal = np.moveaxis(scene, -1, 0)[None] / np.float32(127.5) - 1
    assert np.array_equal(bundle.encode(signal, tile=64), tiled)
    whole, parts = bundle.decode(codes, size), bundle.decode(codes, size, tile=64)
    off = np.abs(parts - whole)
    assert parts.shape == whole.shape and off.mean() < 0.25 * np.abs(whole).mean()
    assert off[..., :24, :24].max() < NEAR, "far from every seam there is no difference"


@pytest.mark.slow
def test_an_image_is_a_clip_of_one_frame(exported, causal, clip):
    codes = causal.encode(clip[:1])
    assert np.array_equal(codes, causal.encode(clip)[:, :, :1])
    assert causal.decode(codes).shape == (1, 3, 1, 24, 32)


@pytest.mark.parametrize("sizes", [(11,), (1,) * 11, (3, 0, 1, 7), (5, 6)])
def test_it_streams_chunks_of_any_size(causal, clip, sizes):
    bundle = causal
    whole, stream, parts = bundle.encode(clip), bundle.encoding(), []
    begin = 0
    for size in sizes:
        parts.append(stream(clip[begin : begin + size]))
        begin += size
    parts.append(stream.flush())
    assert np.array_equal(np.concatenate([part for part in parts if part.size], axis=2), whole)
    decode, back = bundle.decoding(), []
    for part in parts:
        back.append(decode(part) if part.size else decode(whole[:, :, :0]))
    back.append(decode.flush())
    back = np.concatenate([part for part in back if part.size], axis=2)
    np.testing.assert_allclose(back, bundle.decode(whole), rtol=0, atol=NEAR)


def test_a_stream_begins_anew_after_its_end(causal, clip):
    stream = causal.encoding()
    first = [stream(clip), stream.flush()]
    again = [stream(clip), stream.flush()]
    assert all(np.array_equal(one, other) for one, other in zip(first, again, strict=True))
    with pytest.raises(UserError, match=r"frames of \(20, 30\) before, \(16, 16\) now"):
        stream(clip[:2]), stream(clip[:, :16, :16])


@pytest.mark.slow
def test_one_that_looks_ahead_has_no_stream(exported, bundle):
    if not ChunkedCodec(exported).streams:
        for start in (bundle.encoding, bundle.decoding):
            with pytest.raises(UserError, match="can't stream: it looks ahead"):
                start()


def test_what_it_does_not_take_is_one_line(bundle, clip):
    codes, sizes = bundle.encode(clip), bundle.codebook_sizes
    steps, rows = codes.shape[2:], "1" if len(sizes) == 1 else f"1 to {len(sizes)}"
    for call, message in [
        (lambda: bundle.encode(clip[..., :1]), r"pixels (frames, height, width, 3) are expected, got (11, 20, 30, 1)"),
        (lambda: bundle.encode(clip.astype(np.int32)), "uint8 pixels or floats in [-1, 1] are expected, got int32"),
        (lambda: bundle.encode(np.full((1, 3, 1, 8, 8), 2.0)), "float values must be numbers in [-1, 1]"),
        (lambda: bundle.encode(np.full((1, 3, 1, 8, 8), np.nan)), "float values must be numbers in [-1, 1]"),
        (lambda: bundle.encode(np.zeros((3, 1, 8, 8))), "float values (batch, 3, frames, height, width) are expected"),
        (lambda: bundle.encode(clip[:0]), "1 or more are expected"),
        (lambda: bundle.encode(clip, tile=8), "tile=8: tiles must have at least two steps, 16 pixels"),
        (lambda: bundle.encode(clip, tokens=2), "the number of tokens follows from the signal's size"),
        (lambda: bundle.encode(clip, num_codebooks=3), f"3 codebooks: this codec has {len(sizes)}"),
        (lambda: bundle.decode(codes[0]), f"shape (batch, {rows}, frames, rows, columns) is expected"),
        (lambda: bundle.decode(codes + sizes[0]), f"codebook 0 has codes 0 to {sizes[0] - 1}"),
        (lambda: bundle.decode(codes, (5, 20, 30)), f"size: (5, 20, 30) has codes (2, 3, 4), these are {steps}"),
    ]:
        with pytest.raises(UserError, match=re.escape(message)):
            call()


@pytest.mark.slow
def test_examples_of_the_card_run(exported, folder, monkeypatch):
    chunked = ChunkedCodec(exported)
    text = (folder / "README.md").read_text()
    assert ("an image is a clip of one frame" in text) == chunked.streams
    monkeypatch.chdir(folder)
    blocks = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    assert len(blocks) == (4 if chunked.streams else 3)
    for block in blocks:
        (folder.parent / "example.py").write_text(block)
        runpy.run_path(str(folder.parent / "example.py"))
