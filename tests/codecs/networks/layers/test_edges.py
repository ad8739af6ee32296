"""Ends of signals as published codecs treat them: reflections, incomplete steps, chunks."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional

from varitok import UserError
from varitok.codecs.bottlenecks.fsq import FiniteScalarQuantizer
from varitok.codecs.codec import Codec
from varitok.codecs.lengths.distributions import Full
from varitok.codecs.lengths.policy import LengthPolicy, Truncate
from varitok.codecs.networks.conv_codec import ConvDecoder, ConvEncoder
from varitok.codecs.networks.layers.convolution import Convolution, TransposedConvolution
from varitok.codecs.networks.layers.edges import pad_ends
from varitok.codecs.streaming import ChunkedCodec

SIZES = {"width": 3, "base": 4, "strides": [2, 3], "dilations": [1, 3], "causal": True}


def _codec(edges: str) -> Codec:
    torch.manual_seed(0)
    encoder = ConvEncoder(**SIZES, edges=edges, direct=True, resample=2)
    decoder = ConvDecoder(**SIZES, edges=edges, resample=2)
    return Codec(encoder, FiniteScalarQuantizer([8, 5, 5]), decoder, LengthPolicy(Full(), Truncate())).eval()


@given(
    lengths=st.lists(st.integers(1, 9), min_size=1, max_size=3),
    left=st.integers(0, 6),
    right=st.integers(0, 6),
    fill=st.sampled_from(["reflect", "replicate"]),
)
@settings(max_examples=30)
def test_each_sample_of_a_batch_is_padded_at_its_own_end(lengths: list[int], left: int, right: int, fill: str) -> None:
    x = torch.randn(len(lengths), 2, max(lengths))
    padded = pad_ends(x, left, right, fill, torch.tensor(lengths)[:, None])
    for item, length in enumerate(lengths):
        alone = pad_ends(x[item : item + 1, :, :length], left, right, fill)
        assert torch.equal(padded[item : item + 1, :, : left + length + right], alone)
        if length > max(left, right) and fill == "reflect":
            assert torch.equal(alone, functional.pad(x[item : item + 1, :, :length], [left, right], "reflect"))


@pytest.mark.parametrize("edges", ["encodec", "mimi"])
@settings(max_examples=5)
@given(samples=st.integers(1, 90))
def test_an_incomplete_step_is_completed_by_each_layer_also_in_a_graph(edges: str, samples: int) -> None:
    codec, signal = _codec(edges), torch.randn(2, 1, samples)
    with torch.no_grad(), pytest.MonkeyPatch.context() as patch:
        eager = codec.features(signal)
        assert eager.shape[1] == -(-samples // codec.downsample[0])
        patch.setattr(torch.compiler, "is_exporting", lambda: True)
        torch.testing.assert_close(codec.features(signal), eager, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("edges", ["encodec", "mimi"])
@settings(max_examples=5)
@given(chunks=st.integers(1, 3), rest=st.integers(1, 100))
def test_chunks_are_the_whole(edges: str, chunks: int, rest: int) -> None:
    codec = _codec(edges)
    chunked = ChunkedCodec(codec)
    assert chunked.chunk_tokens == (7 if edges == "encodec" else 1)
    step = chunked.latency
    signal = torch.randn(2, 1, chunks * step + min(rest, step))
    with torch.no_grad():
        codes = codec.encode(signal)
        painted = codec.decode(codes)
        state, back, found, played = None, None, [], []
        for start in range(0, signal.shape[2], step):
            part = signal[:, :, start : start + step]
            some, state = chunked.encode_chunk(part, state, last=start + step >= signal.shape[2])
            found.append(some)
        for start in range(0, codes.shape[2], chunked.chunk_tokens):
            end = start + chunked.chunk_tokens
            some, back = chunked.decode_chunk(codes[:, :, start:end], back, last=end >= codes.shape[2])
            played.append(some)
    assert torch.equal(torch.cat(found, 2), codes)
    torch.testing.assert_close(torch.cat(played, 2), painted, atol=1e-5, rtol=1e-5)


def test_a_signal_of_dac_ends_early_if_a_stride_is_odd() -> None:
    decoder = ConvDecoder(width=3, base=4, strides=[2, 5], dilations=[1], edges="dac").eval()
    with torch.no_grad():
        painted = decoder(torch.randn(1, 4, 3), None, [4])
    assert painted.shape[2] == 40
    assert not painted[..., 38:].any() and painted[..., 37].all()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Convolution(1, 1, 3, edges="mirror"), "edges=mirror: should be one of zeros, encodec"),
        (lambda: TransposedConvolution(1, 1, 4, 2, dims=2, edges="dac"), "edges=dac: is for one axis"),
    ],
)
def test_wrong_edges_are_told(make: object, message: str) -> None:
    with pytest.raises(UserError, match=message):
        make()  # type: ignore[operator]
