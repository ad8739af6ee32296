"""Residual codebooks at several rates."""

import math
from functools import partial

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from varitok import UserError
from varitok.codecs.bottlenecks.factorized import FactorizedResidualQuantizer
from varitok.codecs.bottlenecks.multirate import MultiRate, multirate
from varitok.codecs.bottlenecks.residual import Residual, Split
from varitok.codecs.bottlenecks.vq import EMAVectorQuantizer, VectorQuantizer
from varitok.codecs.build import build
from varitok.codecs.codec import Codec
from varitok.codecs.lengths.distributions import Full
from varitok.codecs.lengths.policy import LengthPolicy, Truncate
from varitok.codecs.networks.conv_codec import ConvDecoder, ConvEncoder

from ...composing import composed

DIM = 5
STRIDES = st.lists(st.integers(1, 5), min_size=1, max_size=3)


def quantizer(strides: list[int], seed: int = 0) -> MultiRate:
    torch.manual_seed(seed)
    made = multirate(partial(VectorQuantizer, DIM, 23), strides)
    for level in made.parts:
        torch.nn.init.normal_(level.codebook)
    return made.eval()


def quantize(bottleneck: MultiRate, latents: Tensor, lengths: Tensor | None = None):
    whole = torch.full((len(latents),), latents.shape[1])
    return bottleneck(latents, whole if lengths is None else lengths, bottleneck.depths(latents))


@given(strides=STRIDES, steps=st.integers(1, 11))
def test_each_level_sees_the_mean_of_what_is_left(strides: list[int], steps: int) -> None:
    """Against the definition, group by group."""
    bottleneck, latents = quantizer(strides), torch.randn(2, steps, DIM)
    remaining = latents.clone()
    for codebook, (stride, level) in enumerate(zip(strides, bottleneck.parts, strict=True)):
        codes = bottleneck.encode(latents)[:, codebook]
        for start in range(0, steps, stride):
            group = remaining[:, start : start + stride]
            distances = (group.mean(1, keepdim=True) - level.codebook).square().sum(2)
            nearest = distances.argmin(1)
            sure = distances.sort(1).values[:, 1] - distances.amin(1) > 1e-4
            assert torch.equal(codes[sure, start], nearest[sure])
            assert (codes[:, start : start + stride] == codes[:, start : start + 1]).all()
            group -= level.codebook[codes[:, start]].detach()[:, None]
    torch.testing.assert_close(quantize(bottleneck, latents).latents, latents - remaining, atol=1e-5, rtol=1e-5)


@given(strides=STRIDES, lengths=st.lists(st.integers(1, 9), min_size=2, max_size=3))
def test_groups_are_of_valid_steps_only(strides: list[int], lengths: list[int]) -> None:
    """A sound that ends within a group is quantized as it is alone, whatever comes after it."""
    bottleneck = quantizer(strides)
    latents = torch.randn(len(lengths), max(lengths), DIM)
    batch = quantize(bottleneck, latents, torch.tensor(lengths))
    codes = bottleneck.encode_valid(latents, torch.tensor(lengths))
    for item, length in enumerate(lengths):
        alone = quantize(bottleneck, latents[item : item + 1, :length])
        assert torch.equal(batch.codes[item : item + 1, :, :length], alone.codes)
        assert torch.equal(codes[item : item + 1, :, :length], alone.codes)
        assert torch.equal(batch.latents[item : item + 1, :length], alone.latents)


def test_strides_of_one_are_the_residual_quantizer() -> None:
    torch.manual_seed(0)
    levels = [VectorQuantizer(DIM, 23) for _ in range(3)]
    latents = torch.randn(2, 7, DIM, requires_grad=True)
    outcomes = []
    for bottleneck in (MultiRate(levels, [1, 1, 1]), Residual(levels)):
        quantized = quantize(bottleneck, latents)
        (quantized.latents.square().sum() + sum(quantized.penalties.values())).backward()
        outcomes.append((quantized, latents.grad))
        latents.grad = None
    (one, one_gradient), (other, other_gradient) = outcomes
    assert torch.equal(one.codes, other.codes)
    torch.testing.assert_close(one.latents, other.latents)
    torch.testing.assert_close(one_gradient, other_gradient)
    for name, penalty in one.penalties.items():
        torch.testing.assert_close(penalty, other.penalties[name])


def test_the_gradient_passes_once() -> None:
    """Straight through, from each step of the output to the same step of the latents."""
    bottleneck = quantizer([4, 2, 1]).train()
    latents = torch.randn(2, 7, DIM, requires_grad=True)
    weights = torch.randn(2, 7, DIM)
    (quantize(bottleneck, latents).latents * weights).sum().backward()
    torch.testing.assert_close(latents.grad, weights)


