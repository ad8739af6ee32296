"""LPIPS as a loss term."""

from typing import Literal

from torch import Tensor

from .contract import SignalTerm
from .lpips import LPIPS

__all__ = ["Perceptual"]


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
