"""LPIPS, a perceptual distance on the features of a trained network (arXiv 1801.03924).

torchmetrics includes the calibrated channel weights, but its class downloads the backbone. Here the backbone's file
must be on this machine. `tests/codecs/losses/test_lpips.py` compares the two implementations.
"""

from importlib.resources import files
from pathlib import Path
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn

from varitok import UserError
from varitok.data.weights import load_weights, require_weights

from ..unregistered import FrozenModules

__all__ = ["BACKBONES", "LPIPS", "Backbone"]

SMALLEST = 32  # pixels; below it, AlexNet's last pooling has an empty output


class Backbone(NamedTuple):
    """A backbone of LPIPS.

    Attributes:
        model: Name of the torchvision model.
        filename: File name of torchvision's weights.
        taps: Indices of the layers whose features are compared.
    """

    model: str
    filename: str
    taps: tuple[int, ...]


BACKBONES = {
    "alex": Backbone("alexnet", "alexnet-owt-7be5be79.pth", (1, 4, 7, 9, 11)),
    "vgg": Backbone("vgg16", "vgg16-397923af.pth", (3, 8, 15, 22, 29)),
}


class LPIPS(nn.Module):
    """LPIPS version 0.1, frozen, differentiable in its first argument.

        d(y, x) = sum_l mean_h,w sum_c w_l[c] * (F_l(y) - F_l(x))^2

    F_l are the features of layer l, normalized over channels at each position; w_l are the calibrated weights.

    Args:
        net: Backbone, usually "alex" for a metric and "vgg" for a training loss.

    Raises:
        UserError: The backbone's weights aren't on this machine, or the file is another.
    """

    def __init__(self, net: Literal["alex", "vgg"] = "vgg") -> None:
        super().__init__()
        if net not in BACKBONES:
            raise UserError(f"LPIPS net={net!r} should be one of {', '.join(BACKBONES)}")
        self.net = net
        self.aside = FrozenModules({net: _Network(net)})

    def forward(self, fake: Tensor, real: Tensor) -> Tensor:
        """Return the distance `(b,)` of images `(b, 3, h, w)` in [-1, 1] with sides of at least 32 pixels.

        Raises:
            UserError: The images are too small.
        """
        if min(fake.shape[-2:]) < SMALLEST:
            size = f"{fake.shape[-1]} x {fake.shape[-2]}"
            raise UserError(f"LPIPS on images of {size} pixels: both sides must be at least {SMALLEST}")
        network = self.aside.networks[self.net]
        with torch.no_grad():
            wanted = network(real)
        distances = [
            ((mine - other).square() * head).sum(1).mean((1, 2))  # (b,)
            for mine, other, head in zip(network(fake), wanted, network.heads(), strict=True)
        ]
        return torch.stack(distances).sum(0)


class _Network(nn.Module):
    """The backbone and its channels' weights; returns features of unit norm at each position."""

    shift: Tensor
    scale: Tensor

    def __init__(self, net: str) -> None:
        super().__init__()
        backbone = BACKBONES[net]
        self.taps = backbone.taps
        path = require_weights(backbone.filename, f"LPIPS with net={net}", f"torchvision's ImageNet {backbone.model}")
        self.features = _load_features(backbone.model, path)[: backbone.taps[-1] + 1].eval().requires_grad_(False)
        # As in the published code: ImageNet's mean and standard deviation, rescaled to images in [-1, 1].
        self.register_buffer("shift", torch.tensor([-0.030, -0.088, -0.188])[:, None, None])
        self.register_buffer("scale", torch.tensor([0.458, 0.448, 0.450])[:, None, None])
        heads = Path(str(files("torchmetrics.functional.image"))) / "lpips_models" / f"{net}.pth"
        state = torch.load(heads, map_location="cpu", weights_only=True)
        for index in range(len(self.taps)):
            self.register_buffer(f"head{index}", state[f"lin{index}.model.1.weight"][0])

    def heads(self) -> list[Tensor]:
        """Return the channel weights `(c, 1, 1)` of each tapped layer."""
        return [self.get_buffer(f"head{index}") for index in range(len(self.taps))]

    def forward(self, images: Tensor) -> list[Tensor]:
        """Return each tapped layer's features `(b, c, h', w')`."""
        values = (images - self.shift) / self.scale
        tapped = []
        for index, layer in enumerate(self.features):
            values = layer(values)
            if index in self.taps:
                tapped.append(values / torch.sqrt(1e-8 + values.square().sum(1, keepdim=True)))
        return tapped


def _load_features(model: str, path: Path) -> nn.Sequential:
    """Build the convolutional part of a torchvision model and load its published weights."""
    from torchvision import models  # noqa: PLC0415 (slow to import, and needed only here)

    with torch.device("meta"):  # neither initializes weights nor allocates the classifier
        features: nn.Sequential = getattr(models, model)(weights=None).features
    load_weights(features, path, f"torchvision's weights of {model}", prefix="features.")
    return features
