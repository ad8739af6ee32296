"""The halting head: what it learns, and that the codec doesn't notice."""

import pytest
import torch

from varitok.codecs.lengths.distributions import Uniform
from varitok.codecs.lengths.halting import HaltingHead
from varitok.codecs.lengths.policy import Axis, LengthPolicy, Truncate

from ..examples import SIZE, TOKENS, WIDTH, tiny_codec

N, DIM = 16, 8


def samples(count, random):
    """Make latents in which a sample's hardness can be read: k tokens leave an error of 0.5 * hardness / k."""
    hardness = torch.rand(count, generator=random) * 0.9 + 0.1
    latents = torch.randn(count, N, DIM, generator=random) * 0.1
    latents[:, 0, 0] += 4 * hardness
    latents[:, 0, 1] += 2.0
    return latents, hardness


def train(head, updates=400):
    random = torch.Generator().manual_seed(0)
    optimizer = torch.optim.AdamW(head.parameters(), lr=4e-3)
    for _ in range(updates):
        latents, hardness = samples(64, random)
        lengths = torch.randint(1, N + 1, (64,), generator=random)
        loss = head.loss(latents, 0.5 * hardness / lengths, lengths)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return head.eval()


@pytest.mark.slow
def test_learns_how_many_tokens_an_error_takes():
    torch.manual_seed(0)
    head = train(HaltingHead(DIM, N, width=32, depth=1))
    latents, hardness = samples(400, torch.Generator().manual_seed(1))
    found = {}
    for error in (0.03, 0.06, 0.12):
        found[error] = head.lengths(latents, torch.full((400,), error))
        needed = (0.5 * hardness / error).clamp(1, N)
        assert (found[error] - needed).abs().mean() < 1.0
        # Samples that are harder get more.
        both = torch.stack([found[error].float(), needed])
        assert torch.corrcoef(both)[0, 1] > 0.9
    means = [found[error].float().mean() for error in sorted(found)]
    assert means[0] > means[1] + 1 > means[2] + 2  # lower errors get more
    assert ((found[0.03] >= found[0.06]) & (found[0.06] >= found[0.12])).float().mean() > 0.97


def test_counts_up_to_the_first_that_halts():
    head = HaltingHead(DIM, 5, width=8, depth=1, heads=2, threshold=0.5)
    logits = torch.tensor([[-1, -1, 1, -1, -1], [1, -1, -1, -1, -1], [-1, -1, -1, -1, -1], [-1, 0, 1, 1, 1.0]])
    head.forward = lambda latents, error: logits
    assert head.lengths(torch.zeros(4, 5, DIM), torch.zeros(4)).tolist() == [2, 1, 5, 1]
    head.threshold = 0.9
    assert head.lengths(torch.zeros(4, 5, DIM), torch.zeros(4)).tolist() == [5, 5, 5, 5]


def test_loss_is_least_where_the_head_is_right_and_leaves_out_what_does_not_count():
    head = HaltingHead(DIM, 4, width=8, depth=1, heads=2)
    right = torch.tensor([[-9.0, -9, 9, 9], [-9.0, 9, 9, 9]])
    latents, error, lengths = torch.zeros(2, 4, DIM), torch.ones(2), torch.tensor([2, 1])
    head.forward = lambda latents, error: right
    assert head.loss(latents, error, lengths) < 1e-3
    assert head.loss(latents, error, torch.tensor([2, 3])) > 2
    assert head.loss(latents, error, torch.tensor([2, 3]), torch.tensor([True, False])) < 1e-3
    head.forward = lambda latents, error: -right
    assert head.loss(latents, error, lengths) > 8


@pytest.mark.parametrize("error", [0.0, 1e-9, 2.0, 1e6])
def test_any_error_has_an_answer(error):
    head = HaltingHead(DIM, N, width=8, depth=1, heads=2)
    assert head(torch.randn(3, N, DIM), torch.full((3,), error)).isfinite().all()


def codec_with(halting, depth=None):
    torch.manual_seed(0)
    codec = tiny_codec("fsq")
    codec.length = LengthPolicy(Uniform(), Truncate(), codebooks=depth)
    if halting:
        codec.length.halting = HaltingHead(WIDTH, TOKENS, width=8, depth=1, heads=2)
    return codec.train()


def test_trains_beside_the_codec_without_reaching_it():
    images = torch.rand(3, 3, SIZE, SIZE) * 2 - 1
    lengths = torch.tensor([1, 4, TOKENS])
    plain, codec = codec_with(False), codec_with(True)
    results = [each(images, lengths) for each in (plain, codec)]
    assert "halting" not in results[0].quantized.penalties
    for result in results:
        (result.signal.square().mean() + sum(result.quantized.penalties.values())).backward()
    head = {f"length.halting.{name}" for name, _ in codec.length.halting.named_parameters()}
    alone = dict(plain.named_parameters())
    for name, parameter in codec.named_parameters():
        if name in head:
            assert parameter.grad is not None
        else:
            assert torch.equal(parameter.grad, alone[name].grad), name
    assert codec.length.halting.out[1].weight.grad.any()
    # Not in evaluation.
    assert "halting" not in codec.eval()(images, lengths).quantized.penalties


def test_is_told_the_error_that_the_sample_had():
    codec, seen = codec_with(True), []
    images, lengths = torch.rand(3, 3, SIZE, SIZE) * 2 - 1, torch.tensor([1, 4, TOKENS])
    loss = codec.length.halting.loss
    codec.length.halting.loss = lambda *told: seen.append(told) or loss(*told)
    signal = codec(images, lengths).signal
    features, error, told, counted = seen[0]
    torch.testing.assert_close(error, (signal - images).abs().mean((1, 2, 3)))
    assert torch.equal(told, lengths) and counted.all() and not error.requires_grad
    torch.testing.assert_close(features, codec.encoder(images))


def test_samples_without_all_codebooks_say_nothing():
    codec = codec_with(True, Axis(Uniform()))
    codec.bottleneck.codebook_sizes = (8, 8)  # as if it had two
    images, lengths = torch.rand(2, 3, SIZE, SIZE) * 2 - 1, torch.tensor([1, 4])
    penalty = [
        codec(images, lengths, torch.tensor(depth)).quantized.penalties["halting"] for depth in ([2, 1], [1, 2], [2, 2])
    ]
    torch.testing.assert_close(penalty[0] + penalty[1], penalty[2])
    assert codec(images, lengths, torch.tensor([1, 1])).quantized.penalties["halting"] == 0
    # Where there are no codebooks, every sample counts, whatever depth says.
    codec.bottleneck.codebook_sizes = ()
    torch.testing.assert_close(codec(images, lengths, torch.tensor([0, 1])).quantized.penalties["halting"], penalty[2])
