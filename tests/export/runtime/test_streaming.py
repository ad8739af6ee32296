"""A bundle's streaming graphs: sound in chunks of any size gives what the whole sound gives."""

import json
import shutil
from functools import partial

import numpy as np
import onnxruntime
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import varitok
from varitok import UserError
from varitok.codecs.bottlenecks.fsq import FiniteScalarQuantizer
from varitok.codecs.bottlenecks.multirate import multirate
from varitok.codecs.bottlenecks.residual import residual
from varitok.codecs.bottlenecks.vq import VectorQuantizer
from varitok.codecs.codec import Codec
from varitok.codecs.lengths.distributions import Full
from varitok.codecs.lengths.policy import LengthPolicy, Truncate
from varitok.codecs.networks.conv_codec import ConvDecoder, ConvEncoder
from varitok.codecs.networks.layers.recurrent import Recurrent
from varitok.codecs.networks.layers.sequence import SequenceTransformer
from varitok.codecs.networks.patch_codec import PatchDecoder, PatchEncoder
from varitok.codecs.networks.vocos import VocosDecoder
from varitok.codecs.streaming import ChunkedCodec
from varitok.export.exporters.bundle import export_bundle
from varitok.export.exporters.frozen import FrozenStream, freeze
from varitok.export.exporters.torchscript import load_torchscript
from varitok.export.runtime.files import SignalFile
from varitok.export.runtime.load import load
from varitok.export.runtime.memory import PROCESS, decode_within, encode_within

from ...codecs.examples import sound_codec

RATE = 8000


def _seanet() -> Codec:
    """A recurrent layer, residual codebooks, and a hop of 30 samples, which doesn't divide 20 ms."""
    sizes = {"width": 16, "base": 4, "strides": [2, 3, 5], "causal": True, "activation": "elu"}
    encoder, decoder = ConvEncoder(**sizes, inner=Recurrent(32)), ConvDecoder(**sizes, inner=Recurrent(32))
    return _codec(encoder, residual(partial(VectorQuantizer, 8, 32), 3), decoder)


def _mimi() -> Codec:
    """A transformer within convolutions, and codebooks of two rates."""
    sizes = {"width": 16, "base": 4, "strides": [4, 5], "causal": True, "resample": 2}
    middle = partial(SequenceTransformer, 16, 2, 2, causal=True, window=6, layer_scale=1.0)
    encoder, decoder = ConvEncoder(**sizes, middle=middle()), ConvDecoder(**sizes, middle=middle())
    return _codec(encoder, multirate(partial(VectorQuantizer, 8, 32), [2, 1]), decoder)


def _taae() -> Codec:
    """Transformers alone on both sides."""
    sizes = {"width": 8, "base": 16, "patch": 20, "strides": [1, 2], "depths": [1, 1], "heads": 2, "window": 5}
    encoder, decoder = (
        kind(**sizes, causal=True, layer_scale=1.0)  # type: ignore[operator]
        for kind in (PatchEncoder, PatchDecoder)
    )
    return _codec(encoder, FiniteScalarQuantizer([8, 5, 5]), decoder)


def _vocos() -> Codec:
    """An inverse Fourier transform, for two channels."""
    encoder = ConvEncoder(width=16, base=4, strides=[4, 5], channels=2, causal=True)
    decoder = VocosDecoder(width=16, base=16, hidden=32, depth=2, hop_length=20, window=80, channels=2, causal=True)
    return _codec(encoder, FiniteScalarQuantizer([8, 5, 5]), decoder)


KINDS = {"seanet": _seanet, "mimi": _mimi, "taae": _taae, "vocos": _vocos}
# Each is four exports.
PARAMETERS = [pytest.param(kind, marks=pytest.mark.slow) for kind in KINDS]  # each takes half a minute to export


def _codec(encoder, bottleneck, decoder) -> Codec:
    codec = Codec(encoder, bottleneck, decoder, LengthPolicy(Full(), Truncate()), sample_rate=RATE)
    with torch.no_grad():
        for weight in (weight for weight in codec.parameters() if weight.ndim == 1):
            weight.add_(0.1 * torch.randn_like(weight))
    return codec.eval()


@pytest.fixture(scope="module", params=PARAMETERS)
def exported(request, tmp_path_factory):
    """Return a codec, its bundle's folder and the report."""
    torch.manual_seed(0)
    codec = KINDS[request.param]()
    folder = tmp_path_factory.mktemp("stream") / "bundle"
    return codec, folder, export_bundle(codec, folder)


