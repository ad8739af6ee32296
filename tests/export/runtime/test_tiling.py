"""Tiles of large frames: their codes are one grid, and where they overlap nothing jumps."""

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from varitok import UserError
from varitok.export.runtime.tiling import (
    Passage,
    count_windows,
    decode_tiled,
    decode_windows,
    encode_tiled,
    encode_windows,
    windows,
)

HOP = (4, 2)


def encode(frames):
    """Take the mean of each step: a codec that looks no further."""
    b, c, t, h, w = frames.shape
    rows, columns = -(-h // HOP[0]), -(-w // HOP[1])
    filled = np.pad(frames, [(0, 0)] * 3 + [(0, rows * HOP[0] - h), (0, columns * HOP[1] - w)], mode="edge")
    return filled.reshape(b, c, t, rows, HOP[0], columns, HOP[1]).mean((4, 6))


def decode(codes):
    return codes.repeat(HOP[0], 3).repeat(HOP[1], 4).astype(np.float32)


@given(st.integers(1, 200), st.integers(2, 40), st.booleans())
def test_windows_overlap_and_what_they_keep_follows_on(steps, tile, causal):
    found = list(windows(steps, tile, causal))
    assert len(found) == count_windows(steps, tile)
    assert found == list(windows(lambda reached: min(steps, reached), tile, causal)), (
        "more is read than the windows need"
    )
    assert [w.first for w in found] == [0, *(w.last for w in found[:-1])] and found[-1].last == steps
    assert all(0 <= w.begin <= w.first < w.last <= w.end <= steps and w.end - w.begin <= tile for w in found)
    assert all(a.end > b.begin for a, b in pairwise(found)), "neighbors share nothing"


@given(st.integers(1, 45), st.integers(1, 45), st.integers(8, 30))
def test_what_looks_no_further_comes_out_as_whole(height, width, tile):
    frames, largest = np.random.default_rng(height).random((1, 2, 3, height, width)), []

    def watched(part):
        largest.append(max(part.shape[3:]))
        return encode(part)

    codes = encode_tiled(watched, frames, HOP, tile)
    np.testing.assert_array_equal(codes, encode(frames))
    np.testing.assert_allclose(decode_tiled(decode, codes, HOP, tile), decode(codes), rtol=0, atol=1e-6)
    assert max(largest) <= tile, "a tile is larger than asked for"


@given(length=st.integers(1, 90), size=st.integers(2, 12), padded=st.booleans())
def test_windows_begin_where_steps_that_share_a_code_begin(length, size, padded):
    hop, group = 2, 3

    def means(wave):
        t, each = wave.shape[2], hop * group
        filled = np.pad(wave, [(0, 0), (0, 0), (0, -t % each)])
        codes = filled.reshape(1, 1, -1, each).mean(3).repeat(group, 2)
        return codes if padded else codes[:, :, : -(-t // hop)]

    def spread(codes):
        return codes.repeat(hop, 2)

    wave = np.random.default_rng(length).random((1, 1, length))
    codes = encode_windows(means, Passage([wave]), length, size, hop, group=group)
    np.testing.assert_array_equal(codes, means(wave))
    back = np.concatenate(list(decode_windows(spread, codes, size, hop, group=group)), axis=2)
    np.testing.assert_allclose(back, spread(codes), rtol=0, atol=1e-6)


def test_tiles_that_disagree_fade_into_each_other():
    number = iter(range(100))
    whole = decode_tiled(lambda codes: decode(codes) * 0 + next(number), np.zeros((1, 1, 1, 4, 32)), HOP, 32)[
        0, 0, 0, 0
    ]
    assert whole[0] == 0 and whole[-1] == whole.max() > 0
    assert 0 <= np.diff(whole).min() and np.diff(whole).max() < 0.2 * whole.max()


def test_a_tile_has_two_steps():
    with pytest.raises(UserError, match="tile=7: tiles must have at least two steps, 8 pixels"):
        encode_tiled(encode, np.zeros((1, 1, 1, 9, 9)), HOP, 7)
