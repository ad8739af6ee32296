"""The numbers of the codes' health, against brute force, and the word when a codebook collapses."""

import logging
import math
from collections import Counter
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from varitok.codecs.bottlenecks.binary import BinarySphericalQuantizer, LookupFreeQuantizer
from varitok.codecs.bottlenecks.continuous import KLBottleneck
from varitok.codecs.bottlenecks.contract import Bottleneck
from varitok.codecs.bottlenecks.fsq import FiniteScalarQuantizer
from varitok.codecs.bottlenecks.hierarchy import multi_scale
from varitok.codecs.bottlenecks.product import Product
from varitok.codecs.bottlenecks.residual import residual
from varitok.codecs.bottlenecks.vq import EMAVectorQuantizer, VectorQuantizer
from varitok.codecs.metrics import rate
from varitok.codecs.metrics.rate import CodeCounts
from varitok.codecs.training.codebook_health import CodebookHealth, remedies

LARGE = 36  # bits of a codebook that nothing has a counter for each entry of


def _mixed() -> Bottleneck:
    """Three codebooks: 9 entries, 2^36, 5."""
    large = BinarySphericalQuantizer(LARGE, entropy=0.0)
    return Product([VectorQuantizer(2, 9), large, VectorQuantizer(3, 5)])


def _batch(seed: int, b: int, n: int) -> tuple[Tensor, Tensor, Tensor]:
    random = torch.Generator().manual_seed(seed)
    draw = partial(torch.randint, generator=random)
    large = draw(0, 4, (b, n)) * (2**LARGE // 4) + 7
    codes = torch.stack([draw(0, 9, (b, n)) // 2, large, draw(0, 5, (b, n))], 1)
    return codes, draw(0, n + 1, (b,)), draw(1, 4, (b,))


def _counted(batches: list[tuple[Tensor, Tensor, Tensor]]) -> list[Counter[int]]:
    codebooks: list[Counter[int]] = [Counter() for _ in range(3)]
    for codes, lengths, depth in batches:
        for sample, length, kept in zip(codes.tolist(), lengths.tolist(), depth.tolist(), strict=True):
            for codebook in range(kept):
                codebooks[codebook].update(sample[codebook][:length])
    return codebooks


def _entropy(counts: Counter[int]) -> float:
    total = counts.total()
    return -sum(count / total * math.log2(count / total) for count in counts.values())


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 2**31), st.lists(st.tuples(st.integers(1, 4), st.integers(1, 9)), min_size=1, max_size=3))
def test_numbers_are_those_of_brute_force(seed: int, shapes: list[tuple[int, int]]) -> None:
    batches = [_batch(seed + i, b, n) for i, (b, n) in enumerate(shapes)]
    health = CodebookHealth(_mixed())
    for batch in batches:
        health.add(*batch, positions=100)
    values = health.read()
    codebooks, sizes = _counted(batches), (9, 2**LARGE, 5)
    for place, (counts, size) in enumerate(zip(codebooks, sizes, strict=True)):
        possible = max(1, min(size, counts.total()))
        assert values[f"health/codebook{place}/used"] == pytest.approx(len(counts) / possible)
        assert values[f"health/codebook{place}/entropy"] == pytest.approx(_entropy(counts), abs=1e-9)
        assert values[f"health/codebook{place}/perplexity"] == pytest.approx(2 ** _entropy(counts))
    entropies = [_entropy(counts) for counts in codebooks]
    assert values["health/entropy"] == pytest.approx(sum(entropies) / 3, abs=1e-9)
    assert values["health/bits_per_token"] == pytest.approx(sum(entropies), abs=1e-9)
    said = sum(bits * counts.total() for bits, counts in zip(entropies, codebooks, strict=True))
    assert values["health/bits_per_position"] == pytest.approx(said / (100 * len(batches)), abs=1e-9)
    signals = sum(b for b, _ in shapes)
    kept = [length for _, lengths, _ in batches for length in lengths.tolist()]  # all samples keep the first codebook
    assert values["rate/tokens"] == pytest.approx(sum(kept) / signals)
    packed = sum(math.log2(size) * counts.total() for counts, size in zip(codebooks, sizes, strict=True))
    assert values["rate/bits"] == pytest.approx(packed / signals)


def test_a_reading_begins_anew() -> None:
    health = CodebookHealth(FiniteScalarQuantizer([3, 3]))
    everything = torch.arange(9)[None, None]
    health.add(everything, torch.tensor([9]), torch.tensor([1]), 9)
    assert health.read()["health/used"] == 1
    health.add(everything, torch.tensor([1]), torch.tensor([1]), 9)
    assert health.read()["health/perplexity"] == 1
    assert health.read() == {}


def test_a_continuous_bottleneck_has_no_health() -> None:
    health = CodebookHealth(KLBottleneck(4))
    health.add(torch.randn(2, 4, 3), torch.tensor([3, 3]), torch.tensor([0, 0]), 10)
    assert health.read() == {}


@pytest.mark.parametrize("pending", [1, 1 << 20])
def test_counts_of_large_codebooks_do_not_hang_on_when_they_are_sorted(
    pending: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rate, "PENDING", pending)
    counts = CodeCounts((2**40, 4, 2**62))
    first = torch.tensor([[[5, 2**39], [3, 3], [2**61, 1]]])
    counts.add(first)
    counts.add(first, torch.tensor([[[True, False], [False, True], [True, True]]]))
    assert sorted(map(tuple, counts.rows().tolist())) == [
        (0, 5, 2),
        (0, 2**39, 1),
        (1, 3, 3),
        (2, 1, 2),
        (2, 2**61, 2),
    ]
    other = CodeCounts((2**40, 4, 2**62))
    other.add(first)
    other.include(counts.rows())
    assert [sorted(codebook.tolist()) for codebook in other.codebooks()] == [[2, 3], [5], [3, 3]]


def _worker(rank: int, store: str, folder: str) -> None:
    dist.init_process_group("gloo", f"file://{store}", rank=rank, world_size=2)
    health = CodebookHealth(_mixed())
    health.add(*_batch(rank, 2, 5 + rank), positions=10 + rank)
    torch.save(health.read(), Path(folder) / str(rank))
    dist.destroy_process_group()


@pytest.mark.slow
def test_two_processes_read_what_one_reads(tmp_path: Path) -> None:
    mp.spawn(_worker, (str(tmp_path / "store"), str(tmp_path)), nprocs=2)
    health = CodebookHealth(_mixed())
    for rank in range(2):
        health.add(*_batch(rank, 2, 5 + rank), positions=10 + rank)
    whole = health.read()
    assert torch.load(tmp_path / "0") == torch.load(tmp_path / "1") == pytest.approx(whole)


def _readings(health: CodebookHealth, codebooks: list[Tensor], times: int) -> None:
    """Add the same codes `(n,)` of each codebook at `times` readings."""
    for _ in range(times):
        codes = torch.stack(codebooks)[None]
        health.add(codes, torch.tensor([codes.shape[2]]), torch.tensor([len(codebooks)]), 1)
        health.read()


@pytest.mark.parametrize(
    ("make", "words", "others"),
    [
        (lambda: EMAVectorQuantizer(2, 256), ["kmeans_init", "revival", "cosine=true"], ["vq_ema"]),
        (lambda: VectorQuantizer(2, 256), ["cosine=true", "vq_ema"], ["revival"]),
        (lambda: VectorQuantizer(2, 256, cosine=True), ["entropy"], ["cosine"]),
        (lambda: FiniteScalarQuantizer([16, 16]), ["entropy", "levels", "unit_latents"], ["codebook_size", "vq_ema"]),
        (lambda: LookupFreeQuantizer(8), ["entropy", "bits", "unit_latents"], ["codebook_size", "vq_ema"]),
    ],
)
def test_a_collapse_is_told_once_with_what_to_change(
    make, words: list[str], others: list[str], caplog: pytest.LogCaptureFixture
) -> None:
    health = CodebookHealth(make())
    collapsed = [torch.arange(600) % 2]
    with caplog.at_level(logging.WARNING, "varitok"):
        _readings(health, collapsed, 2)
        assert not caplog.records
        _readings(health, collapsed, 4)
    (record,) = caplog.records
    text = record.getMessage()
    assert (
        "\n" not in text and "codebook 0 is worth 2.0 of 256 entries (1.00 bits)" in text and "optim.codec.lr" in text
    )
    advice = text.partition("; try ")[2]
    assert all(word in advice for word in words) and not any(word in advice for word in others)


def test_a_healthy_codebook_and_one_that_recovers_are_not_told(caplog: pytest.LogCaptureFixture) -> None:
    health = CodebookHealth(VectorQuantizer(2, 256))
    healthy, collapsed = [torch.arange(600) % 256], [torch.zeros(600, dtype=torch.int64)]
    with caplog.at_level(logging.WARNING, "varitok"):
        _readings(health, healthy, 4)
        for _ in range(3):
            _readings(health, collapsed, 2)
            _readings(health, healthy, 1)
    assert not caplog.records


def test_a_codebook_that_is_waking_up_is_not_told(caplog: pytest.LogCaptureFixture) -> None:
    """As measured in the demo: 1.5, 1.3, 4, 7 % of the entries at the first readings."""
    health = CodebookHealth(VectorQuantizer(2, 1000))
    with caplog.at_level(logging.WARNING, "varitok"):
        for entries in (15, 13, 40, 45, 52):
            _readings(health, [torch.arange(5000) % entries], 1)
        assert not caplog.records
        _readings(health, [torch.arange(5000) % 40], 3)
    assert len(caplog.records) == 1


def test_few_tokens_are_no_collapse_of_a_large_codebook(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, "varitok"):
        _readings(CodebookHealth(BinarySphericalQuantizer(LARGE, entropy=0.0)), [torch.arange(50) * 2**20], 5)
    assert not caplog.records


def test_a_small_codebook_can_collapse_and_its_neighbors_are_spared(caplog: pytest.LogCaptureFixture) -> None:
    """One of 4 entries is a quarter of the possible use, and still the minimum."""
    health = CodebookHealth(residual(partial(EMAVectorQuantizer, 2, 4), 3))
    with caplog.at_level(logging.WARNING, "varitok"):
        _readings(health, [torch.arange(100) % 4, torch.zeros(100, dtype=torch.int64), torch.arange(100) % 3], 3)
    (record,) = caplog.records
    assert "codebook 1 " in record.getMessage() and "codebook 0 " not in record.getMessage()


def test_a_layer_of_codebooks_is_read_as_one() -> None:
    """VAR has 680 codebooks; a reading has values for each of its ten scales."""
    health = CodebookHealth(multi_scale(partial(EMAVectorQuantizer, 2, 8), [1, 2], refinements=0))
    codes = torch.stack([torch.tensor([[0], [1], [2], [3], [4]]), torch.tensor([[0], [1], [1], [2], [2]])])
    health.add(codes, torch.tensor([1, 1]), torch.tensor([5, 1]), positions=8)
    values = health.read()
    assert "health/codebook1/used" in values and "health/codebook2/used" not in values
    assert values["health/codebook0/entropy"] == 0 and values["health/codebook1/entropy"] == 2
    assert values["health/bits_per_token"] == 4 * 2 and values["health/bits_per_position"] == 1
    assert values["rate/tokens"] == 1 and values["rate/bits"] == 3 * 6 / 2
    assert len(health.remedies) == 2 and all("revival" in words for words in health.remedies)
    health.restore({"low": [0] * 5, "last": [1.0] * 5, "told": []}, 0, torch.device("cpu"))  # of an older version
    assert len(health.low) == 2


def test_each_codebook_has_the_advice_of_its_own_part() -> None:
    mixed = Product([FiniteScalarQuantizer([5, 3]), residual(partial(EMAVectorQuantizer, 4, 11), 2)])
    grid, *stack = remedies(mixed)
    assert "levels" in grid and all("revival" in words for words in stack) and "revival" not in grid
