"""The distance between a frozen network's features, as defined; what it refuses."""

from pathlib import Path

import pytest
import torch
from torch import nn

from varitok import UserError
from varitok.codecs.build import build
from varitok.codecs.losses.perceptual import FeatureDistance
from varitok.data.teachers.classifiers import Classifier
from varitok.data.teachers.vision import RandomTeacher

from ..examples import read_config


def classifier(side: int | None = None) -> Classifier:
    """Make a small classifier of two stages, ten classes and random weights."""
    blocks = [nn.Conv2d(3, 4, 3, 2, 1), nn.ReLU(), nn.Conv2d(4, 8, 3, 2, 1)]
    head = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 10))
    return Classifier("a small one", blocks, head, (0.5, 0.4, 0.3), (0.2, 0.2, 0.2), side)


def test_features_and_logits_are_compared_as_defined() -> None:
    fake, real = (torch.rand(2, 3, 16, 24, requires_grad=True) for _ in range(2))
    network, lengths = classifier(), torch.tensor([16, 16])
    assert network.layer_channels == (4, 8) and network.kept == (1, 2)
    (one, two), (logits, aim) = zip(network.layers(fake), network.layers(real), strict=True)
    away = [
        (a / a.norm(dim=1, keepdim=True).clamp(min=1e-12) - b / b.norm(dim=1, keepdim=True).clamp(min=1e-12)).square()
        for a, b in zip(one, two, strict=True)
    ]
    means = [layer.sum(1).mean() for layer in away]
    expected = 2 * (means[0] + means[1]) / 2 + 3 * (logits - aim).square().mean()
    loss = FeatureDistance(network, features=2, logits=3)(fake, real, lengths)
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(FeatureDistance(network, layers=[1])(fake, real, lengths), means[1])
    textures = [torch.einsum("bchw,bdhw->bcd", layer, layer) / layer[0, 0].numel() for layer in (one[1], two[1])]
    gram = FeatureDistance(network, 0.0, gram=4, layers=[1])(fake, real, lengths)
    torch.testing.assert_close(gram, 4 * (textures[0] - textures[1]).abs().mean())
    loss.backward()
    assert fake.grad is not None and fake.grad.any() and real.grad is None
    assert not any(parameter.grad is not None for parameter in network.parameters())


def test_it_is_carried_along_but_never_trained_or_saved() -> None:
    term = FeatureDistance(classifier())
    assert not term.state_dict() and not list(term.parameters())
    fake, real = (torch.rand(1, 3, 16, 16, dtype=torch.float64) for _ in range(2))
    assert term.train().double()(fake, real, torch.tensor([16])).isfinite()
    assert not term.aside.networks["network"].training


@pytest.mark.parametrize(
    ("network", "options", "told"),
    [
        (classifier, {"features": 0.0}, "no weight of features, logits or gram"),
        (classifier, {"layers": [0, 2]}, r"layers=\[0, 2\]: it has 2 layers"),
        (RandomTeacher, {"logits": 1.0}, "it has no logits; give logits=0"),
    ],
)
def test_what_a_network_does_not_have_is_told(network, options, told) -> None:
    with pytest.raises(UserError, match=rf"^the distance of [^\n]*'s features: {told}$"):
        FeatureDistance(network(), **options)


def test_titoks_logits_are_compared_at_224_pixels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = read_config("perceptual", "convnext_small").terms.convnext
    assert (config.weight, config.module.features, config.module.logits) == (0.1, 0.0, 1.0)
    network = classifier(config.module.network.side)
    sizes = []
    network.blocks[0].register_forward_hook(lambda _, inputs, __: sizes.append(inputs[0].shape[2:]))
    FeatureDistance(network, 0.0, 1.0)(*(torch.rand(1, 3, 20, 20) for _ in range(2)), torch.tensor([20]))
    assert sizes == [(224, 224)] * 2
    monkeypatch.setenv("VARITOK_WEIGHTS", str(tmp_path))
    with pytest.raises(UserError, match=r"convnext_small needs the file convnext_small-0c510722\.pth"):
        build(config.module)