@pytest.fixture(scope="module")
def bundle(exported):
    return varitok.load(exported[1])


def _sound(codec: Codec, seconds: float, batch: int = 1) -> np.ndarray:
    """Make something like speech: a gliding tone with overtones and noise, now loud and now quiet."""
    time = np.arange(round(seconds * RATE)) / RATE
    random = np.random.default_rng(0)
    pitch = 2 * np.pi * np.cumsum(120 + 40 * np.sin(2 * np.pi * 0.7 * time)) / RATE
    tone = sum(np.sin(k * pitch) / k for k in range(1, 8)) / 4
    noise = random.uniform(-0.3, 0.3, (batch, codec.encoder.channels, len(time)))
    sound = (tone + noise) * (0.5 + 0.5 * np.sin(2 * np.pi * 1.3 * time))
    return np.clip(sound, -1, 1).astype(np.float32)


def test_every_artifact_streams_as_the_codec_codes(exported):
    codec, folder, report = exported
    chunked = ChunkedCodec(codec)
    assert {"codec.ts, streaming", "onnx, streaming"} <= set(report["parity"])
    assert all(parity["codes_equal"] == 1 for parity in report["parity"].values())
    about = json.loads((folder / "config.json").read_text())["streaming"]
    assert (about["encoder_state_size"], about["decoder_state_size"]) == chunked.state_sizes()
    assert about["latency_ms"] == 1000 * chunked.latency / RATE and about["chunk_samples"] == chunked.latency


def test_a_client_streams_ten_seconds_in_chunks_of_20_ms(exported, bundle):
    """With nothing but ONNX Runtime, as README's readers would: whole hops, a state in, the next state out."""
    codec, folder, _ = exported
    sound = _sound(codec, 10)
    encoder, decoder = (
        onnxruntime.InferenceSession(folder / "onnx" / f"{name}_model_streaming.onnx")
        for name in ("encoder", "decoder")
    )
    about = bundle.config["streaming"]
    states = [np.zeros((1, about[f"{side}_state_size"]), np.float32) for side in ("encoder", "decoder")]
    waiting, codes, signal = np.zeros((1, codec.encoder.channels, 0), np.float32), [], []
    each, whole = RATE // 50, about["chunk_samples"]
    for begin in range(0, sound.shape[2], each):
        waiting = np.concatenate([waiting, sound[:, :, begin : begin + each]], axis=2)
        ready = waiting.shape[2] // whole * whole
        if not ready and begin + each < sound.shape[2]:
            continue
        ready = ready if begin + each < sound.shape[2] else waiting.shape[2]
        chunk, waiting = waiting[:, :, :ready], waiting[:, :, ready:]
        found, states[0] = encoder.run(None, {"input_values": chunk, "state": states[0]})
        made, states[1] = decoder.run(None, {"audio_codes": found, "state": states[1]})
        codes.append(found)
        signal.append(made)
    with torch.no_grad():
        expected = codec.encode(torch.from_numpy(sound))
        painted = codec.decode(expected).clamp(-1, 1)
    np.testing.assert_array_equal(np.concatenate(codes, axis=2), expected.numpy())
    np.testing.assert_array_equal(np.concatenate(codes, axis=2), bundle.encode(sound, RATE))
    np.testing.assert_allclose(np.concatenate(signal, axis=2), painted.numpy(), atol=1e-5)


@settings(max_examples=12)
@given(
    samples=st.integers(1, 700), cuts=st.lists(st.integers(0, 260), max_size=6), batch=st.integers(1, 3),
    tokens=st.lists(st.integers(0, 5), max_size=6),
)  # fmt: skip
def test_chunks_of_any_number_of_samples(exported, bundle, samples, cuts, batch, tokens):
    codec = exported[0]
    sound = _sound(codec, samples / RATE, batch)
    codebooks = max(1, codec.num_codebooks - 1)
    coding, painting = bundle.encoding(RATE, num_codebooks=codebooks, batch=batch), bundle.decoding(batch=batch)
    codes = bundle.encode(sound, RATE, num_codebooks=codebooks)
    for _ in range(2):  # a stream that was flushed is as good as new
        parts = [coding(part) for part in np.split(sound, np.clip(np.cumsum(cuts, dtype=int), 0, samples), axis=2)]
        parts.append(coding.flush())
        np.testing.assert_array_equal(np.concatenate(parts, axis=2), codes)
        places = np.clip(np.cumsum(tokens, dtype=int), 0, codes.shape[2])
        signals = [painting(part) for part in np.split(codes, places, axis=2)]
        signals.append(painting.flush())
        np.testing.assert_allclose(np.concatenate(signals, axis=2), bundle.decode(codes), atol=1e-5)
    assert coding.flush().shape == (batch, codebooks, 0) and painting.flush().shape[2] == 0


