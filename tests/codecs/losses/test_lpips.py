"""LPIPS from files on this machine: parity with torchmetrics, gradients, what a missing or wrong file says."""

import copy
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torchmetrics.functional.image.lpips import _LPIPS

from varitok import UserError
from varitok.codecs.losses.lpips import BACKBONES, LPIPS
from varitok.data.weights import find_weights, require_weights

SHAPES = {
    "alex": {0: (64, 3, 11), 3: (192, 64, 5), 6: (384, 192, 3), 8: (256, 384, 3), 10: (256, 256, 3)},
    "vgg": {
        **{0: (64, 3, 3), 2: (64, 64, 3), 5: (128, 64, 3), 7: (128, 128, 3), 10: (256, 128, 3), 12: (256, 256, 3)},
        **{14: (256, 256, 3), 17: (512, 256, 3), **{i: (512, 512, 3) for i in (19, 21, 24, 26, 28)}},
    },
}


def _write_stand_in(folder: Path, net: str) -> dict[str, Tensor]:
    """Write random weights under the published name, laid out as torchvision's files are."""
    generator = torch.Generator().manual_seed(0)
    state = {"classifier.1.weight": torch.zeros(2)}
    for index, (out, into, side) in SHAPES[net].items():
        deviation = (2 / (into * side**2)) ** 0.5
        state[f"features.{index}.weight"] = torch.randn(out, into, side, side, generator=generator) * deviation
        state[f"features.{index}.bias"] = torch.randn(out, generator=generator) * 0.1
    torch.save(state, folder / BACKBONES[net].filename)
    return state


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("weights")
    for net in SHAPES:
        _write_stand_in(folder, net)
    return folder


@pytest.fixture(autouse=True)
def only_this_folder(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VARITOK_WEIGHTS", str(folder))


def _images(count: int = 2, side: int = 40) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    fake, real = (torch.rand(count, 3, side, side, generator=generator) * 2 - 1 for _ in range(2))
    return fake, real


@pytest.mark.parametrize("net", ["alex", pytest.param("vgg", marks=pytest.mark.slow)])
def test_same_as_torchmetrics_with_the_same_weights(net, folder: Path) -> None:
    theirs = _LPIPS(pretrained=True, net=net, pnet_rand=True)
    state = torch.load(folder / BACKBONES[net].filename, weights_only=True)
    for name, parameter in theirs.net.named_parameters():
        parameter.data.copy_(state["features." + name.partition(".")[2]])
    fake, real = _images()
    torch.testing.assert_close(LPIPS(net)(fake, real), theirs(fake, real).flatten(), rtol=1e-4, atol=1e-6)


def test_equal_images_are_at_no_distance_and_gradients_reach_the_first_only() -> None:
    lpips = LPIPS("alex")
    fake, real = (images.requires_grad_() for images in _images())
    assert lpips(real, real).abs().max() == 0
    lpips(fake, real).sum().backward()
    assert fake.grad is not None and fake.grad.abs().sum() > 0 and real.grad is None


def test_it_is_carried_along_but_never_trained_or_saved() -> None:
    module = nn.Sequential(LPIPS("alex"))
    assert not module.state_dict() and not list(module.parameters())
    fake, real = _images()
    assert module.train()[0].double()(fake.double(), real.double()).dtype == torch.float64
    torch.testing.assert_close(copy.deepcopy(module)[0].float()(fake, real), LPIPS("alex")(fake, real))


def test_images_that_are_too_small_are_refused() -> None:
    with pytest.raises(UserError, match="31 x 31 pixels: both sides must be at least 32"):
        LPIPS("alex")(*_images(side=31))


def test_a_missing_file_is_named_with_its_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VARITOK_WEIGHTS", str(tmp_path))
    assert find_weights("nothing-like-it.pth") is None
    with pytest.raises(UserError) as caught:
        require_weights("nothing-like-it.pth", "LPIPS", "somebody's")
    assert str(caught.value) == (
        "LPIPS needs the file nothing-like-it.pth (somebody's), and nothing is downloaded:"
        " place it in ~/.cache/varitok/weights, or set VARITOK_WEIGHTS to its folder"
    )


@pytest.mark.parametrize("content", ["garbage", "short", "other", "executable"])
def test_a_wrong_file_is_told_in_one_line(content: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VARITOK_WEIGHTS", str(tmp_path))
    path = tmp_path / BACKBONES["alex"].filename
    if content in ("garbage", "short"):
        path.write_bytes(b"<html>not found</html>" if content == "garbage" else b"junk")
    else:
        torch.save({"features.0.weight": torch.zeros(3)} if content == "other" else nn.Linear(1, 1), path)
    with pytest.raises(UserError, match=r"not torchvision's weights of alexnet") as caught:
        LPIPS("alex")
    assert "\n" not in str(caught.value)
