"""Codecs that look back only code chunk by chunk what they code whole: the same codes, the same signal."""

from functools import cache, partial
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from varitok import UserError
from varitok.codecs.bottlenecks.contract import Bottleneck
from varitok.codecs.bottlenecks.fsq import FiniteScalarQuantizer
from varitok.codecs.bottlenecks.multirate import multirate
from varitok.codecs.bottlenecks.residual import residual
from varitok.codecs.bottlenecks.vq import VectorQuantizer
from varitok.codecs.build import build
from varitok.codecs.codec import Codec
from varitok.codecs.lengths.distributions import Full
from varitok.codecs.lengths.policy import LengthPolicy, Truncate
from varitok.codecs.networks.layers.convolution import Convolution, TransposedConvolution
from varitok.codecs.streaming import ChunkedCodec, arrange, pack, state_size, unpack

from ..composing import composed
from .examples import read_config, sound_codec, tiny_codec

FOLDER = Path(__file__).parents[2] / "configs" / "codec"
# Audio only: video is tested in test_resnet.py.
CLIPS = ("adaptok", "bsq_vit", "cosmos", "hitvideo", "landiff", "magvit2", "omnitokenizer", "vidtok")
NAMES = sorted(path.stem for path in FOLDER.glob("*.yaml") if not path.stem.startswith(CLIPS))
CONV = ["encoder.base=4", "encoder.width=16"]
LSTM = [*CONV, "encoder.inner.width=64"]
TAAE = ["encoder.width=16", "encoder.base=16", "encoder.patch=10", "encoder.heads=2", "encoder.layer_scale=1"]
VOCOS = [*CONV, "decoder.base=16", "decoder.hidden=24", "decoder.depth=2", "decoder.attention=false"]
# A preset's structure at a size at which a test takes no time; a transformer's start would hide its mistakes.
SMALLER = {
    "seanet": LSTM,
    "seanet_mimi": [
        *(*CONV, "encoder.middle.depth=2", "encoder.middle.hidden=24", "encoder.middle.window=5"),
        "encoder.middle.layer_scale=1",
    ],
    "seanet_small": CONV,
    "seanet_soundstream": CONV,
}
# What can be causal, but isn't in its preset.
MADE_CAUSAL = {
    "dac": [*CONV, "decoder.base=4"],
    "seanet_music": LSTM,
    "seanet_stereo": [*LSTM, "encoder.norm=weight"],
    "taae": [*TAAE, "encoder.depths=[1,2]", "encoder.window=4"],
    "vocos": [*VOCOS, "encoder.inner.width=64"],
}
LOCAL = [
    "encoder.inner.width=64",
    "encoder.inner.heads=1",
    "decoder.base=4",
    "decoder.inner.width=64",
    "decoder.inner.heads=1",
]
BOTTLENECKS = {
    "fsq": lambda: FiniteScalarQuantizer([8, 5, 5]),
    "rvq": lambda: residual(partial(VectorQuantizer, 6, 21), 3),
    "vq": lambda: VectorQuantizer(5, 37),
}


@cache
def _config(name: str, *overrides: str):
    return composed("data=voices", f"codec={name}", *(f"codec.{override}" for override in overrides)).codec


@cache
def _codec(name: str) -> Codec:
    """Build a preset at a small size, causal, every weight and bias at work; bottlenecks take turns."""
    bottleneck = sorted(BOTTLENECKS)[[*SMALLER, *MADE_CAUSAL].index(name) % len(BOTTLENECKS)]
    more = SMALLER.get(name) or [*MADE_CAUSAL[name], "encoder.causal=true"]
    torch.manual_seed(0)
    config = _config(name, *more)
    codec: Codec = build(config, bottleneck=BOTTLENECKS[bottleneck](), length=LengthPolicy(Full(), Truncate()))
    return _awake(codec)


def _awake(codec: Codec) -> Codec:
    with torch.no_grad():
        for weight in (weight for weight in codec.parameters() if weight.ndim == 1):
            weight.add_(0.1 * torch.randn_like(weight))
    return codec.eval()


def _cut(total: int, cuts: list[int], whole: int) -> list[int]:
    """Cut a length into chunks of multiples of `whole`; the rest comes last."""
    sizes = []
    for cut in cuts:
        if total > cut * whole:
            sizes.append(cut * whole)
            total -= cut * whole
    return [*sizes, total]


