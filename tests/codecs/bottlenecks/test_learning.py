"""How codebooks learn: every test here fails without the mechanism that it names."""

import pytest
import torch
from torch.nn import functional

from varitok.codecs.bottlenecks.factorized import FactorizedResidualQuantizer
from varitok.codecs.bottlenecks.product import grouped
from varitok.codecs.bottlenecks.vq import (
    EMAVectorQuantizer,
    IndexVectorQuantizer,
    KMeansQuantizer,
    MixtureVectorQuantizer,
    SimVectorQuantizer,
    VectorQuantizer,
)


def _draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def _quantize(bottleneck, latents):
    lengths = torch.full((len(latents),), latents.shape[1])
    return bottleneck(latents, lengths, bottleneck.depths(latents))


def _chosen(bottleneck, latents):
    quantized = _quantize(bottleneck, latents)
    (quantized.latents.square().sum() + sum(quantized.penalties.values())).backward()
    chosen = torch.zeros(bottleneck.codebook_sizes[0], dtype=torch.bool)
    chosen[quantized.codes.flatten()] = True
    assert 0 < chosen.sum() < len(chosen)
    return chosen, bottleneck.codebook.grad.abs().sum(1) > 0


def test_index_backpropagation_reaches_all_entries():
    latents = _draw(2, 8, 6)
    plain, index = VectorQuantizer(6, 50), IndexVectorQuantizer(6, 50, entropy=0.0)
    chosen, moved = _chosen(plain, latents)
    assert torch.equal(moved, chosen), "a plain codebook's gradient reaches those that were chosen"
    chosen, moved = _chosen(index, latents)
    assert moved.all()


@pytest.mark.parametrize("spread", [0.5, 1.0, None])
def test_index_backpropagation_scales_the_gradient_by_the_entries_variance(spread):
    """Beside penalties of full size, narrow entries leave the signal's loss almost no say."""
    torch.manual_seed(0)
    bottleneck = IndexVectorQuantizer(16, 1 << 14, 0.0, 0.0, 0.0, 0.0, spread=spread)
    latents = torch.zeros(1, 1, 16, requires_grad=True)  # all entries weigh alike
    wanted = torch.randn(1, 1, 16)
    result = bottleneck(latents, torch.tensor([1]), torch.tensor([1]))
    (got,) = torch.autograd.grad((result.latents * wanted).sum(), latents)
    variance = 1 / 16 if spread is None else spread**2
    torch.testing.assert_close(got, variance * wanted, atol=0.1 * variance, rtol=0.1)


def test_index_backpropagation_is_the_softmax_straight_through():
    """Forward is the chosen entry; the gradient is that of `one_hot + p - sg(p)` times the codebook (section 3.2)."""
    bottleneck = IndexVectorQuantizer(6, 50, commitment=0.0, codebook=0.0, double=0.0, entropy=0.0)
    latents, weights = _draw(2, 8, 6).requires_grad_(), _draw(2, 8, 6, seed=1)
    (_quantize(bottleneck, latents).latents * weights).sum().backward()
    ours = latents.grad.clone(), bottleneck.codebook.grad.clone()
    latents.grad = bottleneck.codebook.grad = None
    logits = latents @ bottleneck.codebook.T
    soft = logits.softmax(-1)
    index = functional.one_hot(logits.argmax(-1), 50) + soft - soft.detach()
    ((index @ bottleneck.codebook) * weights).sum().backward()
    torch.testing.assert_close(ours, (latents.grad, bottleneck.codebook.grad), atol=1e-5, rtol=1e-4)


def test_sim_vq_moves_entries_that_nobody_chose():
    bottleneck = SimVectorQuantizer(6, 50)
    before, basis = bottleneck.table().detach().clone(), bottleneck.basis.clone()
    quantized = _quantize(bottleneck, _draw(1, 4, 6))
    sum(quantized.penalties.values()).backward()
    torch.optim.SGD(bottleneck.parameters(), 0.1).step()
    moved = (bottleneck.table() - before).abs().sum(1) > 0
    unused = torch.ones(50, dtype=torch.bool)
    unused[quantized.codes.flatten()] = False
    assert unused.sum() >= 46 and moved[unused].all()
    assert torch.equal(bottleneck.basis, basis)


def _used(bottleneck, latents):
    return len(bottleneck.encode(latents).unique()) / bottleneck.codebook_sizes[0]


def test_a_mixture_leaves_no_entry_behind():
    """All entries begin in one far corner, so that only the one or two next to the latents are ever chosen."""
    start = _draw(32, 4, seed=5) * 0.3 + 3
    latents = _draw(4, 64, 4, seed=6)
    shares = {}
    for name, bottleneck in {
        "mixture": MixtureVectorQuantizer(4, 32, 1.0, 1.0),
        "plain": VectorQuantizer(4, 32),
    }.items():
        with torch.no_grad():
            bottleneck.codebook.copy_(start)
        if name == "mixture":
            assert _chosen(bottleneck, latents)[1].all()
        optimizer = torch.optim.Adam(bottleneck.parameters(), 0.05)
        for step in range(150):
            optimizer.zero_grad()
            sum(_quantize(bottleneck, _draw(4, 64, 4, seed=step)).penalties.values()).backward()
            optimizer.step()
        shares[name] = _used(bottleneck, latents)
    assert shares["mixture"] > shares["plain"] + 0.2, shares


