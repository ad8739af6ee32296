"""FVD: Fréchet distance between I3D features of clips and of their reconstructions (arXiv 1812.01717)."""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional

from varitok import UserError
from varitok.data.weights import find_weights, require_weights

from .metric import Metric, Network

__all__ = ["METRICS", "network"]

FILENAME = "i3d_torchscript.pt"
FEWEST = 10  # frames; with fewer, I3D's pooling has an empty output
I3D_WIDTH, RANDOM_WIDTH = 400, 128


def network(name: str, device: torch.device) -> Network:
    """Build the feature extractor of a metric of `METRICS`.

    Raises:
        UserError: The weights aren't on this machine, or the file is another.
    """
    if name == "fvd_random":
        return Network(_each(_Random().eval().to(device)), RANDOM_WIDTH)
    path = require_weights(FILENAME, "fvd", "I3D as TorchScript, of StyleGAN-V")
    try:
        i3d = torch.jit.load(path, map_location=device).eval()  # type: ignore[no-untyped-call]
    except Exception as error:  # torch raises RuntimeError, ValueError and more
        raise UserError(f"{path}: not I3D as TorchScript ({type(error).__name__}); download it again") from error

    def features(clip: Tensor) -> Tensor:
        if clip.shape[2] < FEWEST:
            raise UserError(f"fvd needs clips of {FEWEST} frames or more, got one of {clip.shape[2]}")
        found: Tensor = i3d(clip, rescale=True, resize=True, return_features=True)
        return found

    return Network(_each(features), I3D_WIDTH)


def _each(features: Callable[[Tensor], Tensor]) -> Callable[[Tensor, Tensor], Tensor]:
    """Apply a feature extractor to the valid frames of each clip."""

    def of_all(clips: Tensor, lengths: Tensor) -> Tensor:
        own = (clip[None, :, :length].float() for clip, length in zip(clips, lengths.tolist(), strict=True))
        with torch.no_grad():
            return torch.cat([features(clip) for clip in own])

    return of_all


class _Random(nn.Module):
    """Three 3D convolutions with fixed random weights, and global average pooling."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        shapes = [(32, 3, 3, 5, 5), (64, 32, 3, 3, 3), (RANDOM_WIDTH, 64, 3, 3, 3)]
        self.weights = nn.ParameterList(
            nn.Parameter(
                torch.randn(shape, generator=generator) * (2 / (shape[1] * shape[2] * shape[3] * shape[4])) ** 0.5,
                requires_grad=False,
            )
            for shape in shapes
        )

    def forward(self, clip: Tensor) -> Tensor:
        """Compute features `(b, 128)` of clips `(b, 3, t, h, w)` in [0, 255]."""
        x = clip / 127.5 - 1
        for weight in self.weights:
            space = weight.shape[3] // 2
            x = functional.relu(functional.conv3d(x, weight, stride=(1, 2, 2), padding=(1, space, space)))
        return x.mean((2, 3, 4))


METRICS = (
    Metric(
        "fvd",
        "FVD",
        "{:.1f}",
        definition="Fréchet distance of originals and reconstructions, both as evaluated here, 8 bit; I3D of"
        " Kinetics-400 (StyleGAN-V's TorchScript file), 400 features; lower is better; biased upwards for few clips"
        " (2,048 are usual)",
        higher_is_better=False,
        network=partial(network, "fvd"),
        available=lambda _: find_weights(FILENAME) is not None,
    ),
    Metric(
        "fvd_random",
        "random FVD",
        "{:.4g}",
        definition="Fréchet distance of 128 features of a network of fixed random weights: a stand-in without trained"
        " weights, not comparable with FVD; lower is better",
        higher_is_better=False,
        network=partial(network, "fvd_random"),
        available=lambda _: False,  # computed only on request
    ),
)
