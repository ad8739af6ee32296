"""A run that stopped goes on with the batches it had left; processes share the data."""

from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch

from varitok.data.batch import Batch
from varitok.data.datamodule import DataModule
from varitok.data.synthetic.images import dead_leaves


def module(updates_made: int | None = None, rank: int = 0, world: int = 1, accumulate: int = 1) -> DataModule:
    """Make a module of 8 training and 7 validation images; with updates made, as Lightning holds it in a run."""
    splits = dead_leaves(8, length=8, val_length=7)
    data = DataModule(splits, batch_size=3, workers=0, updates=5, accumulate=accumulate)
    if updates_made is not None:
        codec = SimpleNamespace(updates=torch.tensor(updates_made))
        data.trainer = cast(Any, SimpleNamespace(global_rank=rank, world_size=world, lightning_module=codec))
    return data


def signals(loader: Any) -> list[torch.Tensor]:
    return [cast(Batch, batch).signal for batch in loader]


@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("made", [0, 3, 5])
def test_a_run_goes_on_where_it_stopped(made: int, accumulate: int) -> None:
    whole = signals(module(accumulate=accumulate).train_dataloader())  # crosses epochs of the data
    rest = signals(module(made, accumulate=accumulate).train_dataloader())
    assert len(whole) == 5 * accumulate
    assert len(rest) == (5 - made) * accumulate
    assert all(torch.equal(a, b) for a, b in zip(whole[made * accumulate :], rest, strict=True))


def test_processes_train_on_different_images() -> None:
    parts = [torch.cat(signals(module(0, rank, 2).train_dataloader())) for rank in range(2)]
    images = {image.numpy().tobytes() for part in parts for image in part}
    assert len(images) == 2 * 5 * 3


@pytest.mark.parametrize("world", [1, 2, 4])
def test_processes_share_the_validation_images(world: int) -> None:
    whole = torch.cat(signals(module().val_dataloader()))
    parts = [torch.cat(signals(module(0, rank, world).val_dataloader())) for rank in range(world)]
    assert len(whole) == 7
    assert all(torch.equal(part, whole[rank::world]) for rank, part in enumerate(parts))
