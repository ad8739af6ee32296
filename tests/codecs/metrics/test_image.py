"""PSNR, SSIM and MS-SSIM: closed forms, hand cases, padding of batches, small images."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional

from varitok import UserError
from varitok.codecs.metrics.image import ms_ssim, psnr, scales, ssim
from varitok.codecs.modalities.image import Image


def _noise(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(0, 256, shape, generator=torch.Generator().manual_seed(seed)).to(torch.uint8)


def test_psnr_is_the_closed_form_for_each_image() -> None:
    real = torch.full((3, 3, 8, 8), 100, dtype=torch.uint8)
    fake = real.clone()
    fake[0] += 5  # mean squared error 25
    fake[1, 0] += 3  # one of three channels: 3
    expected = [10 * math.log10(255**2 / 25), 10 * math.log10(255**2 / 3), 100.0]  # equal images: the cap
    assert psnr(fake, real).tolist() == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize("metric", [ssim, ms_ssim])
def test_similarity_of_equal_images_is_one_and_falls_with_noise(metric) -> None:
    real = _noise(2, 3, 48, 48)
    noisy = [(real.float() + torch.randn(real.shape) * sigma).round().clamp(0, 255) for sigma in (10, 80)]
    assert metric(real, real).tolist() == pytest.approx([1, 1], abs=1e-5)
    little, much = (metric(fake, real) for fake in noisy)
    assert (little < 0.999).all() and (much < little).all()


def test_ssim_of_flat_images_is_the_luminance_term() -> None:
    a, b = 50.0, 120.0
    fake, real = (torch.full((1, 3, 16, 16), value, dtype=torch.uint8) for value in (int(a), int(b)))
    c1 = (0.01 * 255) ** 2
    assert ssim(fake, real).item() == pytest.approx((2 * a * b + c1) / (a**2 + b**2 + c1), abs=1e-4)


def test_ssim_is_that_of_an_11_tap_gaussian_written_out() -> None:
    fake, real = _noise(1, 3, 32, 32, seed=1).double(), _noise(1, 3, 32, 32, seed=2).double()
    taps = torch.exp(-(torch.arange(-5, 6).double() ** 2) / (2 * 1.5**2))
    window = torch.outer(taps, taps).div(taps.sum() ** 2).expand(3, 1, 11, 11)

    def mean(values: torch.Tensor) -> torch.Tensor:
        return functional.conv2d(functional.pad(values, (5, 5, 5, 5), "reflect"), window, groups=3)

    m, n = mean(fake), mean(real)
    c1, c2 = 2.55**2, 7.65**2
    covariance, variances = mean(fake * real) - m * n, mean(fake**2) - m**2 + mean(real**2) - n**2
    expected = (2 * m * n + c1) * (2 * covariance + c2) / ((m**2 + n**2 + c1) * (variances + c2))
    assert ssim(fake.to(torch.uint8), real.to(torch.uint8)).item() == pytest.approx(expected.mean().item(), abs=1e-5)


def test_negative_similarity_counts_as_zero_instead_of_nan() -> None:
    real = _noise(1, 3, 64, 64)
    assert ms_ssim(255 - real, real).item() == 0


@settings(max_examples=25, deadline=None)
@given(st.integers(11, 200), st.integers(11, 200))
def test_ms_ssim_works_at_any_size_from_11_pixels(height: int, width: int) -> None:
    real = _noise(1, 3, height, width)
    assert ms_ssim(real, real).item() == pytest.approx(1, abs=1e-4)


@pytest.mark.parametrize(
    ("side", "count"), [(11, 1), (21, 1), (22, 2), (43, 2), (44, 3), (64, 3), (99, 4), (176, 5), (999, 5)]
)
def test_small_images_have_fewer_scales(side: int, count: int) -> None:
    assert scales(side, 1000) == scales(1000, side) == count


@pytest.mark.parametrize("metric", [ssim, ms_ssim])
def test_images_below_the_window_are_refused(metric) -> None:
    with pytest.raises(UserError, match="16 x 10 pixels: both sides must be at least 11"):
        metric(_noise(1, 3, 10, 16), _noise(1, 3, 10, 16))


@pytest.mark.parametrize("metric", [psnr, ssim, ms_ssim])
def test_a_batch_gives_what_its_images_give(metric) -> None:
    fake, real = _noise(3, 3, 32, 32, seed=1), _noise(3, 3, 32, 32, seed=2)
    alone = torch.cat([metric(fake[i : i + 1], real[i : i + 1]) for i in range(3)])
    torch.testing.assert_close(metric(fake, real), alone)


def test_an_unknown_name_is_told_with_the_known_ones() -> None:
    with pytest.raises(UserError, match=r"'pnsr' is unknown; images have psnr, ssim.*rfid"):
        Image().comparison("pnsr", "cpu")