@settings(max_examples=8)
@given(samples=st.integers(1, 4000), share=st.floats(0, 1))
def test_files_are_coded_in_chunks_as_the_whole(exported, bundle, samples, share):
    sound = _sound(exported[0], samples / RATE)
    bundle.memory = dict.fromkeys(("encoder", "decoder"), (0.0, 4e3**share, 0.0))
    little = PROCESS + 0.01  # GB
    coded = encode_within(bundle, SignalFile(samples, lambda _: iter([sound])), little)
    codes = bundle.encode(sound, RATE)
    np.testing.assert_array_equal(coded.codes, codes)
    back = np.concatenate(list(decode_within(bundle, codes, (samples,), little)), axis=2)
    np.testing.assert_allclose(back, bundle.decode(codes)[:, :, :samples], atol=1e-5)


def test_torchscript_streams(exported):
    codec, folder, _ = exported
    chunked = ChunkedCodec(codec)
    module, _ = load_torchscript(folder / "codec.ts")
    sound = torch.from_numpy(_sound(codec, 0.2, 2))
    assert module.state_sizes() == chunked.state_sizes()
    state, back = (torch.zeros(2, size) for size in module.state_sizes())
    codes, signal = [], []
    for chunk in sound.split(3 * chunked.latency, dim=2):
        found, state = module.encode_chunk(chunk, state)
        made, back = module.decode_chunk(found, back)
        codes.append(found)
        signal.append(made)
    with torch.no_grad():
        expected = codec.encode(sound)
        assert torch.equal(torch.cat(codes, 2), expected)
        torch.testing.assert_close(torch.cat(signal, 2), codec.decode(expected).clamp(-1, 1), atol=1e-5, rtol=0)


def test_mistakes_are_told(exported, bundle):
    codec = exported[0]
    channels, hop = codec.encoder.channels, ChunkedCodec(codec).latency
    with pytest.raises(UserError, match="resample the audio first"):
        bundle.encoding(RATE + 1)
    with pytest.raises(UserError, match="batch=0"):
        bundle.decoding(batch=0)
    coding = bundle.encoding(RATE)
    whole = coding(np.zeros((channels, 2 * hop), np.float32))
    with pytest.raises(UserError, match="must be numbers"):
        coding(np.full((channels, 3), np.nan, np.float32))
    with pytest.raises(UserError, match="batch size is 1, got 2"):
        coding(np.zeros((2, channels, 3), np.float32))
    # What was refused left no trace.
    more = coding(np.zeros((channels, hop), np.float32))
    together = bundle.encode(np.zeros((channels, 3 * hop), np.float32), RATE)
    np.testing.assert_array_equal(np.concatenate([whole, more], axis=2), together)
    with pytest.raises(UserError, match="codebook 0 has codes 0 to"):
        bundle.decoding()(np.full((1, codec.num_codebooks, 1), -1))


def test_streaming_can_be_left_out(exported, tmp_path):
    codec = exported[0]
    report = export_bundle(codec, tmp_path / "bundle", formats=["torchscript"], streaming=False)
    assert (
        set(report["parity"]) == {"codec.ts"} and "streaming" not in (tmp_path / "bundle" / "config.json").read_text()
    )


def test_a_codec_that_looks_ahead_has_no_stream(exported, tmp_path):
    assert not isinstance(freeze(sound_codec().eval()), FrozenStream)
    shutil.copytree(exported[1], tmp_path / "bundle")
    about = json.loads((tmp_path / "bundle" / "config.json").read_text())
    del about["streaming"]
    (tmp_path / "bundle" / "config.json").write_text(json.dumps(about))
    bundle = load(tmp_path / "bundle", verify=False)
    assert bundle.latency_ms is None
    for start in (lambda: bundle.encoding(RATE), bundle.decoding):
        with pytest.raises(UserError, match="this codec can't stream: it looks ahead"):
            start()
