"""How far an image is from its original: one value for each image, on 8-bit values.

Images are `(b, 3, h, w)`, uint8 or floats that hold 8-bit values in [0, 255]: a codec is judged by the pixels that it
would write to a file. Means over images are left to the caller.
"""

from collections.abc import Callable
from typing import Literal, TypeAlias, cast

import torch
from torch import Tensor
from torchmetrics.functional.image import (
    multiscale_structural_similarity_index_measure,
    peak_signal_noise_ratio,
    structural_similarity_index_measure,
)

from varitok import UserError
from varitok.data.batch import normalise
from varitok.data.weights import find_weights

from ..losses.lpips import BACKBONES, LPIPS

__all__ = ["BASIC", "DEFINITIONS", "Comparison", "available", "comparison", "ms_ssim", "psnr", "scales", "ssim"]

Comparison: TypeAlias = Callable[[Tensor, Tensor], Tensor]
"""(decoded, original) to one value for each image."""

BASIC = ("psnr", "ssim", "ms_ssim")
CAP = 100.0  # dB
WINDOW = 11  # taps of SSIM's Gaussian
WEIGHTS = (0.0448, 0.2856, 0.3001, 0.2363, 0.1333)  # of MS-SSIM's scales, fine to coarse: Wang et al. 2003, section 3.2

DEFINITIONS = {
    "psnr": f"dB, mean of the images' values, each capped at {CAP:g}; RGB, 8 bit, peak 255",
    "ssim": "mean over images; RGB channels averaged, 8 bit, 11-tap Gaussian window of sigma 1.5, reflected borders",
    "ms_ssim": "mean over images; as ssim, on {scales} scales whose published weights are made to sum to 1, negative"
    " terms count as 0",
    "lpips_alex": "mean over images; version 0.1, AlexNet, on 8-bit values, not resized; lower is better",
    "lpips_vgg": "mean over images; version 0.1, VGG16, on 8-bit values, not resized; lower is better",
}
"""What each name means, in the words that go above a table; `{scales}` depends on the images' size."""


def psnr(fake: Tensor, real: Tensor) -> Tensor:
    """Compute the peak signal-to-noise ratio of each image, dB in [0, 100]; equal images have 100."""
    ratio = peak_signal_noise_ratio(fake.float(), real.float(), data_range=255.0, dim=(1, 2, 3), reduction="none")
    return ratio.clamp(max=CAP)


def ssim(fake: Tensor, real: Tensor) -> Tensor:
    """Compute the structural similarity of each image, in [-1, 1] (Wang et al. 2004, doi 10.1109/TIP.2003.819861).

    Raises:
        UserError: A side has fewer than 11 pixels.
    """
    scales(*fake.shape[-2:])
    fake, real = _exact(fake), _exact(real)
    similarity = structural_similarity_index_measure(fake, real, data_range=255.0, reduction="none")
    return cast(Tensor, similarity).float()


def scales(height: int, width: int) -> int:
    """Count the scales on which MS-SSIM is computed: 5 from 176 pixels a side on, 4 from 99, 3 from 44, 2 from 22.

    The coarsest scale must hold the 11-tap window, and torchmetrics asks for a little more at four scales. The
    published definition, five scales, says nothing about smaller images.

    Raises:
        UserError: A side has fewer than 11 pixels, less than SSIM's window.
    """
    side = min(height, width)
    if side < WINDOW:
        raise UserError(f"SSIM on images of {width} x {height} pixels: both sides must be at least {WINDOW}")
    return max(n for n in range(1, len(WEIGHTS) + 1) if side // max(2 ** (n - 1), (n - 1) ** 2) >= WINDOW)


def ms_ssim(fake: Tensor, real: Tensor) -> Tensor:
    """Compute the multi-scale structural similarity of each image, in [0, 1] (Wang et al. 2003, Asilomar).

    Small images have fewer scales (`scales`); the weights of those are divided by their sum.

    Raises:
        UserError: A side has fewer than 11 pixels.
    """
    weights = WEIGHTS[: scales(*fake.shape[-2:])]
    similarity = multiscale_structural_similarity_index_measure(
        _exact(fake),
        _exact(real),
        data_range=255.0,
        reduction="none",
        betas=tuple(weight / sum(weights) for weight in weights),
        normalize="relu",  # a negative term to a broken power would make the image's value NaN
    )
    return similarity.float()


def _exact(images: Tensor) -> Tensor:
    """Give floats on which SSIM's differences of squares survive a GPU whose float32 convolutions may be TF32."""
    return images.double() if images.is_cuda else images.float()


def available() -> tuple[str, ...]:
    """List the names that can be computed on this machine: the basic ones, and LPIPS where its weights are found."""
    return BASIC + tuple(f"lpips_{net}" for net, backbone in BACKBONES.items() if find_weights(backbone.filename))


def comparison(name: str, device: torch.device) -> Comparison:
    """Make the comparison of that name, a key of `DEFINITIONS`.

    Raises:
        UserError: The name is unknown, or its weights aren't on this machine.
    """
    basic: dict[str, Comparison] = {"psnr": psnr, "ssim": ssim, "ms_ssim": ms_ssim}
    if name in basic:
        return basic[name]
    if name not in DEFINITIONS:
        raise UserError(f"metric {name!r} is unknown; there are {', '.join(DEFINITIONS)} and rfid")
    lpips = LPIPS(cast(Literal["alex", "vgg"], name.removeprefix("lpips_"))).to(device)

    def compare(fake: Tensor, real: Tensor) -> Tensor:
        distance: Tensor = lpips(normalise(fake.to(torch.uint8)), normalise(real.to(torch.uint8)))
        return distance

    return compare
