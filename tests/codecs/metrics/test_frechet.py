"""The Fréchet distance from sums."""

import math

import pytest
import torch

from varitok import UserError
from varitok.codecs.metrics import frechet
from varitok.codecs.metrics.frechet import Moments, frechet_distance


def _moments(*parts: torch.Tensor) -> Moments:
    moments = Moments(parts[0].shape[1])
    for part in parts:
        moments.add(part)
    return moments


def _samples(seed: int, count: int = 500, width: int = 4) -> torch.Tensor:
    return torch.randn(count, width, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_moments_are_those_of_all_samples_together() -> None:
    samples = _samples(0)
    mean, covariance = _moments(*samples.split(7)).mean_and_covariance()
    torch.testing.assert_close(mean, samples.mean(0))
    torch.testing.assert_close(covariance, samples.T.cov())


def test_distance_of_equal_and_of_shifted_samples() -> None:
    samples = _samples(0)
    assert frechet_distance(_moments(samples), _moments(samples)) == pytest.approx(0, abs=1e-9)
    assert frechet_distance(_moments(samples), _moments(samples + 3)) == pytest.approx(4 * 9, abs=1e-6)


def test_distance_of_scaled_samples_is_the_closed_form() -> None:
    samples = _samples(0)  # root of the product of C and 4 C is 2 C: the trace is C + 4 C - 4 C
    expected = samples.T.cov().trace() + samples.mean(0).square().sum()
    assert frechet_distance(_moments(samples), _moments(2 * samples)) == pytest.approx(expected.item())


def test_same_as_the_usual_formula_on_correlated_samples() -> None:
    a, b = _samples(0) @ _samples(1, 4), _samples(2) @ _samples(3, 4) + 1
    root = torch.linalg.eigvals(a.T.cov() @ b.T.cov()).sqrt().real.sum()
    expected = (a.mean(0) - b.mean(0)).square().sum() + a.T.cov().trace() + b.T.cov().trace() - 2 * root
    assert frechet_distance(_moments(a), _moments(b)) == pytest.approx(expected.item())


def test_one_sample_has_no_distance() -> None:
    assert math.isnan(frechet_distance(_moments(_samples(0, 1)), _moments(_samples(1))))


def test_a_missing_package_or_file_is_told(monkeypatch: pytest.MonkeyPatch, tmp_path) -> None:
    monkeypatch.setenv("VARITOK_WEIGHTS", str(tmp_path))
    monkeypatch.setattr(frechet, "find_spec", lambda name: None)
    assert not frechet.available()
    with pytest.raises(UserError, match=r"varitok\[fid\]"):
        frechet.inception(torch.device("cpu"))
    monkeypatch.setattr(frechet, "find_spec", lambda name: object())
    with pytest.raises(UserError, match=r"pt_inception-2015-12-05-6726825d\.pth"):
        frechet.inception(torch.device("cpu"))
