"""rFID, the Fréchet distance between the features of originals and of reconstructions (arXiv 1706.08500)."""

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
"""uint8 images `(b, 3, h, w)` to features `(b, d)`."""

WIDTH = 2048  # features
FILENAMES = ("pt_inception-2015-12-05-6726825d.pth", "weights-inception-2015-12-05-6726825d.pth")  # one file, two names


class Moments:
    """Sums over features, from which their mean and covariance follow; sums of two processes add up.

    Args:
        width: Number of features.
    """

    def __init__(self, width: int) -> None:
        self.count = torch.zeros((), dtype=torch.float64)
        self.sum = torch.zeros(width, dtype=torch.float64)
        self.outer = torch.zeros(width, width, dtype=torch.float64)

    def add(self, features: Tensor) -> None:
        """Take in features `(b, width)`."""
        values = features.double().cpu()
        self.count += len(values)
        self.sum += values.sum(0)
        self.outer += values.T @ values

    def mean_and_covariance(self) -> tuple[Tensor, Tensor]:
        """Return `(width,)` and the unbiased `(width, width)`; needs two samples."""
        mean = self.sum / self.count
        return mean, (self.outer - self.count * torch.outer(mean, mean)) / (self.count - 1)


def frechet_distance(a: Moments, b: Moments) -> float:
    """Compute the squared Fréchet distance of two Gaussians; 0 for equal ones, NaN for fewer than two samples.

    The trace of the covariances' mixed root is taken through symmetric matrices, which can't turn complex as the
    usual root of the product does.
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
    """Return whether the package and the weights are on this machine."""
    return find_spec("torch_fidelity") is not None and any(find_weights(name) for name in FILENAMES)


def inception(device: torch.device) -> Features:
    """Make the usual feature extractor: the Inception network of the TensorFlow papers, 2048 features.

    Raises:
        UserError: torch-fidelity isn't installed, the weights aren't on this machine, or the file holds something else.
    """
    if find_spec("torch_fidelity") is None:
        raise UserError("rfid needs the package torch-fidelity: install varitok[fid], or leave the metric out")
    path = find_weights(FILENAMES[1]) or require_weights(FILENAMES[0], "rfid", "torch-fidelity's Inception")
    from torch_fidelity.feature_extractor_inceptionv3 import (  # noqa: PLC0415
        FeatureExtractorInceptionV3,
    )

    try:
        # The package unpickles whatever the file says; what gets through here is tensors and nothing else.
        torch.load(path, map_location="cpu", weights_only=True)
        network = FeatureExtractorInceptionV3("inception", ["2048"], feature_extractor_weights_path=str(path))
    except Exception as error:  # torch raises RuntimeError, UnpicklingError, EOFError, struct.error and more
        raise UserError(
            f"{path}: not torch-fidelity's Inception weights ({type(error).__name__}); get it anew"
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
    " Inception, 2048 features; lower is better; too high where images are few (50,000 are usual)",
    higher_is_better=False,
    network=_network,
    available=lambda _: available(),
)