def _check(codec: Codec, sound: Tensor, cuts: list[int]) -> None:
    chunked = ChunkedCodec(codec)
    with torch.no_grad():
        codes = codec.encode(sound)
        signal = codec.decode(codes)
        state, found = None, []
        chunks = sound.split(_cut(sound.shape[2], cuts, chunked.latency), dim=2)
        for chunk in chunks:
            part, state = chunked.encode_chunk(chunk, state, last=chunk is chunks[-1])
            found.append(part)
            assert part.shape[2] == -(-chunk.shape[2] // codec.downsample[0])
            assert state.shape == (len(sound), chunked.state_sizes()[0]) and state.dtype == torch.float32
        assert torch.equal(torch.cat(found, 2), codes)
        state, made = None, []
        parts = codes.split(_cut(codes.shape[2], cuts, chunked.chunk_tokens), dim=2)
        for index, part in enumerate(parts):
            painted, state = chunked.decode_chunk(part, state, last=index == len(parts) - 1)
            made.append(painted)
            assert state.shape == (len(sound), chunked.state_sizes()[1])
        torch.testing.assert_close(torch.cat(made, 2), signal, atol=1e-5, rtol=0)


CHUNKINGS = st.lists(st.integers(1, 4), max_size=7)


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=[pytest.mark.slow] * (n == "dac")) for n in (*SMALLER, *MADE_CAUSAL)]
)
@settings(max_examples=3)
@given(tokens=st.integers(1, 11), short=st.floats(0, 1), cuts=CHUNKINGS)
def test_chunks_are_the_whole(name: str, tokens: int, short: float, cuts: list[int]) -> None:
    codec = _codec(name)
    samples = tokens * codec.downsample[0] - int(short * (codec.downsample[0] - 1))
    sound = torch.rand(2, codec.encoder.channels, samples) * 2 - 1
    _check(codec, sound, cuts)


@pytest.mark.parametrize("name", [*SMALLER, *MADE_CAUSAL])
def test_what_was_before_matters(name: str) -> None:
    """Without this, a codec whose state did nothing would pass."""
    codec = _codec(name)
    chunked = ChunkedCodec(codec)
    sound = torch.rand(1, codec.encoder.channels, 2 * codec.downsample[0]) * 2 - 1
    with torch.no_grad():
        first, second = sound.chunk(2, dim=2)
        _, state = chunked.encode_chunk(first)
        assert state.any()
        assert not torch.equal(chunked.encode_chunk(second, state)[1], chunked.encode_chunk(second)[1])
        one, two = codec.encode(sound).chunk(2, dim=2)
        _, state = chunked.decode_chunk(one)
        assert not torch.allclose(chunked.decode_chunk(two, state)[0], chunked.decode_chunk(two)[0])


def test_every_causal_preset_streams_and_no_other() -> None:
    alone = {name: read_config("codec", name) for name in NAMES}  # without the rest of a run
    causal = [name for name, config in alone.items() if config.get("encoder", {}).get("causal", False)]
    assert sorted(SMALLER) == causal
    for name in SMALLER:
        chunked = ChunkedCodec(_codec(name))
        assert chunked.streams and not chunked.obstacle
        assert chunked.latency == _codec(name).downsample[0]


@settings(max_examples=10)
@given(tokens=st.integers(1, 11), cuts=CHUNKINGS)
def test_codebooks_of_several_rates(tokens: int, cuts: list[int]) -> None:
    torch.manual_seed(0)
    config = _config("seanet_small", *CONV, "encoder.strides=[2,3]")
    bottleneck = multirate(partial(VectorQuantizer, 6, 21), [4, 2, 1])
    codec = _awake(build(config, bottleneck=bottleneck, length=LengthPolicy(Full(), Truncate())))
    chunked = ChunkedCodec(codec)
    assert chunked.latency == 24 and chunked.chunk_tokens == 4
    _check(codec, torch.rand(2, 1, tokens * 6 - 2) * 2 - 1, cuts)
    with pytest.raises(UserError, match="chunk of 6 samples: it should have a multiple of 24"):
        chunked.encode_chunk(torch.zeros(1, 1, 6))
    with pytest.raises(UserError, match="chunk of 2 tokens: it should have a multiple of 4"):
        chunked.decode_chunk(torch.zeros(1, 3, 2, dtype=torch.int64))


def test_a_state_is_not_changed_and_says_all() -> None:
    codec = _codec("seanet")
    chunked = ChunkedCodec(codec)
    sound = torch.rand(2, 1, 3 * codec.downsample[0]) * 2 - 1
    with torch.no_grad():
        _, state = chunked.encode_chunk(sound)
        kept = state.clone()
        once, after = chunked.encode_chunk(sound, state)
        again, same = chunked.encode_chunk(sound, state)
        assert torch.equal(state, kept) and torch.equal(once, again) and torch.equal(after, same)
        # Each sample's state is its own: they may be taken apart and put together.
        alone, rest = chunked.encode_chunk(sound[1:], state[1:])
        assert torch.equal(alone, once[1:])
        torch.testing.assert_close(rest, after[1:], atol=1e-6, rtol=1e-6)
        zeros, _ = chunked.encode_chunk(sound, torch.zeros_like(state))
        assert torch.equal(zeros, chunked.encode_chunk(sound)[0])


