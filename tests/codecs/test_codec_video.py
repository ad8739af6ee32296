"""Codecs of clips: any number of frames of any size, chunk by chunk as whole, padded as alone."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from varitok import UserError
from varitok.codecs.padding import pad_to_grid
from varitok.codecs.streaming import ChunkedCodec
from varitok.export.exporters.frozen import freeze

from .examples import clip_codec

HOP = (4, 8, 8)


@pytest.fixture(scope="module")
def codec():
    return clip_codec()


def clips(b=2, t=5, h=16, w=16):
    return torch.rand(b, 3, t, h, w, generator=torch.Generator().manual_seed(t)) * 2 - 1


def assert_near(found, wanted):
    """Within 1e-5 of the peak."""
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-5 * wanted.abs().max().item())


def test_the_first_frame_alone_makes_the_first_latent_frame(codec):
    assert codec.layout.causal_pad == 3 and codec.downsample == HOP
    assert [codec.layout.grid((t, 16, 24))[0] for t in range(1, 11)] == [1, 2, 2, 2, 2, 3, 3, 3, 3, 4]
    x = clips(t=9)
    with torch.no_grad():
        codes, image = codec.encode(x), codec.encode(x[:, :, :1])
    assert torch.equal(codes[:, :, :1], image)
    assert len(codes.unique()) > 10


def test_one_that_is_not_causal_has_whole_steps_only():
    codec = clip_codec(causal=False)
    assert codec.layout.causal_pad == 0 and not ChunkedCodec(codec).streams
    assert [codec.layout.grid((t, 8, 8))[0] for t in (1, 4, 5, 8)] == [1, 1, 2, 2]
    assert codec.encode(clips(t=6)).shape == (2, 1, 2, 2, 2)


@settings(deadline=None, max_examples=15)
@given(t=st.integers(1, 14), h=st.integers(1, 20), w=st.integers(1, 20))
def test_any_size_comes_back_at_its_size(codec, t, h, w):
    x = clips(1, t, h, w)
    with torch.no_grad():
        codes = codec.encode(x)
        assert codes.shape == (1, 1, *codec.layout.grid((t, h, w)))
        back = codec.decode(codes, (t, h, w))
        assert back.shape == x.shape
        torch.testing.assert_close(codec(x).signal, back)


def test_what_is_not_full_is_followed_by_copies():
    x = torch.arange(12.0).view(1, 1, 2, 2, 3)
    full = pad_to_grid(x, [2, 2, 2], 1)
    assert full.shape == (1, 1, 4, 2, 4)
    assert torch.equal(full[0, 0, :, 0, :3], x[0, 0, [0, 0, 1, 1], 0])
    assert torch.equal(full[..., 3], full[..., 2])


def test_padding_changes_nothing_valid(codec):
    lengths = torch.tensor([9, 6, 1])
    x = clips(3, 9)
    for row, length in enumerate(lengths.tolist()):
        x[row, :, length:] = x[row, :, length - 1 : length]
    with torch.no_grad():
        tokens = codec.layout.valid(lengths, x.shape[2:])
        assert tokens.tolist() == [12, 12, 4]
        codes, result = codec.encode(x, tokens), codec(x, tokens)
        back = codec.decode(codes, x.shape[2:], tokens)
        for row, length in enumerate(lengths.tolist()):
            alone = codec.encode(x[row : row + 1, :, :length])
            assert torch.equal(codes[row : row + 1, :, : alone.shape[2]], alone)
            single = codec.decode(alone, (length, 16, 16))
            assert_near(back[row : row + 1, :, :length], single)
            assert_near(result.signal[row : row + 1, :, :length], single)


@settings(deadline=None, max_examples=12)
@given(data=st.data(), t=st.integers(1, 40))
def test_chunks_are_the_whole(codec, data, t):
    chunked = ChunkedCodec(codec)
    x = clips(2, t, 11, 16)
    with torch.no_grad():
        whole = codec.encode(x)
        cuts = sorted(data.draw(st.sets(st.integers(0, (t - 1) // 4))))
        ends = [*(1 + 4 * cut for cut in cuts if 1 + 4 * cut < t), t]
        state, parts, begin = None, [], 0
        for end in ends:
            codes, state = chunked.encode_chunk(x[:, :, begin:end], state, last=end == t)
            assert state.shape == (2, chunked.state_sizes(whole.shape[3:])[0])
            parts.append(codes)
            begin = end
        assert torch.equal(torch.cat(parts, 2), whole)
        state, parts, begin = None, [], 0
        for end in sorted({*data.draw(st.sets(st.integers(1, whole.shape[2]))), whole.shape[2]}):
            signal, state = chunked.decode_chunk(whole[:, :, begin:end], state)
            parts.append(signal)
            begin = end
        assert_near(torch.cat(parts, 2), codec.decode(whole))


def test_a_chunk_that_is_not_whole_is_refused(codec):
    chunked = ChunkedCodec(codec)
    with torch.no_grad():
        with pytest.raises(
            UserError, match="a chunk of 3 samples: it should have a multiple of 4, less 3 in the first"
        ):
            chunked.encode_chunk(clips(t=3))
        _, state = chunked.encode_chunk(clips(t=5))
        with pytest.raises(UserError, match="a chunk of 5 samples: it should have a multiple of 4, if"):
            chunked.encode_chunk(clips(t=5), state)
        with pytest.raises(UserError, match="state: "):
            chunked.encode_chunk(clips(t=4, w=32), state)
        with pytest.raises(UserError, match="a chunk of 0 samples"):
            chunked.encode_chunk(clips(t=1)[:, :, :0], last=True)


def test_each_token_of_a_clip_has_latents_of_unit_size():
    codec, x = clip_codec(unit_latents=True).eval(), clips(t=6)
    chunked = ChunkedCodec(codec)
    assert chunked.streams
    with torch.no_grad():
        latents = codec.latents(x)
        torch.testing.assert_close(latents.square().mean(2), torch.ones(latents.shape[:2]), rtol=1e-2, atol=0)
        first, state = chunked.encode_chunk(x[:, :, :5])
        rest, _ = chunked.encode_chunk(x[:, :, 5:], state, last=True)
        assert torch.equal(torch.cat([first, rest], 2), codec.encode(x))
        frozen = freeze(codec)
        assert torch.equal(frozen.encode(x), codec.encode(x))


def test_a_state_grows_with_its_frames(codec):
    one, tall, wide, both = (ChunkedCodec(codec).state_sizes(grid) for grid in ((1, 1), (3, 1), (1, 3), (3, 3)))
    assert tall == wide == tuple(3 * size for size in one)
    assert both == tuple(9 * size for size in one)


def test_every_frame_trains(codec):
    codec = clip_codec().train()
    x = clips(t=6).requires_grad_()
    codec(x).signal.abs().sum().backward()
    assert all(part.grad is not None and part.grad.abs().sum() > 0 for part in codec.parameters())
