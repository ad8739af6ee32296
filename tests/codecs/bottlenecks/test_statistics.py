"""How a book of moving averages begins, learns, and replaces what is not used."""

import pytest
import torch
from torch import Tensor

from varitok.codecs.bottlenecks.residual import residual
from varitok.codecs.bottlenecks.vq import EMAVectorQuantizer, KMeansQuantizer
from varitok.codecs.result import Quantized

PLACES = 10.0 * torch.eye(4)


def _forward(book: torch.nn.Module, latents: Tensor) -> Quantized:
    """Send latents `(b, n, d)`, all of them valid, through the first book."""
    lengths = torch.full((len(latents),), latents.shape[1])
    quantized: Quantized = book(latents.clone().requires_grad_(), lengths, torch.ones_like(lengths))
    return quantized


def _used(book: EMAVectorQuantizer, uses: list[int]) -> float:
    """Use entries so often in one update, each at its own place; gives the number that was replaced."""
    _forward(book, PLACES.repeat_interleave(torch.tensor(uses), 0)[None])
    book.update()
    return float(book.book.replaced)


def _placed(revival: float) -> EMAVectorQuantizer:
    book = EMAVectorQuantizer(4, 4, decay=0.9, revival=revival, initialise=False).train()
    book.book.entries.copy_(PLACES)
    book.book.sums.copy_(PLACES)
    return book


def _distance(entry: Tensor) -> float:
    """How far an entry is from those places that are used below."""
    return float(torch.cdist(entry[None], PLACES[1:]).min())


@pytest.mark.parametrize("uses", [1, 20])
@pytest.mark.parametrize("revival", [0.05, 0.2])
def test_an_entry_is_dead_by_its_share_not_by_its_count(uses: int, revival: float) -> None:
    """The first entry has a tenth of even use."""
    book = _placed(revival)
    replaced = sum(_used(book, [uses, 13 * uses, 13 * uses, 13 * uses]) for _ in range(60))
    assert (replaced > 0) == (revival == 0.2)


def test_an_entry_is_replaced_with_its_sum_and_count() -> None:
    """Or the next average would take it back to where it was, and its count would have it replaced again."""
    book = _placed(revival=0.5)
    updates = 1
    while not _used(book, [0, 4, 4, 4]):
        updates += 1
        assert updates < 50 and _distance(book.table()[0]) > 10
    for _ in range(3):
        assert _distance(book.table()[0]) < 1  # a latent of the batch
        assert _used(book, [0, 4, 4, 4]) == 0


def test_dead_entries_are_replaced_from_all_batches_of_an_update() -> None:
    """Two batches to an update are one of twice the size, also when something dies."""
    torch.manual_seed(0)
    batches = torch.randn(20, 2, 3, 8, 4)
    books = [EMAVectorQuantizer(4, 12, decay=0.9, revival=0.5, initialise=False).train() for _ in range(2)]
    books[0].book.entries[:4] += 50  # too far for any latent
    books[0].book.sums.copy_(books[0].book.entries)
    books[1].load_state_dict(books[0].state_dict())
    replaced = 0.0
    for pair in batches:
        _forward(books[0], pair.flatten(0, 1))
        for batch in pair:
            _forward(books[1], batch)
        for book in books:
            book.update()
        replaced += float(books[0].book.replaced)
    assert replaced > 0
    torch.testing.assert_close(books[1].table(), books[0].table(), rtol=1e-4, atol=1e-5)


def test_levels_that_share_a_book_share_its_replacements() -> None:
    """Also where no sample keeps the last level."""
    book = residual(lambda: EMAVectorQuantizer(4, 12, decay=0.9, revival=0.5, initialise=False), 3, shared=True).train()
    replaced = 0.0
    for _ in range(20):
        quantized = _forward(book, torch.randn(2, 8, 4))
        replaced += float(quantized.metrics["replaced"])
        book.update()
    assert replaced > 0


def test_nothing_is_replaced_by_what_an_earlier_update_saw() -> None:
    """An update without a forward has no latents to offer."""
    book = _placed(revival=0.5)
    _used(book, [0, 4, 4, 4])
    book.book.counts[0] = 0
    book.update()
    assert book.book.replaced == 0


def test_a_book_that_saw_nothing_stays() -> None:
    """As where it is frozen: after k-means, and after a replacement, updates without a forward change no bit."""
    begun, revived = EMAVectorQuantizer(4, 4).train(), _placed(revival=0.5)
    _forward(begun, torch.randn(2, 8, 4))
    begun.book.gathered.zero_()
    while not _used(revived, [0, 4, 4, 4]):
        pass
    for book in (begun, revived):
        before = book.table().clone()
        book.update()
        assert torch.equal(book.table(), before)


def test_an_empty_cluster_keeps_its_place() -> None:
    """K-means of two vectors for four entries: the update after must not move those without a vector to 0."""
    book = EMAVectorQuantizer(4, 4, revival=0.0).train()
    for _ in range(3):
        _forward(book, PLACES[None, :2])
        assert book.table().norm(dim=1).min() > 5
        book.update()
    assert book.table().norm(dim=1).min() > 5


def test_every_token_counts_the_same_in_mini_batch_kmeans() -> None:
    """Batches of unequal size around places far apart: each cluster becomes the mean of all that was ever near it."""
    torch.manual_seed(0)
    book = KMeansQuantizer(4, 4, revival=0.0).train()
    seen: list[Tensor] = []
    for count in (8, 1, 5, 3):
        latents = (PLACES[:, None] + torch.randn(4, count, 4)).flatten(0, 1)[None]
        if not seen:  # what k-means begins with has counted once before its first update
            seen.append(latents)
        seen.append(latents)
        _forward(book, latents)
        book.update()
    tokens = torch.cat(seen, 1)[0]
    nearest = torch.cdist(tokens, PLACES).argmin(1)
    means = torch.stack([tokens[nearest == place].mean(0) for place in range(4)])
    found = book.table()[torch.cdist(PLACES, book.table()).argmin(1)]
    torch.testing.assert_close(found, means, rtol=1e-3, atol=1e-3)
