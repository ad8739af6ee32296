"""Selectors against brute force."""

import logging
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from varitok import UserError
from varitok.codecs.bottlenecks.contract import Bottleneck
from varitok.codecs.bottlenecks.fsq import FiniteScalarQuantizer
from varitok.codecs.codec import Codec
from varitok.codecs.lengths.distributions import Uniform, ladder
from varitok.codecs.lengths.halting import HaltingHead
from varitok.codecs.lengths.policy import LengthPolicy, Zeros
from varitok.codecs.rate_control import ByteBudget, FixedLength, Halting, Quality, psnr

from .examples import SIZE, TOKENS, tiny_codec

N = 12


class Row(nn.Module):
    """Makes a token of each pixel of a row, or a row of tokens: what is cut off is black."""

    tokens, hop, width = N, (1, 1), 1

    def forward(self, x, mask=None, height=0, width=0):
        return x.flatten(1)[..., None] if x.dim() == 4 else x.transpose(1, 2)[:, :, None, :]


def row_codec():
    """Make a codec whose error falls with every token, by as much as the pixel is bright."""
    codec = Codec(Row(), FiniteScalarQuantizer([255]), Row(), LengthPolicy(Uniform(), Zeros()))
    with torch.no_grad():
        for linear in (codec.project_in, codec.project_out):
            linear.weight.fill_(1.0)
            linear.bias.zero_()
    return codec.eval()


def rows(b, seed=0):
    """Make bright rows, each pixel clearly away from black."""
    return torch.rand(b, 1, 1, N, generator=torch.Generator().manual_seed(seed)) * 0.7 + 0.3


def awake(codec):
    with torch.no_grad():
        for parameter in codec.parameters():
            parameter.copy_(torch.randn(parameter.shape) * 0.2)
    return codec.eval()


def l1(fake, real):
    return (fake - real).abs().flatten(1).mean(1)


def qualities(codec, signals, metric):
    """Compute the metric of every signal alone at every length, `(b, N)`."""
    with torch.no_grad():
        rows = []
        for signal in signals:
            codes = codec.encode(signal[None])
            decoded = [codec.decode(codes[..., :k], signal.shape[1:]).clamp(-1, 1) for k in range(1, codec.tokens + 1)]
            rows.append(torch.cat([metric(one, signal[None]) for one in decoded]))
        return torch.stack(rows)


@pytest.mark.parametrize("among", ["all", "ladder"])
@pytest.mark.parametrize("metric", [psnr, l1])
@given(place=st.floats(-0.2, 1.2), seed=st.integers(0, 3))
def test_quality_finds_the_fewest_tokens(among, metric, place, seed):
    codec, signals = row_codec(), rows(5, seed)
    every = qualities(codec, signals, metric)
    higher = metric is psnr
    assert ((every.diff() > 0) == higher).all(), "the example has to be monotone"
    target = float(every.min() + place * (every.max() - every.min()))
    found = Quality(target, metric, higher_is_better=higher, among=among).search(codec, signals)
    choices = list(range(1, N + 1)) if among == "all" else ladder(N)
    for i, row in enumerate(every):
        enough = [k for k in choices if (row[k - 1] >= target if higher else row[k - 1] <= target)]
        assert found.lengths[i] == (min(enough) if enough else N)
        assert found.met[i] == bool(enough)
        torch.testing.assert_close(found.quality[i], row[found.lengths[i] - 1], atol=1e-3, rtol=1e-4)


@given(place=st.floats(0, 1))
def test_where_more_tokens_are_not_always_better_the_target_still_holds(place):
    torch.manual_seed(0)
    codec = awake(tiny_codec("vq"))
    signals = torch.rand(6, 3, SIZE, SIZE) * 2 - 1
    every = qualities(codec, signals, psnr)
    assert (every.diff() < 0).any()
    target = float(every.min() + place * (every.max() - every.min()))
    lengths, quality, met = Quality(target).search(codec, signals)
    there = every.gather(1, lengths[:, None] - 1)[:, 0]
    torch.testing.assert_close(quality, there, atol=1e-3, rtol=0)
    assert ((quality >= target) == met).all()


def test_what_has_no_such_quality_is_named(caplog):
    codec, signals = row_codec(), rows(3)
    signals[1] = 0.0  # black: any length reproduces it
    with caplog.at_level(logging.WARNING):
        lengths = Quality(99.0)(codec, signals)
    assert lengths.tolist() == [N, 1, N]
    assert [record.getMessage() for record in caplog.records] == [
        "2 of 3 signals can't have a quality of 99, they get the best there is: number 0, 2"
    ]
    caplog.clear()
    Quality(-99.0)(codec, signals)
    assert not caplog.records


def test_a_signal_gets_the_same_alone():
    codec, signals = row_codec(), rows(6)
    for selector in (Quality(12.0), Quality(0.2, l1, higher_is_better=False)):
        together = selector(codec, signals)
        assert together.dtype == torch.int64 and len(together.unique()) > 1
        assert torch.equal(together, torch.cat([selector(codec, one[None]) for one in signals]))


@given(st.floats(0, 30))
def test_byte_budget(size):
    codec = tiny_codec("fsq")  # 200 entries: 7.64 bits a token
    fitting = [k for k in range(1, TOKENS + 1) if k * math.log2(200) / 8 <= size]
    signals = torch.zeros(2, 3, SIZE, SIZE)
    if fitting:
        assert ByteBudget(size)(codec, signals).tolist() == [max(fitting)] * 2
    else:
        with pytest.raises(UserError, match=r"one token of this codec takes 0\.955"):
            ByteBudget(size)(codec, signals)


class Through(Bottleneck):
    """A continuous bottleneck that does nothing."""

    dim, book_sizes = 4, ()

    def forward(self, latents, lengths, depth):
        raise NotImplementedError

    encode = decode = forward

    def frozen(self):
        raise NotImplementedError


def test_a_continuous_codec_has_no_bytes():
    codec = Codec(Row(), Through(), Row(), LengthPolicy(Uniform(), Zeros()))
    with pytest.raises(UserError, match="continuous"):
        ByteBudget(100)(codec, rows(1))


def test_fixed_length():
    codec, signals = row_codec(), rows(3)
    assert FixedLength(5)(codec, signals).tolist() == [5, 5, 5]
    for k in (0, N + 1):
        with pytest.raises(UserError, match=f"from 1 to {N}"):
            FixedLength(k)(codec, signals)


def test_halting_asks_the_head():
    codec, signals = row_codec(), rows(4)
    with pytest.raises(UserError, match="no halting head"):
        Halting(0.1)(codec, signals)
    with pytest.raises(UserError, match="above 0"):
        Halting(0.0)
    codec.length.halting = awake(HaltingHead(1, N, width=8, depth=1, heads=2))
    lengths = Halting(0.1)(codec, signals)
    expected = codec.length.halting.lengths(signals.flatten(1)[..., None], torch.full((4,), 0.1))
    assert torch.equal(lengths, expected) and lengths.dtype == torch.int64


def test_psnr_in_decibels():
    torch.testing.assert_close(psnr(torch.full((1, 3, 4, 4), 0.2), torch.zeros(1, 3, 4, 4)), torch.tensor([20.0]))
    assert psnr(torch.ones(2, 1, 4, 4), torch.ones(2, 1, 4, 4)).tolist() == pytest.approx([100.0, 100.0])
