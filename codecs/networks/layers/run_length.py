"""Run-length tokenization (RLT, arXiv 2411.05222, section 3): a run of static tubelets is one token.

The transformer's input is the first token of each run, plus an embedding of the run's length. Here its latents are then
repeated over the run, so that codes form a full grid; `codecs/evaluation/ladder.py` counts a run once.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional

__all__ = ["RunLength", "changed_tokens"]

LONGEST = 16  # maximum run length of the embedding; longer runs share its last entry


def changed_tokens(signal: Tensor, patch: tuple[int, int, int], threshold: float) -> Tensor:
    """Return a mask of the tubelets that change; those of the first step always count as changed.

    The change is the mean absolute difference between the last frame of a tubelet and the first frame of the previous
    tubelet at the same position (section 3.1).

    Args:
        signal: Clips `(b, c, t, h, w)` in [-1, 1]; sizes are multiples of `patch`.
        patch: Frames, rows and columns of a tubelet.
        threshold: Minimum change.

    Returns:
        bool `(b, n)`, in the order of step, row, column.
    """
    first, high, wide = patch
    begins, ends = signal[:, :, ::first], signal[:, :, first - 1 :: first]
    before = torch.cat([begins[:, :, :1], begins[:, :, :-1]], dim=2)
    change = functional.avg_pool2d((ends - before).abs().mean(1), [high, wide])
    start = torch.arange(change.shape[1], device=signal.device)[:, None, None] == 0
    return ((change >= threshold) | start).flatten(1)  # (b, t, rows, columns) -> (b, n)


class RunLength(nn.Module):
    """Drops unchanged tokens, and adds run-length embeddings to the others.

    Args:
        width: Width of the tokens.
        threshold: See `changed_tokens`.

    Attributes:
        packs: Whether kept tokens are packed into a shorter sequence, which saves time. Otherwise dropped tokens stay,
            masked, with the same result: graphs with data-dependent sizes can't be exported.
    """

    def __init__(self, width: int, threshold: float) -> None:
        super().__init__()
        self.threshold = threshold
        self.packs = True
        self.obstacle = "run lengths depend on the frames before"
        self.lengths = nn.Parameter(torch.randn(LONGEST, width) * 0.02)

    def forward(
        self, x: Tensor, moving: Tensor, valid: Tensor | None, frame: int
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Drop unchanged tokens.

        Args:
            x: Tokens `(b, n, width)`.
            moving: bool `(b, n)`, True for changed tokens, and for all of the first step.
            valid: bool `(b, n)`, False for padding; None if all are valid.
            frame: Tokens per step.

        Returns:
            Tokens plus run-length embeddings, `(b, m, width)`; their indices in x, `(b, m)`; a mask, True for kept
            tokens, `(b, m)`; and for each position of x the index among the m of the token that replaces it, `(b, n)`.
        """
        b, n = moving.shape
        kept = moving if valid is None else moving & valid
        positions = torch.arange(n, device=x.device)
        steps = (positions // frame).reshape(-1, frame)
        # The latest changed step up to each step, per position: a running maximum. ONNX export has no such operator, so
        # changes are numbered by a cumulative sum, and their steps looked up by number.
        change = kept.reshape(b, -1, frame).to(torch.int64)  # (b, n) -> (b, t, frame)
        number = change.cumsum(1) - 1
        since = torch.zeros_like(change).scatter_add(1, number, change * steps).gather(1, number)
        source = since.flatten(1) * frame + positions - steps.flatten() * frame
        runs = torch.zeros_like(source).scatter_add(
            1, source, torch.ones_like(source) if valid is None else valid.to(source.dtype)
        )
        embedded = x + self.lengths[(runs - 1).clamp(0, self.lengths.shape[0] - 1)]
        if not self.packs:
            return embedded, positions.expand(b, -1), kept, source
        order = kept.to(torch.int64).argsort(dim=1, descending=True, stable=True)
        most = int(kept.sum(1).max())
        order = order[:, :most]
        there = kept.gather(1, order)
        rank = (kept.to(torch.int64).cumsum(1) - 1).gather(1, source)
        return embedded.gather(1, order.unsqueeze(2).expand(-1, -1, x.shape[2])), order, there, rank
