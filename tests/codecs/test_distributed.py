"""Collectives over two gloo processes, this one and another; and that one process needs none."""

from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from varitok.codecs.distributed import (
    broadcast_from_rank_zero,
    differentiable_mean_over_ranks,
    exchange_rows,
    gather_rows,
    gather_rows_with_gradient,
    mean_over_ranks,
    sum_over_ranks,
    world_size,
)
from varitok.codecs.losses.contract import Guidance
from varitok.codecs.losses.guided import Contrast
from varitok.data.feature_map import FeatureMap

from ..processes import in_two

CONTRASTS = ("softmax", "sigmoid")
ROWS = {"unequal": (3, 1), "first_empty": (0, 2), "second_empty": (2, 0), "empty": (0, 0)}


def _rows(rank: int, count: int) -> Tensor:
    return torch.arange(count * 2.0).view(count, 2) + 100 * rank


def _square(mean: Tensor) -> Tensor:
    """Something that is not linear, so that the gradient shows at which value it was taken."""
    return (mean**3).sum()


def _results(rank: int) -> dict[str, Any]:
    """Call every collective on tensors that differ between processes."""
    mine = torch.tensor([1.0, 2.0]) + 10 * rank
    results: dict[str, Any] = {"processes": world_size()}
    results["mean"] = mean_over_ranks(mine)
    results["mean_input"] = mine.clone()
    results["first"] = broadcast_from_rank_zero(mine.clone())
    results["first_uneven"] = broadcast_from_rank_zero((torch.arange(6.0).view(2, 3) + rank).T)
    parts = [torch.full((2, 3), 1.0 + rank), torch.full((0,), 5.0), torch.tensor(7.0 * (rank + 1))]
    results["sums"] = sum_over_ranks(parts)
    results["no_sums"] = sum_over_ranks([])
    for name, counts in ROWS.items():
        results[name] = gather_rows(_rows(rank, counts[rank]))
        results[f"{name}_shared"] = exchange_rows(_rows(rank, counts[rank]), torch.arange(counts[rank]) % 2)
    leaf = mine.clone().requires_grad_()
    _square(differentiable_mean_over_ranks(leaf)).backward()
    results["gradient"] = leaf.grad
    for kind in CONTRASTS:
        results[kind] = _contrast(kind, slice(0, 2) if rank == 0 else slice(2, 6))
    return results


def _contrast(kind: str, cut: slice) -> list[Tensor]:
    """Return the contrastive loss on a share of a batch, and its gradients at its input and its own weights."""
    source = torch.Generator().manual_seed(3)
    values, aim = torch.randn(6, 4, generator=source), torch.randn(6, 3, generator=source)
    below = torch.randn(4, 4, generator=source).requires_grad_()
    term = Contrast("teacher", kind=kind)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        term.head = nn.Linear(4, 3)
    inside = {term.at: FeatureMap((values[cut] @ below)[..., None], (1.0,))}
    known = {"teacher": FeatureMap(aim[cut][..., None], (1.0,))}
    loss = term(values[cut], Guidance({}, values[cut], None, inside, known))
    return [loss.detach(), *torch.autograd.grad(loss, [below, *term.parameters()])]


def _worker(rank: int, folder: Path) -> None:
    patience = timedelta(seconds=60)  # a process that waits for ever is a failure
    dist.init_process_group("gloo", f"file://{folder}/store", rank=rank, world_size=2, timeout=patience)
    torch.save(_results(rank), folder / f"{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def both(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What each of two processes got."""
    folder = tmp_path_factory.mktemp("processes")
    in_two(_worker, folder)
    return [torch.load(folder / f"{rank}.pt") for rank in range(2)]


def test_they_are_counted(both: list[dict[str, Any]]) -> None:
    assert world_size() == 1
    assert [results["processes"] for results in both] == [2, 2]


def test_a_mean_is_the_same_on_both_and_leaves_its_input(both: list[dict[str, Any]]) -> None:
    for rank, results in enumerate(both):
        assert results["mean"].tolist() == [6.0, 7.0]
        assert results["mean_input"].tolist() == [1.0 + 10 * rank, 2.0 + 10 * rank]


def test_the_first_ones_values_are_given_to_both(both: list[dict[str, Any]]) -> None:
    for results in both:
        assert results["first"].tolist() == [1.0, 2.0]
        assert results["first_uneven"].tolist() == [[0.0, 3.0], [1.0, 4.0], [2.0, 5.0]]


def test_sums_keep_their_shapes(both: list[dict[str, Any]]) -> None:
    for results in both:
        matrix, empty, scalar = results["sums"]
        assert torch.equal(matrix, torch.full((2, 3), 3.0)) and empty.shape == (0,)
        assert scalar.shape == () and scalar.item() == 21
        assert results["no_sums"] == []


@pytest.mark.parametrize("name", ROWS)
def test_rows_come_in_the_order_of_the_ranks(both: list[dict[str, Any]], name: str) -> None:
    whole = torch.cat([_rows(rank, count) for rank, count in enumerate(ROWS[name])])
    for results in both:
        assert torch.equal(results[name], whole)


@pytest.mark.parametrize("name", ROWS)
def test_each_row_goes_to_its_owner(both: list[dict[str, Any]], name: str) -> None:
    for rank, results in enumerate(both):
        whole = torch.cat([_rows(sender, count)[rank::2] for sender, count in enumerate(ROWS[name])])
        assert torch.equal(results[f"{name}_shared"], whole)


def test_the_average_has_the_gradient_of_the_global_batch(both: list[dict[str, Any]]) -> None:
    """DDP averages over processes; what it then has must be the gradient of the loss of all values at once."""
    values = torch.tensor([[1.0, 2.0], [11.0, 12.0]], requires_grad=True)
    _square(values.mean(0)).backward()
    for rank, results in enumerate(both):
        assert values.grad is not None
        torch.testing.assert_close(results["gradient"] / 2, values.grad[rank])


@pytest.mark.parametrize("kind", CONTRASTS)
def test_contrast_over_processes_is_that_of_the_global_batch(both: list[dict[str, Any]], kind: str) -> None:
    """What DDP makes of the gradients, their mean, is the gradient of the whole batch on one process."""
    loss, *gradients = _contrast(kind, slice(0, 6))
    for results in both:
        torch.testing.assert_close(results[kind][0], loss)
    for each in zip(*(results[kind][1:] for results in both), gradients, strict=True):
        torch.testing.assert_close((each[0] + each[1]) / 2, each[2])


def test_one_process_needs_no_collective(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("a collective with one process")

    for name in ("all_reduce", "all_gather", "broadcast"):
        monkeypatch.setattr(dist, name, refuse)
    values = torch.tensor([[1.0, 2.0]])
    alone: list[Callable[[Tensor], Tensor]] = [
        mean_over_ranks,
        differentiable_mean_over_ranks,
        lambda tensor: exchange_rows(tensor, torch.zeros(len(tensor), dtype=torch.int64)),
        broadcast_from_rank_zero,
        gather_rows,
        gather_rows_with_gradient,
        lambda tensor: sum_over_ranks([tensor])[0],
    ]
    for function in alone:
        assert torch.equal(function(values), values)
