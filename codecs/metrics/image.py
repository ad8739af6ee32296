"""Image metrics: one value per image, on 8-bit pixels, as a codec would write them to a file.

Images are `(b, 3, h, w)`, uint8 or floats with 8-bit values in [0, 255]. The caller averages over images.
"""

from collections.abc import Callable
from functools import partial
from typing import Literal, cast

import torch
from torch import Tensor

from varitok import UserError
from varitok.data.batch import normalize
from varitok.data.weights import find_weights

from ..losses.lpips import BACKBONES, LPIPS
from .metric import Builder, Comparison, Metric, stateless

__all__ = ["METRICS", "PSNR", "ms_ssim", "psnr", "scales", "ssim"]

CAP = 100.0  # dB
WINDOW = 11  # taps of SSIM's Gaussian
WEIGHTS = (0.0448, 0.2856, 0.3001, 0.2363, 0.1333)  # of MS-SSIM's scales, fine first (Wang et al. 2003, section 3.2)


def psnr(fake: Tensor, real: Tensor) -> Tensor:
    """Compute the PSNR of each image, `10 log10(255^2 / MSE)`, in dB, clamped to at most 100."""
    from torchmetrics.functional.image import peak_signal_noise_ratio  # noqa: PLC0415 (slow to import)

    ratio = peak_signal_noise_ratio(fake.float(), real.float(), data_range=255.0, dim=(1, 2, 3), reduction="none")
    return ratio.clamp(max=CAP)


def ssim(fake: Tensor, real: Tensor) -> Tensor:
    """Compute the SSIM of each image, in [-1, 1] (Wang et al. 2004, doi 10.1109/TIP.2003.819861).

    Raises:
        UserError: A side has fewer than 11 pixels.
    """
    from torchmetrics.functional.image import structural_similarity_index_measure  # noqa: PLC0415 (slow to import)

    scales(*fake.shape[-2:])
    fake, real = _exact(fake), _exact(real)
    similarity = structural_similarity_index_measure(fake, real, data_range=255.0, reduction="none")
    return cast(Tensor, similarity).float()


def scales(height: int, width: int) -> int:
    """Return MS-SSIM's number of scales: 5 if both sides have at least 176 pixels, 4 from 99, 3 from 44, 2 from 22.

    The coarsest scale must fit the 11-tap window; torchmetrics requires slightly more at four scales. The paper
    defines five scales and doesn't cover smaller images.

    Raises:
        UserError: A side has fewer than 11 pixels, SSIM's window.
    """
    side = min(height, width)
    if side < WINDOW:
        raise UserError(f"SSIM on images of {width} x {height} pixels: both sides must be at least {WINDOW}")
    return max(n for n in range(1, len(WEIGHTS) + 1) if side // max(2 ** (n - 1), (n - 1) ** 2) >= WINDOW)


def ms_ssim(fake: Tensor, real: Tensor) -> Tensor:
    """Compute the MS-SSIM of each image, in [0, 1] (Wang et al. 2003, Asilomar).

    Small images have fewer scales (`scales`), whose weights are divided by their sum.

    Raises:
        UserError: A side has fewer than 11 pixels.
    """
    from torchmetrics.functional.image import (  # noqa: PLC0415 (slow to import)
        multiscale_structural_similarity_index_measure,
    )

    weights = WEIGHTS[: scales(*fake.shape[-2:])]
    similarity = multiscale_structural_similarity_index_measure(
        _exact(fake),
        _exact(real),
        data_range=255.0,
        reduction="none",
        betas=tuple(weight / sum(weights) for weight in weights),
        normalize="relu",  # a negative term to a fractional power would be NaN
    )
    return similarity.float()


def _exact(images: Tensor) -> Tensor:
    """Convert to float64 on a GPU, where TF32 convolutions would lose SSIM's differences of squares; else float32."""
    return images.double() if images.is_cuda else images.float()


def _of_images(compare: Callable[[Tensor, Tensor], Tensor]) -> Builder:
    """Return the builder of an image comparison, which ignores lengths."""
    return stateless(lambda fake, real, _: compare(fake, real))


def _build_lpips(net: Literal["alex", "vgg"], device: torch.device, _: int) -> Comparison:
    lpips = LPIPS(net).to(device)

    def compare(fake: Tensor, real: Tensor, _: Tensor) -> Tensor:
        distance: Tensor = lpips(normalize(fake.to(torch.uint8)), normalize(real.to(torch.uint8)))
        return distance

    return compare


def _lpips(net: Literal["alex", "vgg"], backbone: str) -> Metric:
    return Metric(
        f"lpips_{net}",
        f"LPIPS {net}",
        "{:.4f}",
        definition=f"mean over images; version 0.1, {backbone}, on 8-bit values, not resized; lower is better",
        higher_is_better=False,
        build=partial(_build_lpips, net),
        available=lambda _: find_weights(BACKBONES[net].filename) is not None,
    )


PSNR = Metric(
    "psnr",
    "PSNR",
    "{:.2f}",
    label="PSNR (dB)",
    definition=f"dB, mean of the images' values, each capped at {CAP:g}; RGB, 8 bit, peak 255",
    build=_of_images(psnr),
)
SSIM = Metric(
    "ssim",
    "SSIM",
    "{:.4f}",
    definition="mean over images; RGB channels averaged, 8 bit, 11-tap Gaussian window of sigma 1.5, reflected borders",
    build=_of_images(ssim),
)
MS_SSIM = Metric(
    "ms_ssim",
    "MS-SSIM",
    "{:.4f}",
    definition="mean over images; as ssim, on {scales} scales whose published weights are rescaled to sum to 1;"
    " negative terms count as 0",
    build=_of_images(ms_ssim),
)
METRICS = (PSNR, SSIM, MS_SSIM, _lpips("alex", "AlexNet"), _lpips("vgg", "VGG16"))
