"""Metrics by a classifier: closed forms, one pass for all of them, and the real network on photos."""

from pathlib import Path

import pytest
import torch
from torch import nn

from varitok import UserError
from varitok.codecs.evaluation.evaluate import evaluate
from varitok.codecs.metrics import classifier
from varitok.codecs.metrics.classifier import class_divergence, same_class
from varitok.codecs.modalities.image import Image
from varitok.data.datasets.images import ImageFiles
from varitok.data.teachers import classifiers
from varitok.data.teachers.classifiers import Classifier, has_efficientnet_lite

from ..evaluation.test_evaluate import Offset, _batches

NAMES = [metric.name for metric in classifier.METRICS]
PHOTOS = Path(__file__).parents[3] / "data" / "embedded" / "photos"


def test_classes_and_their_divergence_are_the_closed_forms() -> None:
    p, q = torch.tensor([[0.7, 0.2, 0.1], [0.1, 0.1, 0.8]]), torch.tensor([[0.5, 0.4, 0.1], [0.6, 0.2, 0.2]])
    assert same_class(q.log(), p.log() + 5).tolist() == [1, 0]  # a shift of logits changes nothing
    torch.testing.assert_close(class_divergence(q.log(), p.log() + 5), (p * (p / q).log()).sum(1).double())
    assert class_divergence(p.log(), p.log()).abs().max() < 1e-12


def test_one_pass_serves_all_metrics(monkeypatch: pytest.MonkeyPatch) -> None:
    """Perfect codes have no distance, worse ones more; each batch is read once on each side."""
    seen = []

    def small(side: int | None) -> Classifier:
        torch.manual_seed(0)
        head = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(3, 10))
        network = Classifier("a small one", [nn.Conv2d(3, 3, 2, 2)], head, (0.5,) * 3, (0.5,) * 3, None)
        network.register_forward_hook(lambda _, inputs, __: seen.append(len(inputs[0])))
        return network

    monkeypatch.setattr(classifier, "efficientnet_lite", small)
    reader = classifier._Reader(torch.device("cpu"))
    monkeypatch.setattr(classifier, "_reader", lambda device: reader)
    table = evaluate(Offset(), _batches(3, 2), metrics=NAMES)
    distances, same, divergences = (table.column(name) for name in NAMES)
    assert distances == sorted(distances, reverse=True) and distances[-1] == pytest.approx(0, abs=1e-6)
    assert same[-1] == 1 and divergences[-1] == pytest.approx(0, abs=1e-9) and divergences[0] > divergences[-2] > 0
    assert len(seen) == 2 * (1 + len(table.rows))


def test_without_its_package_it_is_left_out_and_told_when_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(classifiers, "find_spec", lambda name: None)
    monkeypatch.setattr(classifier, "has_efficientnet_lite", has_efficientnet_lite)
    assert not set(NAMES) & set(Image().available())
    classifier._reader.cache_clear()
    for name in NAMES:
        with pytest.raises(UserError, match=r"pip install 'varitok\[perceptual\]'"):
            evaluate(Offset(), _batches(1), metrics=[name])


@pytest.mark.skipif(not has_efficientnet_lite(), reason="needs varitok[perceptual]")
def test_blurred_photos_change_their_class(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(classifier, "has_efficientnet_lite", has_efficientnet_lite)
    assert set(NAMES) <= set(Image().available())
    photos = ImageFiles(sorted(PHOTOS.glob("*.webp"))[:4], image_size=64, train=False)
    real = torch.stack([photos[0, index] for index in range(4)])
    blurred = [
        nn.functional.avg_pool2d(real.float(), n).repeat_interleave(n, 2).repeat_interleave(n, 3) for n in (2, 16)
    ]
    same, divergence = (Image().comparison(name, "cpu") for name in NAMES[1:])
    lengths = torch.full((4,), 64)
    assert same(real, real, lengths).tolist() == [1] * 4 and divergence(real, real, lengths).abs().max() < 1e-9
    little, much = (divergence(fake, real, lengths).mean() for fake in blurred)
    assert 0 < little < much and same(blurred[1], real, lengths).mean() <= same(blurred[0], real, lengths).mean()
