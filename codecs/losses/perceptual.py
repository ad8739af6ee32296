"""Perceptual losses of images: LPIPS, and the distance between features and logits of any frozen network."""

from collections.abc import Sequence
from typing import Annotated, Literal

import torch
from torch import Tensor
from torch.nn import functional

from varitok import UserError
from varitok.data.teachers.vision import FrameTeacher

from ..unregistered import FrozenModules
from .contract import SignalTerm
from .lpips import LPIPS

__all__ = ["FeatureDistance", "Perceptual"]


class Perceptual(SignalTerm):
    """LPIPS loss (arXiv 1801.03924), averaged over the batch; the backbone's weights must be on this machine.

    Args:
        net: Backbone, "vgg" or "alex".

    Raises:
        UserError: The weights aren't on this machine; the message names the file and its folder.
    """

    def __init__(self, net: Literal["vgg", "alex"] = "vgg") -> None:
        super().__init__()
        self.lpips = LPIPS(net)

    def forward(self, fake: Tensor, real: Tensor, lengths: Tensor) -> Tensor:
        """Compare images `(b, 3, h, w)` in [-1, 1]; they have no padding, so `lengths` is ignored."""
        return self.lpips(fake, real).mean()  # type: ignore[no-any-return]


class FeatureDistance(SignalTerm):
    """Distance between a frozen network's features of a reconstruction y and of its image x.

        loss = features * mean_l mean_h,w sum_c (F_l(y) - F_l(x))^2 + logits * mean_k (z_k(y) - z_k(x))^2
             + gram * mean_l mean_c,c' |G_l(y) - G_l(x)|

    F_l are the features of layer l, normalized over channels at each position: LPIPS without calibrated weights of the
    channels (arXiv 1801.03924, equation 1). z are the logits, or another pooled vector (TiTok, arXiv 2406.07550: those
    of ConvNeXt-S). G_l are Gram matrices, the mean over positions of the products of two channels before that norm:
    the image's texture (arXiv 1505.07376; Cosmos, arXiv 2501.03575, section 4.2).

    Args:
        network: Frozen network of images.
        features: Weight of the features' distance.
        logits: Weight of the logits' distance.
        layers: Indices of the compared layers; None for all.
        gram: Weight of the Gram matrices' distance.

    Raises:
        UserError: All weights are 0, the network has no such layer, or no logits.
    """

    def __init__(
        self,
        network: FrameTeacher,
        features: float = 1.0,
        logits: float = 0.0,
        layers: Annotated[Sequence[int] | None, "[0, inf)", "null compares all"] = None,
        gram: float = 0.0,
    ) -> None:
        super().__init__()
        self.aside = FrozenModules({"network": network})
        self.features = features
        self.logits = logits
        self.gram = gram
        count = len(network.layer_channels)
        self.layers = list(range(count)) if layers is None else list(layers)
        if not ((features or gram) and self.layers) and not logits:
            raise UserError(f"the distance of {network.name}'s features: no weight of features, logits or gram")
        if any(layer >= count for layer in self.layers):
            raise UserError(f"the distance of {network.name}'s features: layers={self.layers}: it has {count} layers")
        if logits and not network.pooled_channels:
            raise UserError(f"the distance of {network.name}'s features: it has no logits; give logits=0")

    def forward(self, fake: Tensor, real: Tensor, lengths: Tensor) -> Tensor:
        """Compare images `(b, 3, h, w)` in [-1, 1]; they have no padding, so `lengths` is ignored."""
        network = self.aside.networks["network"]
        with torch.no_grad():
            wanted, aim = network.layers(real)
        found, logits = network.layers(fake)
        loss = fake.new_zeros((), dtype=torch.float32)
        if self.features:
            distances = [_compare_directions(found[layer], wanted[layer]) for layer in self.layers]
            loss = loss + self.features * torch.stack(distances).mean()
        if self.gram:
            textures = [(_gram(found[layer]) - _gram(wanted[layer])).abs().mean() for layer in self.layers]
            loss = loss + self.gram * torch.stack(textures).mean()
        if self.logits:
            loss = loss + self.logits * functional.mse_loss(logits, aim)
        return loss


def _gram(features: Tensor) -> Tensor:
    """Return the Gram matrices `(b, c, c)` of features `(b, c, h, w)`, in float32."""
    rows = features.float().flatten(2)
    with torch.autocast(features.device.type, enabled=False):
        return rows @ rows.mT / rows.shape[2]


def _compare_directions(fake: Tensor, real: Tensor) -> Tensor:
    """Return the mean squared distance of features `(b, c, h, w)` normalized over channels."""
    return (functional.normalize(fake, dim=1) - functional.normalize(real, dim=1)).square().sum(1).mean()
