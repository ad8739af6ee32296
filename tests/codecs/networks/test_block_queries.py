"""Ordered tokens of each block of a clip's frames: any number of frames, any prefix, nothing from the future."""

import itertools
from functools import cache

import numpy as np
import pytest
import torch

import varitok
from varitok import UserError
from varitok.codecs.allocation import allocate, least_cost
from varitok.codecs.bottlenecks.fsq import FiniteScalarQuantizer
from varitok.codecs.codec import Codec
from varitok.codecs.evaluation.evaluate import evaluate
from varitok.codecs.lengths.distributions import Uniform
from varitok.codecs.lengths.policy import LengthPolicy, MaskToken, Truncate, Zeros
from varitok.codecs.networks.block_queries import BlockQueryDecoder, BlockQueryEncoder
from varitok.codecs.streaming import ChunkedCodec
from varitok.data.batch import Batch
from varitok.export.exporters.bundle import export_bundle

from ..examples import SIZE, tiny_codec

TOKENS, SIDE = 5, 16
FORM = {"image_size": SIDE, "patch": [4, 8, 8], "tokens": TOKENS, "width": 32, "depth": 2, "heads": 4}


@cache
def tiny(mechanism="truncate", **form):
    torch.manual_seed(0)
    mechanisms = {"truncate": Truncate, "zeros": Zeros, "mask_token": lambda: MaskToken(32)}
    policy = LengthPolicy(Uniform(), mechanisms[mechanism]())
    encoder, decoder = (side(**FORM | form) for side in (BlockQueryEncoder, BlockQueryDecoder))
    return Codec(encoder, FiniteScalarQuantizer([8, 8, 8]), decoder, policy, frame_rate=8.0).eval()


def clip(frames, batch=2, side=SIDE):
    return torch.rand(batch, 3, frames, side, side, generator=torch.Generator().manual_seed(frames)) * 2 - 1


