"""A perceptual loss without pretrained weights: SSIM and edges at several scales."""

from typing import Annotated

import torch
from torch import Tensor
from torch.nn import functional

from .contract import SignalTerm

__all__ = ["MultiScaleStructure"]


class MultiScaleStructure(SignalTerm):
    """Multi-scale structural loss, a substitute for LPIPS without pretrained weights.

        loss = mean_scales (1 - SSIM(y, x)) / 2 + (mean |d_h(y - x)| + mean |d_w(y - x)|) / 2

    SSIM has a box window (Wang et al. 2004, section III.B). d_h and d_w are the differences of neighboring pixels.
    Each scale has half the resolution of the one before.

    Args:
        scales: Number of scales; fewer if an image would become smaller than the window.
        window: Side of the SSIM window, in pixels.
        edges: Whether the differences of neighboring pixels are included.
    """

    def __init__(self, scales: Annotated[int, "[1, 1000]"] = 3, window: int = 7, edges: bool = True) -> None:
        super().__init__()
        self.scales = scales
        self.window = window
        self.edges = edges

    def forward(self, fake: Tensor, real: Tensor, lengths: Tensor) -> Tensor:
        """Compare images `(b, c, h, w)` in [-1, 1]; they have no padding, so `lengths` is ignored."""
        losses = []
        for _ in range(self.scales):
            loss = (1 - self._similarity(fake, real)) / 2
            losses.append(loss + self._edges(fake, real) if self.edges else loss)
            if min(fake.shape[-2:]) < 2 * self.window:
                break
            fake, real = functional.avg_pool2d(fake, 2), functional.avg_pool2d(real, 2)
        return torch.stack(losses).mean()

    def _similarity(self, fake: Tensor, real: Tensor) -> Tensor:
        # In [0, 1]: in [-1, 1], means near mid-grey could have opposite signs and a negative luminance term.
        fake, real = (fake + 1) / 2, (real + 1) / 2
        # One pooling pass for all five moments; the constants are 0.01^2 and 0.03^2.
        moments = torch.cat([fake, real, fake.square(), real.square(), fake * real], dim=1)
        a, b, aa, bb, ab = functional.avg_pool2d(moments, self.window, stride=1).chunk(5, dim=1)
        luminance = (2 * a * b + 1e-4) / (a.square() + b.square() + 1e-4)
        contrast = (2 * (ab - a * b) + 9e-4) / (aa - a.square() + bb - b.square() + 9e-4)
        return (luminance * contrast).mean()

    @staticmethod
    def _edges(fake: Tensor, real: Tensor) -> Tensor:
        error = fake - real
        return (error.diff(dim=-1).abs().mean() + error.diff(dim=-2).abs().mean()) / 2
