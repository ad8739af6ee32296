"""How a codebook of moving averages begins, learns, and replaces unused entries."""

import pytest
import torch
from torch import Tensor

from varitok.codecs.bottlenecks.residual import residual
from varitok.codecs.bottlenecks.vq import EMAVectorQuantizer, KMeansQuantizer
from varitok.codecs.result import Quantized

PLACES = 10.0 * torch.eye(4)


def _forward(codebook: torch.nn.Module, latents: Tensor) -> Quantized:
    """Send latents `(b, n, d)`, all of them valid, through the first codebook."""
    lengths = torch.full((len(latents),), latents.shape[1])
    quantized: Quantized = codebook(latents.clone().requires_grad_(), lengths, torch.ones_like(lengths))
    return quantized


def _used(codebook: EMAVectorQuantizer, uses: list[int]) -> float:
    """Use entries so often in one update, each at its own place; gives the number that was replaced."""
    _forward(codebook, PLACES.repeat_interleave(torch.tensor(uses), 0)[None])
    codebook.update()
    return float(codebook.codebook.replaced)


def _placed(revival: float) -> EMAVectorQuantizer:
    codebook = EMAVectorQuantizer(4, 4, decay=0.9, revival=revival, kmeans_init=False).train()
    codebook.codebook.entries.copy_(PLACES)
    codebook.codebook.sums.copy_(PLACES)
    return codebook


def _distance(entry: Tensor) -> float:
    """How far an entry is from those places that are used below."""
    return float(torch.cdist(entry[None], PLACES[1:]).min())


@pytest.mark.parametrize("uses", [1, 20])
@pytest.mark.parametrize("revival", [0.05, 0.2])
def test_an_entry_is_dead_by_its_share_not_by_its_count(uses: int, revival: float) -> None:
    """The first entry has a tenth of even use."""
    codebook = _placed(revival)
    replaced = sum(_used(codebook, [uses, 13 * uses, 13 * uses, 13 * uses]) for _ in range(60))
    assert (replaced > 0) == (revival == 0.2)


def test_an_entry_is_replaced_with_its_sum_and_count() -> None:
    """Otherwise the next average would move it back, and its count would have it replaced again."""
    codebook = _placed(revival=0.5)
    updates = 1
    while not _used(codebook, [0, 4, 4, 4]):
        updates += 1
        assert updates < 50 and _distance(codebook.table()[0]) > 10
    for _ in range(3):
        assert _distance(codebook.table()[0]) < 1  # a latent of the batch
        assert _used(codebook, [0, 4, 4, 4]) == 0


def test_dead_entries_are_replaced_from_all_batches_of_an_update() -> None:
    """Two batches to an update are one of twice the size, also when something dies."""
    torch.manual_seed(0)
    batches = torch.randn(20, 2, 3, 8, 4)
    codebooks = [EMAVectorQuantizer(4, 12, decay=0.9, revival=0.5, kmeans_init=False).train() for _ in range(2)]
    codebooks[0].codebook.entries[:4] += 50  # too far for any latent
    codebooks[0].codebook.sums.copy_(codebooks[0].codebook.entries)
    codebooks[1].load_state_dict(codebooks[0].state_dict())
    replaced = 0.0
    for pair in batches:
        _forward(codebooks[0], pair.flatten(0, 1))
        for batch in pair:
            _forward(codebooks[1], batch)
        for codebook in codebooks:
            codebook.update()
        replaced += float(codebooks[0].codebook.replaced)
    assert replaced > 0
    torch.testing.assert_close(codebooks[1].table(), codebooks[0].table(), rtol=1e-4, atol=1e-5)


def test_levels_that_share_a_codebook_share_its_replacements() -> None:
    """Also where no sample keeps the last level."""
    codebook = residual(
        lambda: EMAVectorQuantizer(4, 12, decay=0.9, revival=0.5, kmeans_init=False), 3, shared=True
    ).train()
    replaced = 0.0
    for _ in range(20):
        quantized = _forward(codebook, torch.randn(2, 8, 4))
        replaced += float(quantized.metrics["replaced"])
        codebook.update()
    assert replaced > 0


def test_nothing_is_replaced_by_what_an_earlier_update_saw() -> None:
    """An update without a forward has no latents to offer."""
    codebook = _placed(revival=0.5)
    _used(codebook, [0, 4, 4, 4])
    codebook.codebook.counts[0] = 0
    codebook.update()
    assert codebook.codebook.replaced == 0


def test_a_codebook_that_saw_nothing_stays() -> None:
    """As if frozen: after k-means, and after a replacement, updates without a forward change no bit."""
    begun, revived = EMAVectorQuantizer(4, 4).train(), _placed(revival=0.5)
    _forward(begun, torch.randn(2, 8, 4))
    begun.codebook.gathered.zero_()
    while not _used(revived, [0, 4, 4, 4]):
        pass
    for codebook in (begun, revived):
        before = codebook.table().clone()
        codebook.update()
        assert torch.equal(codebook.table(), before)


def test_an_empty_cluster_keeps_its_place() -> None:
    """K-means of two vectors for four entries: the update after must not move those without a vector to 0."""
    codebook = EMAVectorQuantizer(4, 4, revival=0.0).train()
    for _ in range(3):
        _forward(codebook, PLACES[None, :2])
        assert codebook.table().norm(dim=1).min() > 5
        codebook.update()
    assert codebook.table().norm(dim=1).min() > 5


def test_every_token_counts_the_same_in_mini_batch_kmeans() -> None:
    """Batches of unequal size around places far apart: each cluster becomes the mean of all that was ever near it."""
    torch.manual_seed(0)
    codebook = KMeansQuantizer(4, 4, revival=0.0).train()
    seen: list[Tensor] = []
    for count in (8, 1, 5, 3):
        latents = (PLACES[:, None] + torch.randn(4, count, 4)).flatten(0, 1)[None]
        if not seen:  # what k-means begins with has counted once before its first update
            seen.append(latents)
        seen.append(latents)
        _forward(codebook, latents)
        codebook.update()
    tokens = torch.cat(seen, 1)[0]
    nearest = torch.cdist(tokens, PLACES).argmin(1)
    means = torch.stack([tokens[nearest == place].mean(0) for place in range(4)])
    found = codebook.table()[torch.cdist(PLACES, codebook.table()).argmin(1)]
    torch.testing.assert_close(found, means, rtol=1e-3, atol=1e-3)