@pytest.mark.parametrize("frames", range(1, 14))
def test_any_number_of_frames_comes_back(frames):
    codec, signal = tiny(), clip(frames)
    codes = codec.encode(signal)
    assert codes.shape == (2, 1, -(-(frames + 3) // 4), TOKENS)
    assert codec.decode(codes, signal.shape[2:]).shape == signal.shape
    assert codec(signal).signal.shape == signal.shape


@pytest.mark.parametrize("start", [{}, {"shortcut": True}, {"cosines": 3}], ids=["alike", "shortcut", "cosines"])
def test_a_block_knows_nothing_of_later_ones(start):
    codec, signal = tiny(**start), clip(13)
    changed = signal.clone()
    changed[:, :, 5:] = clip(8)
    before, after = codec.encode(signal), codec.encode(changed)
    assert torch.equal(before[:, :, :2], after[:, :, :2]) and not torch.equal(before, after)
    back = codec.decode(before)
    torch.testing.assert_close(codec.decode(before[:, :, :2]), back[:, :, :5], rtol=0, atol=1e-5)


def test_without_causality_blocks_see_each_other():
    codec, signal = tiny(causal=False), clip(12)
    changed = signal.clone()
    changed[:, :, 8:] = 0
    assert codec.layout.causal_pad == 0
    assert not torch.equal(codec.encode(signal)[:, :, 0], codec.encode(changed)[:, :, 0])


def test_an_image_is_the_first_block_of_a_clip():
    codec, signal = tiny(), clip(9)
    assert torch.equal(codec.encode(signal[:, :, :1]), codec.encode(signal)[:, :, :1])


@pytest.mark.parametrize("mechanism", ["truncate", "zeros", "mask_token"])
@pytest.mark.parametrize("kept", [1, 3, TOKENS])
def test_a_prefix_is_a_length(mechanism, kept):
    codec, signal = tiny(mechanism), clip(9)
    codes, size = codec.encode(signal), signal.shape[2:]
    cut = codec.decode(codes[..., :kept], size)
    torch.testing.assert_close(codec.decode(codes, size, torch.full((2,), kept)), cut, rtol=0, atol=1e-5)
    torch.testing.assert_close(codec(signal, torch.full((6,), kept)).signal, cut, rtol=0, atol=1e-5)


def test_each_block_has_its_own_length():
    codec, signal = tiny(), clip(9, batch=1)
    codes, size = codec.encode(signal), signal.shape[2:]
    whole, cut = codec.decode(codes, size), codec.decode(codes, size, torch.tensor([[TOKENS, TOKENS, 1]]))
    torch.testing.assert_close(cut[:, :, :5], whole[:, :, :5], rtol=0, atol=1e-5)  # the last block says nothing of them
    assert (cut - whole)[:, :, 5:].abs().max() > 1e-3


def test_padding_has_no_tokens():
    codec = tiny()
    assert codec.layout.valid(torch.tensor([9, 5, 6, 1]), (9, SIDE, SIDE)).reshape(4, 3).tolist() == [
        [5, 5, 5], [5, 5, 0], [5, 5, 5], [5, 0, 0],
    ]  # fmt: skip


@pytest.mark.parametrize("start", [{"shortcut": True}, {"cosines": 3}], ids=["shortcut", "cosines"])
def test_other_sizes_of_frames_are_read_and_painted(start):
    codec, signal = tiny(**start), clip(5, side=24)
    assert codec.decode(codec.encode(signal), signal.shape[2:]).shape == signal.shape


@pytest.mark.parametrize(("codes", "size"), [((1, 1, 2, TOKENS), (9, SIDE, SIDE)), ((1, 1, 2, TOKENS + 1), None)])
def test_wrong_codes_are_told(codes, size):
    with pytest.raises(UserError, match=r"codes of 2 blocks|6 tokens"):
        tiny().decode(torch.zeros(codes, dtype=torch.int64), size)


@pytest.mark.parametrize(
    "change", [{"patch": [4, 5, 8]}, {"later_tokens": TOKENS + 1}, {"heads": 5}, {"cosines": 1000}]
)
def test_sizes_that_do_not_fit_are_told(change):
    with pytest.raises(UserError):
        BlockQueryEncoder(**FORM | change)


def test_an_evaluation_has_a_row_for_each_number_of_tokens():
    codec, signal = tiny(), clip(9)
    batch = Batch(((signal + 1) * 127.5).to(torch.uint8), torch.tensor([9, 5]), ())
    table = evaluate(codec, [batch])
    assert [row["k"] for row in table.rows] == [1, 2, 4, 5]
    assert [row["bits"] for row in table.rows] == [9 * k * 5 / 2 for k in (1, 2, 4, 5)]  # 3 blocks and 2


def test_an_allocation_is_the_best_there_is():
    codec, signal = tiny(), clip(13)
    signal[0, :, 3:] = signal[0, :, :1]  # little happens in one clip
    size, codes = signal.shape[2:], codec.encode(signal)
    for over, mean in itertools.product(("signal", "batch"), (1, 1.8, 3, TOKENS)):
        lengths = allocate(codec, signal, mean, over)
        assert lengths.shape == (2, 4) and set(lengths.flatten().tolist()) <= {1, 2, 4, 5}
        sums = lengths.sum(1) if over == "signal" else lengths.sum()[None] / 2
        assert (sums <= 4 * mean).all()
        assert codec.decode(codes, size, lengths).shape == signal.shape
    assert (allocate(codec, signal, TOKENS) >= 1).all()


def test_costs_are_weighed_exactly():
    generator, choices = torch.Generator().manual_seed(0), [1, 2, 4, 5]
    for budget in (3, 5, 8, 11, 15):
        costs = torch.rand(3, 4, generator=generator, dtype=torch.float64)
        found = least_cost(costs, choices, budget)
        ways = [way for way in itertools.product(range(4), repeat=3) if sum(choices[i] for i in way) <= budget]
        best = min(sum(costs[row, i].item() for row, i in enumerate(way)) for way in ways)
        assert found.sum() <= budget
        assert sum(costs[row, choices.index(n)].item() for row, n in enumerate(found.tolist())) == pytest.approx(best)


def test_an_allocation_wants_blocks_and_a_token_for_each():
    with pytest.raises(UserError, match="each block has one at least"):
        allocate(tiny(), clip(5), 0.5)
    with pytest.raises(UserError, match="this codec has none"):
        allocate(tiny_codec("fsq"), torch.zeros(1, 3, SIZE, SIZE), 2)


@pytest.mark.parametrize("mechanism", ["truncate", "zeros", "mask_token"])
@pytest.mark.parametrize("cuts", [(1, 4, 4, 4), (5, 8), (9, 2)])
def test_chunks_are_the_whole(mechanism, cuts):
    codec, signal = tiny(mechanism, window=2, cosines=3), clip(sum(cuts))
    chunked = ChunkedCodec(codec)
    codes, state, begin = [], None, 0
    for size in cuts:
        chunk = signal[:, :, begin : begin + size]
        part, state = chunked.encode_chunk(chunk, state, last=begin + size == signal.shape[2])
        codes.append(part)
        begin += size
    whole = codec.encode(signal)
    assert torch.equal(torch.cat(codes, dim=2), whole)
    for kept in (2, TOKENS):
        frames, state = [], None
        for part in whole[..., :kept].split([1, whole.shape[2] - 1], dim=2):
            made, state = chunked.decode_chunk(part, state)
            frames.append(made)
        back = codec.decode(whole[..., :kept])
        torch.testing.assert_close(torch.cat(frames, dim=2), back, rtol=0, atol=1e-5)


def test_without_a_window_it_does_not_stream():
    assert "no window" in ChunkedCodec(tiny()).obstacle and ChunkedCodec(tiny(window=2)).streams


@pytest.mark.slow
@pytest.mark.parametrize("mechanism", ["truncate", "mask_token"])
def test_a_bundle_streams_blocks_of_any_length(tmp_path, mechanism):
    codec = tiny(mechanism, window=2, cosines=3)
    assert "onnx, streaming" in export_bundle(codec, tmp_path / "bundle")["parity"]
    bundle, signal = varitok.load(tmp_path / "bundle"), clip(9).numpy()
    encode, decode, codes = bundle.encoding(batch=2), bundle.decoding(batch=2), bundle.encode(signal)
    parts = [encode(signal[:, :, :1]), encode(signal[:, :, 1:3]), encode(signal[:, :, 3:]), encode.flush()]
    assert np.array_equal(np.concatenate(parts, axis=2), codes)
    frames = [decode(codes[:, :, :1]), decode(codes[:, :, 1:, :2])]
    with torch.no_grad():
        wanted = codec.decode(torch.from_numpy(codes), lengths=torch.tensor([[TOKENS, 2, 2]] * 2))
    np.testing.assert_allclose(np.concatenate(frames, axis=2), wanted.clamp(-1, 1).numpy(), rtol=0, atol=1e-4)
    assert decode.flush().shape == (2, 3, 0, SIDE, SIDE)


@pytest.mark.slow
@pytest.mark.parametrize("mechanism", ["truncate", "mask_token"])
def test_a_bundle_takes_any_number_of_frames_and_tokens(tmp_path, mechanism):
    codec = tiny(mechanism)
    export_bundle(codec, tmp_path / "bundle")
    bundle = varitok.load(tmp_path / "bundle")
    pixels = ((clip(6, batch=1)[0].permute(1, 2, 3, 0) + 1) * 127.5).to(torch.uint8).numpy()
    codes = bundle.encode(pixels, tokens=3)
    assert codes.shape == (1, 1, 3, 3) and "up to 5 tokens" in repr(bundle)
    assert bundle.pixels(bundle.decode(codes, (6, SIDE, SIDE))).shape == (1, 6, SIDE, SIDE, 3)
    assert "the first k tokens give a coarser" in (tmp_path / "bundle" / "README.md").read_text()
    for call in (
        lambda: bundle.encode(pixels, tokens=6),
        lambda: bundle.encode(pixels[:, :8]),
        lambda: bundle.decode(codes, (10, SIDE, SIDE)),
        lambda: bundle.decode(codes[0]),
        bundle.encoding,
    ):
        with pytest.raises(UserError):
            call()