def test_the_mixtures_penalty_is_the_latents_likelihood():
    bottleneck = MixtureVectorQuantizer(4, 9, likelihood=1.0, deviation=0.7)
    latents = _draw(2, 5, 4)
    parts = torch.distributions.MixtureSameFamily(
        torch.distributions.Categorical(torch.ones(9)),
        torch.distributions.Independent(torch.distributions.Normal(bottleneck.codebook.detach(), 0.7), 1),
    )
    expected = -parts.log_prob(latents).mean() / 4
    torch.testing.assert_close(_quantize(bottleneck, latents).penalties["likelihood"], expected, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("cosine", [False, True])
def test_revival_saves_a_collapsed_codebook(cosine):
    """One entry is among the latents, and the others on the far side, where nobody chooses them."""
    middle = 4 * torch.eye(6)[0]
    latents = _draw(4, 128, 6, seed=7) + middle
    shares = {}
    for revival in (0.0, 0.1):
        bottleneck = EMAVectorQuantizer(6, 64, cosine=cosine, decay=0.8, revival=revival, kmeans_init=False)
        far = torch.cat([middle[None], 0.1 * _draw(63, 6) - 10 * middle])
        far = functional.normalize(far, dim=1) if cosine else far
        bottleneck.codebook.entries.copy_(far)
        bottleneck.codebook.sums.copy_(far)
        assert _used(bottleneck, latents) == 1 / 64
        replaced = 0.0
        for step in range(30):
            quantized = _quantize(bottleneck, _draw(4, 128, 6, seed=step) + middle)
            bottleneck.update()
            replaced += float(bottleneck.codebook.replaced)
            assert quantized.metrics["replaced"] <= 64
        assert (replaced > 0) == (revival > 0)
        shares[revival] = _used(bottleneck.eval(), latents)
    assert shares[0.1] > 0.8 and shares[0.0] < 0.1, shares


@pytest.mark.parametrize("cosine", [False, True])
def test_a_codebook_begins_as_the_k_means_of_its_first_batch(cosine):
    centers = functional.normalize(_draw(8, 6, seed=1), dim=1) * 4
    latents = (centers[torch.arange(256) % 8] + 0.05 * _draw(256, 6)).view(4, 64, 6)
    bottleneck = EMAVectorQuantizer(6, 8, cosine=cosine, kmeans_init=True)
    first = _quantize(bottleneck, latents)
    plain = EMAVectorQuantizer(6, 8, cosine=cosine, kmeans_init=False)
    assert first.metrics["distance"] < 0.5 * _quantize(plain, latents).metrics["distance"]
    entries = bottleneck.codebook.entries.clone()
    _quantize(bottleneck, latents + 1)
    assert torch.equal(bottleneck.codebook.entries, entries), "it began twice"


def test_k_means_counts_every_batch_the_same():
    """Sculley's update: an entry is the mean of all that it was ever given, not of the last batches."""
    bottleneck = KMeansQuantizer(3, 1, revival=0.0)
    for step in range(40):
        _quantize(bottleneck, _draw(2, 32, 3, seed=step) + (step >= 20) * 4)
        bottleneck.update()
    torch.testing.assert_close(bottleneck.codebook.entries[0], torch.full((3,), 2.0), atol=0.2, rtol=0)


def test_k_means_gets_better_with_more_batches():
    bottleneck = KMeansQuantizer(3, 24)
    held = _draw(4, 256, 3, seed=500)
    distances = []
    for step in range(40):
        _quantize(bottleneck, _draw(2, 30, 3, seed=step))  # a first batch of 60 says little of 24 clusters
        bottleneck.update()
        left = held - bottleneck.decode(bottleneck.encode(held))
        distances.append(float(left.square().mean()))
    assert distances[-1] < 0.95 * distances[0]
    assert not _quantize(bottleneck, held).penalties["commitment"]


def _settled(bottleneck, latents, steps, lr=None):
    """Train a bottleneck alone on fixed latents; gives the mean squared error left, and the first codebook's used
    share.
    """
    optimizer = torch.optim.Adam(bottleneck.parameters(), lr) if lr else None
    for _ in range(steps):
        result = _quantize(bottleneck, latents)
        if optimizer:
            optimizer.zero_grad()
            (sum(result.penalties.values()) + (result.latents - latents).square().mean()).backward()
            optimizer.step()
        bottleneck.update()
    with torch.no_grad():
        found = _quantize(bottleneck.eval(), latents)
    return float((found.latents - latents).square().mean()), len(
        found.codes[:, 0].unique()
    ) / bottleneck.codebook_sizes[0]


def test_a_narrow_projection_keeps_a_codebook_in_use():
    """DAC's factorized codes: in a wide space most entries of a plain codebook are never the nearest to anything."""
    torch.manual_seed(0)
    latents = _draw(4, 256, 6) @ _draw(6, 64, seed=1)  # six directions matter, of 64
    _, narrow = _settled(FactorizedResidualQuantizer(64, 1, 128, width=8), latents, 60, 0.01)
    _, plain = _settled(VectorQuantizer(64, 128), latents, 60, 0.01)
    assert narrow > 1.4 * plain


def test_parts_of_a_product_say_more_than_one_codebook_of_their_entries():
    """Product quantization: four codebooks of 16 entries make 65,536 combinations, one codebook of 64 has 64."""
    latents = _draw(4, 256, 8)
    product, _ = _settled(grouped(lambda: EMAVectorQuantizer(2, 16, decay=0.8), 4), latents, 30)
    single, _ = _settled(EMAVectorQuantizer(8, 64, decay=0.8), latents, 30)
    assert product < single / 2
