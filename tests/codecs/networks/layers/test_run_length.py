"""Run lengths: what doesn't change is left out, stands for itself where it did not change, and is paid for once."""

import math

import pytest
import torch

import varitok
from varitok import UserError
from varitok.codecs.bottlenecks.fsq import FiniteScalarQuantizer
from varitok.codecs.codec import Codec
from varitok.codecs.evaluation.evaluate import evaluate
from varitok.codecs.lengths.distributions import Full
from varitok.codecs.lengths.policy import LengthPolicy, Truncate
from varitok.codecs.metrics.rate import run_flags
from varitok.codecs.networks.layers.run_length import changed_tokens
from varitok.codecs.networks.tubelet import TubeletDecoder, TubeletEncoder
from varitok.codecs.streaming import ChunkedCodec
from varitok.data.batch import Batch
from varitok.export.exporters.bundle import export_bundle

PATCH = (2, 4, 4)
FORM = {"width": 16, "patch": PATCH, "base": 32, "depth": 2, "heads": 4}


def encoder(**form):
    torch.manual_seed(0)
    return TubeletEncoder(**FORM | {"run_length": 0.1} | form).eval()


def codec():
    return Codec(
        encoder(),
        FiniteScalarQuantizer([8, 8, 8]),
        TubeletDecoder(**FORM),
        LengthPolicy(Full(), Truncate()),
        frame_rate=8,
    ).eval()


@pytest.fixture
def clips():
    """Two clips of 10 frames: the upper half of both stands from the third frame on, and all of one from the fifth."""
    signal = torch.rand(2, 3, 10, 16, 16, generator=torch.Generator().manual_seed(1)) * 2 - 1
    signal[:, :, 2:, :8] = signal[:, :, 2:3, :8]
    signal[1, :, 4:] = signal[1, :, 4:5]
    return signal


def test_what_stands_still_has_not_changed(clips):
    marks = changed_tokens(clips, PATCH, 0.1).reshape(2, 5, 4, 4)
    assert marks[:, :2].all(), "the first step is always kept, and in the second all moved"
    assert marks[0, 2:, 2:].all() and not marks[:, 2:, :2].any()
    assert marks[1, 2, 2:].all() and not marks[1, 3:].any()


@pytest.mark.parametrize("threshold", [0.05, 0.2])
def test_the_threshold_is_a_mean_change(threshold):
    signal = torch.zeros(1, 3, 4, 4, 4)
    signal[:, :, 2:] = 0.1
    assert changed_tokens(signal, PATCH, threshold).tolist() == [[True, threshold < 0.1]]


def test_a_token_stands_for_those_left_out(clips):
    latents = encoder()(clips).reshape(2, 5, 4, 4, -1)
    assert torch.equal(latents[1, 3], latents[1, 4]) and torch.equal(latents[0, 1, 0], latents[0, 4, 0])
    assert not torch.equal(latents[0, 3, 3], latents[0, 4, 3])


@pytest.mark.parametrize("window", [None, 2])
@pytest.mark.parametrize("causal", [True, False])
def test_leaving_out_is_not_looking(clips, window, causal):
    network = encoder(window=window, causal=causal)
    packed = network(clips)
    network.run_length.packs = False
    torch.testing.assert_close(network(clips), packed, rtol=0, atol=1e-5)


def test_a_clip_in_a_padded_batch_is_as_alone(clips):
    network, mask = encoder(), torch.arange(80) < 48
    padded = network(clips, mask.expand(2, -1))[:, :48]
    torch.testing.assert_close(padded, network(clips[:, :, :6]), rtol=0, atol=1e-5)


def test_it_learns_through_both_ways(clips):
    network = encoder()
    network(clips).square().mean().backward()
    assert network.run_length.lengths.grad.abs().sum() > 0 and network.embed.weight.grad.abs().sum() > 0


def test_a_run_is_paid_for_once(clips):
    flat = torch.zeros(1, 3, 2, 2, dtype=torch.int64)
    assert run_flags(flat) == (4, 0.0, 8)
    flat[0, 1, 0, 0] = 1
    kept, ideal, flags = run_flags(flat)
    assert (kept, flags) == (6, 8) and ideal == pytest.approx(8 * (0.25 * 2 + 0.75 * math.log2(4 / 3)))
    model, batch = codec(), Batch(((clips + 1) * 127.5).to(torch.uint8), torch.tensor([10, 9]), ())
    row = evaluate(model, [batch]).rows[0]
    model.encoder.run_length = None
    assert row["bits"] < 0.9 * evaluate(model, [batch]).rows[0]["bits"]


def test_axial_attention_can_not_drop_tokens():
    with pytest.raises(UserError, match=r"run_length"):
        encoder(attention="axial")


def test_it_does_not_stream():
    assert "run lengths" in ChunkedCodec(codec()).obstacle


@pytest.mark.slow
def test_a_bundle_repeats_codes_too(clips, tmp_path):
    model = codec()
    export_bundle(model, tmp_path / "bundle")
    codes = varitok.load(tmp_path / "bundle").encode(clips.numpy())
    assert torch.equal(torch.from_numpy(codes), model.encode(clips))
    assert (codes[1, :, -1] == codes[1, :, -2]).all()