class _OneLayer(nn.Module):
    """A layer behind another name, to be given its place."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor, memory: list[Tensor] | None = None) -> Tensor:
        y: Tensor = self.layer(x, None, memory)
        return y


@pytest.mark.parametrize("transposed", [False, True])
@settings(max_examples=25)
@given(
    dims=st.integers(1, 3), kernel=st.integers(1, 5), stride=st.integers(1, 3), dilation=st.integers(1, 3),
    cuts=st.lists(st.integers(1, 3), min_size=1, max_size=4),
)  # fmt: skip
def test_layers_of_any_axes_go_on_along_the_first(
    transposed: bool, dims: int, kernel: int, stride: int, dilation: int, cuts: list[int]
) -> None:
    torch.manual_seed(0)
    kernels, strides = [max(kernel, stride)] + [3] * (dims - 1), [stride] + [1] * (dims - 1)
    layer: nn.Module
    if transposed:
        layer, each = TransposedConvolution(2, 3, kernels, strides, dims=dims, causal=True), 1
    else:
        dilations = [dilation] + [1] * (dims - 1)
        layer, each = Convolution(2, 3, kernels, strides, dilations, dims=dims, causal=True), stride
    network = _OneLayer(layer)
    x = torch.randn(2, 2, sum(cuts) * each, *[4, 5][: dims - 1])
    with torch.no_grad():
        shapes = arrange(network, lambda memory: network(x[:1, :, :each], memory))
        state, parts = torch.zeros(2, state_size(shapes)), []
        for chunk in x.split([cut * each for cut in cuts], dim=2):
            memory = unpack(state, shapes)
            parts.append(network(chunk, memory))
            state = pack(memory, shapes, state)
        torch.testing.assert_close(torch.cat(parts, 2), network(x), atol=1e-6, rtol=1e-6)


def _with(name: str, *more: str) -> Codec:
    return build(_config(name, *more), bottleneck=_bottleneck(), length=LengthPolicy(Full(), Truncate()))


def _bottleneck() -> Bottleneck:
    return BOTTLENECKS["fsq"]()


@pytest.mark.parametrize(
    ("make", "told"),
    [
        (tiny_codec, "its tokens are about the whole signal"),
        (sound_codec, "a convolution isn't causal"),
        (lambda: _with("seanet", *LSTM, "unit_latents=true"), "unit_latents"),
        (lambda: _with("seanet", *LSTM, "encoder.inner.bidirectional=true"), "is bidirectional"),
        (lambda: _with("seanet_mimi", *SMALLER["seanet_mimi"], "encoder.middle.causal=false"), "isn't causal"),
        (lambda: _with("seanet_mimi", *SMALLER["seanet_mimi"], "encoder.middle.window=null"), "has no window"),
        (lambda: _with("snac", *CONV, "encoder.causal=true"), "noise is counted"),
        (lambda: _with("snac_44k", *CONV, *LOCAL, "encoder.causal=true"), "within windows looks ahead"),
        (lambda: _with("dmel", "encoder.bands=3"), "mel frame isn't causal"),
        (lambda: _with("vocos", *MADE_CAUSAL["vocos"], "encoder.causal=true", "decoder.causal=false"), "isn't causal"),
    ],
)
def test_why_a_codec_does_not_stream_is_told(make, told: str) -> None:
    codec = make()
    chunked = ChunkedCodec(codec)
    assert not chunked.streams
    with pytest.raises(UserError, match=f"can't code chunk by chunk: .*{told}"):
        chunked.encode_chunk(torch.zeros(1, 1, 320))
    with pytest.raises(UserError, match=told):
        chunked.decode_chunk(torch.zeros(1, 3, 1, dtype=torch.int64))


def test_mistakes_are_told() -> None:
    codec = _codec("seanet_small")
    chunked = ChunkedCodec(codec)
    hop = codec.downsample[0]
    for samples in (0, hop - 1, 2 * hop + 1):
        with pytest.raises(UserError, match=f"chunk of {samples} samples: it should have a multiple of {hop}"):
            chunked.encode_chunk(torch.zeros(1, 1, samples))
    with pytest.raises(UserError, match="chunk of 0 samples"):
        chunked.encode_chunk(torch.zeros(1, 1, 0), last=True)
    with pytest.raises(UserError, match="give what the last chunk gave"):
        chunked.encode_chunk(torch.zeros(2, 1, hop), torch.zeros(1, chunked.state_sizes()[0]))
    with pytest.raises(UserError, match="chunk of 0 tokens"):
        chunked.decode_chunk(torch.zeros(1, 3, 0, dtype=torch.int64))
