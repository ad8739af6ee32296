"""Perceptual distance by a trained network."""

from typing import Literal

from torch import Tensor, nn

from .lpips import LPIPS

__all__ = ["Perceptual"]


class Perceptual(nn.Module):
    """LPIPS as a training term (arXiv 1801.03924); its backbone's weights are looked for on this machine only.

    Args:
        net: Backbone, "vgg" or "alex".

    Raises:
        UserError: The weights aren't there; the message says which file to place where.
    """

    def __init__(self, net: Literal["vgg", "alex"] = "vgg") -> None:
        super().__init__()
        self.lpips = LPIPS(net)

    def forward(self, fake: Tensor, real: Tensor, lengths: Tensor) -> Tensor:
        """Compare images `(b, 3, h, w)` in [-1, 1]; all rows are valid, so `lengths` is not needed."""
        return self.lpips(fake, real).mean()  # type: ignore[no-any-return]
