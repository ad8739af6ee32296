"""Dead leaves: the same image from the same key, none twice, and the statistics of photographs."""

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from varitok import UserError
from varitok.codecs.build import build
from varitok.data.datamodule import validation_loader
from varitok.data.synthetic.images import DeadLeaves, dead_leaves


@given(side=st.integers(8, 97), epoch=st.integers(0, 10**6), index=st.integers(0, 9), seed=st.integers(0, 2**32))
def test_a_key_always_gives_the_same_image(side: int, epoch: int, index: int, seed: int) -> None:
    image = DeadLeaves(side, length=10, seed=seed)[epoch, index]
    assert image.shape == (3, side, side)
    assert image.dtype == torch.uint8
    assert torch.equal(image, DeadLeaves(side, length=10, seed=seed)[epoch, index])


def test_training_never_repeats_and_validation_always_does() -> None:
    train, val = dead_leaves(16, length=6, val_length=6)[:2]
    images = [train[epoch, index] for epoch in range(4) for index in range(6)] + [val[0, index] for index in range(6)]
    assert len({image.numpy().tobytes() for image in images}) == len(images)
    assert torch.equal(val[0, 2], val[7, 2])
    assert not torch.equal(val[0, 2], dead_leaves(16, seed=1).val[0, 2])


def test_workers_change_nothing() -> None:
    val = dead_leaves(16, val_length=7).val
    alone, together = (list(validation_loader(val, 3, workers)) for workers in (0, 2))
    assert [len(batch.signal) for batch in alone] == [3, 3, 1]
    assert all(torch.equal(a.signal, b.signal) for a, b in zip(alone, together, strict=True))


def spectrum_slope(images: Tensor) -> float:
    """Slope of the logarithm of power over that of frequency, all directions together, at middle frequencies."""
    side = images.shape[-1]
    grey = images.double().mean(1)
    grey = grey - grey.mean((1, 2), keepdim=True)
    window = torch.hann_window(side, periodic=False, dtype=torch.float64)
    power = torch.fft.fft2(grey * window * window[:, None]).abs().square().mean(0)
    step = torch.fft.fftfreq(side) * side
    ring = torch.hypot(step[:, None], step).round().long()
    radial = torch.bincount(ring.flatten(), power.flatten()) / torch.bincount(ring.flatten())
    middle = np.arange(3, side // 4 + 1)
    return float(np.polyfit(np.log(middle), np.log(radial[middle].numpy()), 1)[0])


def test_power_falls_as_in_photographs() -> None:
    noise = torch.randint(0, 256, (32, 3, 64, 64), dtype=torch.uint8)
    assert abs(spectrum_slope(noise)) < 0.3  # the measure itself: white noise is flat
    leaves = DeadLeaves(64, length=32)
    assert -3.5 < spectrum_slope(torch.stack([leaves[0, index] for index in range(32)])) < -1.5


def test_channels_go_together_as_in_photographs() -> None:
    leaves = DeadLeaves(32, length=48)
    pixels = torch.stack([leaves[0, index] for index in range(48)]).transpose(0, 1).flatten(1).double()
    correlation = torch.corrcoef(pixels)
    assert correlation.min() > 0.6
    assert correlation[0, 2] < 0.99  # yet not grey
    assert 40 < pixels.std() < 85


@pytest.mark.parametrize("wrong", [{"image_size": 7}, {"length": 0}, {"val_length": 0}, {"seed": -1}])
def test_a_number_out_of_range_is_named(wrong: dict[str, Any]) -> None:
    with pytest.raises(UserError, match=rf"\.{next(iter(wrong))}=-?\d+: must be at least"):
        build({"_target_": "varitok.data.synthetic.images.dead_leaves"} | wrong)


def test_an_index_beyond_the_end_is_refused() -> None:
    with pytest.raises(IndexError, match="index 4 of 4"):
        DeadLeaves(8, length=4)[0, 4]