@pytest.mark.parametrize("kind", ["factorized", "split"])
def test_maps_of_levels_learn_by_the_output(kind: str) -> None:
    factorized = partial(FactorizedResidualQuantizer, 6, 1, 9, 2)
    level = factorized if kind == "factorized" else lambda: Split(factorized(), factorized(), 6)
    bottleneck = multirate(level, [3, 1])
    latents = torch.randn(2, 7, 6, requires_grad=True)
    (quantize(bottleneck, latents).latents * torch.randn(2, 7, 6)).sum().backward()
    maps = [weight for name, weight in bottleneck.named_parameters() if "codebook" not in name]
    assert maps and all(weight.grad is not None and weight.grad.any() for weight in maps)


def test_a_moving_codebook_counts_a_group_once() -> None:
    bottleneck = multirate(partial(EMAVectorQuantizer, DIM, 6, kmeans_init=False), [4, 2, 1])
    lengths = torch.tensor([7, 4, 1])
    bottleneck(torch.randn(3, 7, DIM), lengths, bottleneck.depths(lengths))
    for stride, level in zip((4, 2, 1), bottleneck.parts, strict=True):
        counts = level.codebook.gathered[-7:-1]
        assert counts.sum() == sum(math.ceil(int(length) / stride) for length in lengths)


def test_decoding_reads_a_group_at_its_first_step() -> None:
    bottleneck = quantizer([3, 1])
    codes = bottleneck.encode(torch.randn(2, 7, DIM))
    other = codes.clone()
    other[:, 0, [1, 2, 4, 5]] = 0
    assert torch.equal(bottleneck.decode(other), bottleneck.decode(codes))
    other[:, 0, 6] += 1
    other[:, 0, 6] %= 23
    assert not torch.equal(bottleneck.decode(other), bottleneck.decode(codes))


def test_a_ragged_group_costs_a_code() -> None:
    bottleneck = quantizer([4, 2, 1])
    bits = math.log2(23)
    assert bottleneck.codebook_strides == (4, 2, 1)
    assert bottleneck.bits == pytest.approx(bits * 1.75)
    assert bottleneck.payload(8) == pytest.approx(8 * bottleneck.bits)
    assert bottleneck.payload(5) == pytest.approx(bits * (2 + 3 + 5))
    assert bottleneck.payload(5, 2) == pytest.approx(bits * (2 + 3))
    codes = bottleneck.encode(torch.randn(1, 5, DIM))[0]
    different = [len(codebook.reshape(-1)[::stride]) for codebook, stride in zip(codes, (4, 2, 1), strict=True)]
    assert bottleneck.payload(5) == pytest.approx(bits * sum(different))


@pytest.mark.parametrize(
    "codec, sample_rate, strides, kilobits",
    [("snac", 24000, [4, 2, 1], 0.98), ("snac_44k", 32000, [8, 4, 2, 1], 1.9), ("snac_44k", 44100, [8, 4, 2, 1], 2.6)],
)
def test_rates_are_the_published_ones(codec: str, sample_rate: int, strides: list[int], kilobits: float) -> None:
    """SNAC's readme: 0.98, 1.9 and 2.6 kbit/s."""
    small = ["bottleneck.level.dim=8", "codec.encoder.base=1", "codec.decoder.base=1", "codec.encoder.width=32"]
    chosen = ["data=voices", f"codec={codec}", "bottleneck=rvq_multirate", f"bottleneck.strides={strides}", *small]
    config = composed(*chosen)
    bottleneck, encoder = build(config.bottleneck), build(config.codec.encoder)
    assert bottleneck.codebook_sizes == (4096,) * len(strides)
    rate = bottleneck.bits * sample_rate / encoder.downsample[0] / 1000
    assert rate == pytest.approx(kilobits, abs=0.03)  # published to two digits


def test_a_codec_hands_over_lengths_and_counts_groups() -> None:
    """A padded batch has the codes of its single items, where a sound ends within a group too."""
    torch.manual_seed(0)
    sizes = {"width": 8, "base": 4, "strides": [2, 5]}
    bottleneck = multirate(partial(VectorQuantizer, DIM, 23), [4, 2, 1])
    codec = Codec(ConvEncoder(**sizes), bottleneck, ConvDecoder(**sizes), LengthPolicy(Full(), Truncate())).eval()  # type: ignore[arg-type]
    signal, lengths = torch.randn(3, 1, 70), [7, 5, 2]
    codes = codec.encode(signal, torch.tensor(lengths))
    for item, length in enumerate(lengths):
        alone = codec.encode(signal[item : item + 1, :, : 10 * length])
        assert torch.equal(codes[item : item + 1, :, :length], alone)
    assert codec.bits(5) == pytest.approx(math.log2(23) * (2 + 3 + 5))
    assert codec.bits(5, 1) == pytest.approx(math.log2(23) * 2)


@pytest.mark.parametrize("strides", [[1], [2, 1, 1], []], ids=str)
def test_strides_that_do_not_fit_are_refused(strides: list[int]) -> None:
    with pytest.raises(UserError):
        MultiRate([VectorQuantizer(4, 3), VectorQuantizer(4, 3)], strides)


def test_levels_of_several_widths_are_refused() -> None:
    with pytest.raises(UserError, match="one width"):
        MultiRate([VectorQuantizer(4, 3), VectorQuantizer(5, 3)], [2, 1])
