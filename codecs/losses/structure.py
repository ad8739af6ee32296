"""A perceptual term without weights: structural similarity and edges at several scales."""

import torch
from torch import Tensor
from torch.nn import functional

from .contract import SignalTerm

__all__ = ["MultiScaleStructure"]


class MultiScaleStructure(SignalTerm):
    """Stands in for LPIPS where no weights can be had.

    At each scale, each half the one before: `(1 - SSIM) / 2` with a box window (Wang et al. 2004, section III.B) plus
    the mean absolute difference of neighboring pixels' differences; then the mean over scales.

    Args:
        scales: Number of scales; an image stops being halved where it would be smaller than the window.
        window: Side of the SSIM window, in pixels.
        edges: False leaves the differences of neighboring pixels out.
    """

    def __init__(self, scales: int = 3, window: int = 7, edges: bool = True) -> None:
        super().__init__()
        self.scales = scales
        self.window = window
        self.edges = edges

    def forward(self, fake: Tensor, real: Tensor, lengths: Tensor) -> Tensor:
        """Compare images `(b, c, h, w)` in [-1, 1]; all rows are valid, so `lengths` is not needed."""
        losses = []
        for _ in range(self.scales):
            loss = (1 - self._similarity(fake, real)) / 2
            losses.append(loss + self._edges(fake, real) if self.edges else loss)
            if min(fake.shape[-2:]) < 2 * self.window:
                break
            fake, real = functional.avg_pool2d(fake, 2), functional.avg_pool2d(real, 2)
        return torch.stack(losses).mean()

    def _similarity(self, fake: Tensor, real: Tensor) -> Tensor:
        # On [0, 1]: about a mean of 0 the luminance of mid-grey would flip its sign.
        fake, real = (fake + 1) / 2, (real + 1) / 2
        # The five windowed means in one pass; the constants are 0.01^2 and 0.03^2.
        moments = torch.cat([fake, real, fake.square(), real.square(), fake * real], dim=1)
        a, b, aa, bb, ab = functional.avg_pool2d(moments, self.window, stride=1).chunk(5, dim=1)
        luminance = (2 * a * b + 1e-4) / (a.square() + b.square() + 1e-4)
        contrast = (2 * (ab - a * b) + 9e-4) / (aa - a.square() + bb - b.square() + 9e-4)
        return (luminance * contrast).mean()

    @staticmethod
    def _edges(fake: Tensor, real: Tensor) -> Tensor:
        error = fake - real
        return (error.diff(dim=-1).abs().mean() + error.diff(dim=-2).abs().mean()) / 2
