"""rFID: Fréchet distance between Inception features of originals and of reconstructions (arXiv 1706.08500)."""

from collections.abc import Callable
from importlib.util import find_spec
from typing import TypeAlias

import torch
from torch import Tensor

from varitok import UserError
from varitok.data.weights import find_weights, require_weights

from .metric import Metric, Network

__all__ = ["RFID", "WIDTH", "Features", "Moments", "available", "frechet_distance", "inception"]

Features: TypeAlias = Callable[[Tensor], Tensor]
"""Function of uint8 images `(b, 3, h, w)` to features `(b, d)`."""

WIDTH = 2048  # features
FILENAMES = ("pt_inception-2015-12-05-6726825d.pth", "weights-inception-2015-12-05-6726825d.pth")  # one file, two names


class Moments:
    """Sums of features and of their outer products, for mean and covariance; ranks add their sums.

    Args:
        width: Number of features, d.
    """

    def __init__(self, width: int) -> None:
        self.count = torch.zeros((), dtype=torch.float64)
        self.sum = torch.zeros(width, dtype=torch.float64)
        self.outer = torch.zeros(width, width, dtype=torch.float64)

    def add(self, features: Tensor) -> None:
        """Accumulate features `(b, d)`."""
        values = features.double().cpu()
        self.count += len(values)
        self.sum += values.sum(0)
        self.outer += values.T @ values

    def mean_and_covariance(self) -> tuple[Tensor, Tensor]:
        """Return the mean `(d,)` and the unbiased covariance `(d, d)`; needs at least two samples."""
        mean = self.sum / self.count
        return mean, (self.outer - self.count * torch.outer(mean, mean)) / (self.count - 1)


def frechet_distance(a: Moments, b: Moments) -> float:
    """Compute the squared Fréchet distance of two Gaussians; NaN for fewer than two samples.

        d^2 = |mu_a - mu_b|^2 + tr(C_a + C_b - 2 (C_a C_b)^(1/2))

    The last trace is computed as tr((C_a^(1/2) C_b C_a^(1/2))^(1/2)). That matrix is symmetric, so rounding can't make
    its root complex.
    """
    if min(float(a.count), float(b.count)) < 2:
        return float("nan")
    (mean_a, cov_a), (mean_b, cov_b) = a.mean_and_covariance(), b.mean_and_covariance()
    values, vectors = torch.linalg.eigh(cov_a)
    root = vectors * values.clamp(min=0).sqrt() @ vectors.T
    mixed = torch.linalg.eigvalsh(root @ cov_b @ root).clamp(min=0).sqrt().sum()
    distance = (mean_a - mean_b).square().sum() + cov_a.trace() + cov_b.trace() - 2 * mixed
    return max(0.0, float(distance))


def available() -> bool:
    """Return whether torch-fidelity and its weights are on this machine."""
    return find_spec("torch_fidelity") is not None and any(find_weights(name) for name in FILENAMES)


def inception(device: torch.device) -> Features:
    """Build FID's feature extractor: Inception v3 with TensorFlow's 2015 weights, 2048 features.

    Raises:
        UserError: torch-fidelity isn't installed, the weights aren't on this machine, or the file is another.
    """
    if find_spec("torch_fidelity") is None:
        raise UserError("rfid needs the package torch-fidelity: install varitok[fid], or leave the metric out")
    path = find_weights(FILENAMES[1]) or require_weights(FILENAMES[0], "rfid", "torch-fidelity's Inception")
    from torch_fidelity.feature_extractor_inceptionv3 import (  # noqa: PLC0415
        FeatureExtractorInceptionV3,
    )

    try:
        # The package unpickles without restrictions; this first load raises if the file has anything but tensors.
        torch.load(path, map_location="cpu", weights_only=True)
        network = FeatureExtractorInceptionV3("inception", ["2048"], feature_extractor_weights_path=str(path))
    except Exception as error:  # torch raises RuntimeError, UnpicklingError, EOFError, struct.error and more
        raise UserError(
            f"{path}: not torch-fidelity's Inception weights ({type(error).__name__}); download it again"
        ) from error
    network.to(device)

    def features(images: Tensor) -> Tensor:
        values: Tensor = network(images)[0]
        return values

    return features


def _network(device: torch.device) -> Network:
    features = inception(device)
    return Network(lambda images, _: features(images), WIDTH)


RFID = Metric(
    "rfid",
    "rFID",
    "{:.2f}",
    definition="Fréchet distance of originals and reconstructions, both as evaluated here, 8 bit; torch-fidelity's"
    " Inception, 2048 features; lower is better; biased upwards for few images (50,000 are usual)",
    higher_is_better=False,
    network=_network,
    available=lambda _: available(),
)
