"""Run-length tokens: tubelets in which nothing changes are left out, and the one before stands for them.

RLT (arXiv 2411.05222, section 3): a transformer reads the remaining tokens with their run lengths. Here its latents
are then repeated as often, so that codes stay a grid; `codecs/evaluation/ladder.py` counts a run once.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional

from varitok import UserError

__all__ = ["RunLength", "changed_tokens"]

LONGEST = 16  # longer runs are embedded as this long


def changed_tokens(signal: Tensor, patch: tuple[int, int, int], threshold: float) -> Tensor:
    """Mark the tubelets in which something changes; of the first step all.

    A change is the mean absolute difference between the first frame of the tubelet before, in the same place, and the
    last frame of this one (section 3.1).

    Args:
        signal: Clips `(b, c, t, h, w)` of whole tubelets, in [-1, 1].
        patch: Frames, rows and columns of a tubelet.
        threshold: What is below it is no change.

    Returns:
        bool `(b, n)`, frame by frame and row by row.
    """
    first, high, wide = patch
    begins, ends = signal[:, :, ::first], signal[:, :, first - 1 :: first]
    before = torch.cat([begins[:, :, :1], begins[:, :, :-1]], dim=2)
    change = functional.avg_pool2d((ends - before).abs().mean(1), [high, wide])
    start = torch.arange(change.shape[1], device=signal.device)[:, None, None] == 0
    return ((change >= threshold) | start).flatten(1)


class RunLength(nn.Module):
    """Takes the tokens in which something changes to a transformer, and what it made of them back to all positions.

    Args:
        width: Width of the tokens.
        threshold: See `changed_tokens`.

    Attributes:
        packs: Whether dropped tokens save time: the others are moved together. Otherwise they stay, masked, with the
            same result: graphs with data-dependent sizes can't be exported.

    Raises:
        UserError: The threshold isn't above 0.
    """

    def __init__(self, width: int, threshold: float) -> None:
        super().__init__()
        if not threshold > 0:
            raise UserError(f"codec.encoder.run_length={threshold}: must be above 0")
        self.threshold = threshold
        self.packs = True
        self.obstacle = "run lengths depend on the frames before"
        self.lengths = nn.Parameter(torch.randn(LONGEST, width) * 0.02)

    def forward(
        self, x: Tensor, moving: Tensor, valid: Tensor | None, frame: int
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Leave tokens out.

        Args:
            x: `(b, n, width)`.
            moving: bool `(b, n)`, which are kept; of the first step all.
            valid: bool `(b, n)`, which are of a clip; all if None.
            frame: Tokens of a step.

        Returns:
            The tokens that are kept, told how long they stand, `(b, m, width)`; which of all they are, `(b, m)`; which
            of them are there, bool `(b, m)`; and for each of all positions which of them stands there, `(b, n)`.
        """
        b, n = moving.shape
        kept = moving if valid is None else moving & valid
        positions = torch.arange(n, device=x.device)
        steps = (positions // frame).reshape(-1, frame)
        # The last step of each place, up to this one, in which something changed: a running maximum, for which ONNX's
        # exporter has nothing, by numbering the changes.
        change = kept.reshape(b, -1, frame).to(torch.int64)
        number = change.cumsum(1) - 1
        since = torch.zeros_like(change).scatter_add(1, number, change * steps).gather(1, number)
        source = since.flatten(1) * frame + positions - steps.flatten() * frame
        runs = torch.zeros_like(source).scatter_add(
            1, source, torch.ones_like(source) if valid is None else valid.to(source.dtype)
        )
        told = x + self.lengths[(runs - 1).clamp(0, self.lengths.shape[0] - 1)]
        if not self.packs:
            return told, positions.expand(b, -1), kept, source
        order = kept.to(torch.int64).argsort(dim=1, descending=True, stable=True)
        most = int(kept.sum(1).max())
        order = order[:, :most]
        there = kept.gather(1, order)
        rank = (kept.to(torch.int64).cumsum(1) - 1).gather(1, source)
        return told.gather(1, order.unsqueeze(2).expand(-1, -1, x.shape[2])), order, there, rank
