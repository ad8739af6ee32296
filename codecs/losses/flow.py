"""Optical flow loss for clips."""

from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional
from torchvision.models.optical_flow import raft_large, raft_small

from varitok import UserError
from varitok.data.weights import require_weights

from ..masking import masked_mean, prefix_mask
from ..unregistered import FrozenModules
from .contract import SignalTerm

__all__ = ["NETWORKS", "FlowConsistency", "FlowNetwork"]

STEP = 8  # pixels; RAFT needs sides that are multiples of it
SMALLEST = 128  # pixels; below it, RAFT's correlation pyramid has an empty level


class FlowNetwork(NamedTuple):
    """An optical flow network.

    Attributes:
        build: Function that builds it without weights.
        filename: File name of torchvision's weights.
    """

    build: Any
    filename: str


NETWORKS = {
    "small": FlowNetwork(raft_small, "raft_small_C_T_V2-01064c6d.pth"),
    "large": FlowNetwork(raft_large, "raft_large_C_T_SKHT_V2-ff5fadd5.pth"),
}


class FlowConsistency(SignalTerm):
    """Optical flow loss between neighboring frames, in pixels (Cosmos tokenizer, arXiv 2501.03575).

        loss = mean |flow(y) - flow(x)|, forward and backward in time

    The flow is that of a frozen RAFT (arXiv 2003.12039). Its weights must be on this machine; none are downloaded.

    Args:
        net: RAFT variant, "small" or "large".
        updates: Number of RAFT's iterations.
        scale: Factor by which frames are resized first; 0.5 in Cosmos.

    Raises:
        UserError: The weights aren't on this machine; the message names the file and its folder.
    """

    def __init__(self, net: Literal["small", "large"] = "small", updates: int = 12, scale: float = 0.5) -> None:
        super().__init__()
        if net not in NETWORKS:
            raise UserError(f"flow net={net!r} should be one of {', '.join(NETWORKS)}")
        network = NETWORKS[net]
        path = require_weights(network.filename, "the flow term", "torchvision's RAFT")
        raft = network.build(weights=None)
        try:
            raft.load_state_dict(torch.load(path, map_location="cpu", weights_only=True))
        except Exception as error:  # errors of pickle, zipfile or torch
            raise UserError(f"{path}: not torchvision's weights of RAFT; place the right file there") from error
        self.aside = FrozenModules({net: raft})
        self.net = net
        self.updates = updates
        self.scale = scale

    def forward(self, fake: Tensor, real: Tensor, lengths: Tensor) -> Tensor:
        """Compare clips `(b, 3, t, h, w)` in [-1, 1] over their first `lengths` frames; the loss of one frame is 0."""
        b, _, t = fake.shape[:3]
        if t == 1:
            return fake.new_zeros(())
        with torch.no_grad():
            wanted = self._flows(real)
        error = (self._flows(fake) - wanted).abs().mean((1, 2, 3)).view(2, b, t - 1).mean(0)  # (b, t - 1)
        return masked_mean(error, prefix_mask((lengths - 1).clamp(min=0), t - 1))

    def _flows(self, clip: Tensor) -> Tensor:
        """Compute forward, then backward flows of neighboring frames: `(2 * b * (t - 1), 2, h', w')`, in pixels."""
        raft = self.aside.networks[self.net]
        b, c, t, h, w = clip.shape
        sides = [max(SMALLEST, round(side * self.scale / STEP) * STEP) for side in (h, w)]
        frames = clip.float().transpose(1, 2).reshape(b * t, c, h, w)  # (b, c, t, h, w) -> (b * t, c, h, w)
        frames = functional.interpolate(frames, sides, mode="bilinear", antialias=True, align_corners=False)
        frames = frames.view(b, t, c, *sides)
        before, after = frames[:, :-1].flatten(0, 1), frames[:, 1:].flatten(0, 1)  # (b * (t - 1), c, h', w')
        flows: list[Tensor] = raft(torch.cat([before, after]), torch.cat([after, before]), self.updates)
        return flows[-1]
