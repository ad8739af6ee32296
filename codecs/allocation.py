"""Allocation of a token budget over the blocks of clips (AdapTok).

It needs a codec in torch, which decodes blocks of different lengths in one pass. For bundles,
`varitok.export.bitstream.rate_control` chooses one length per signal from a number of tokens or bytes, a bit rate or a
quality.
"""

from typing import Literal

import torch
from torch import Tensor

from varitok import UserError

from .codec import Codec
from .layout import BlockLayout
from .lengths.distributions import ladder

__all__ = ["allocate", "least_cost"]


@torch.no_grad()
def allocate(codec: Codec, signals: Tensor, tokens: float, over: Literal["signal", "batch"] = "signal") -> Tensor:
    """Choose how many tokens each block keeps, minimizing the sum of squared errors under a budget.

    It solves AdapTok's integer program (arXiv 2505.17011, section 3.3) exactly, over the lengths 1, 2, 4, ... N.
    AdapTok predicts errors by a scorer; here log2(N) decoder passes measure them, each with one length for all blocks.

    Args:
        codec: Codec of block-wise tokens, in evaluation mode.
        signals: `(b, c, t, h, w)` in [-1, 1].
        tokens: Budget: largest mean number of tokens per block, at least 1.
        over: Apply the budget to the blocks of each "signal", or of the whole "batch".

    Returns:
        Tokens kept, int64 `(b, blocks)`.

    Raises:
        UserError: The codec has no blocks, or `tokens` is below 1.
    """
    layout = codec.layout
    if not isinstance(layout, BlockLayout):
        raise UserError("an allocation over blocks: this codec has none; its tokens are about the whole signal")
    if not tokens >= 1:
        raise UserError(f"an allocation of {tokens:g} tokens: each block has one at least")
    choices, size = sorted({*ladder(layout.tokens), *ladder(layout.later_tokens)}), signals.shape[2:]
    codes, pad, step = codec.encode(signals), layout.causal_pad, layout.downsample[0]
    errors = []
    for kept in choices:
        error = (codec.decode(codes[..., :kept], size) - signals).square().mean((1, 3, 4)).cpu()
        steps = torch.nn.functional.pad(error, (pad, codes.shape[2] * step - pad - size[0]))
        errors.append(steps.reshape(len(signals), -1, step).sum(2))  # (b, t) -> (b, blocks)
    costs = torch.stack(errors, dim=2).double()  # (b, blocks, choices)
    costs[:, 1:, torch.tensor(choices) > layout.later_tokens] = torch.inf  # later blocks have fewer tokens
    groups = costs.flatten(0, 1)[None] if over == "batch" else costs  # (groups, blocks of a group, choices)
    budget = int(tokens * groups.shape[1])
    chosen = torch.stack([least_cost(group, choices, budget) for group in groups])
    return chosen.reshape(costs.shape[:2]).to(signals.device)


def least_cost(costs: Tensor, choices: list[int], budget: int) -> Tensor:
    """Minimize `sum_i costs[i, k_i]` subject to `sum_i choices[k_i] <= budget`: an exact knapsack.

    Args:
        costs: float64 `(rows, choices)`.
        choices: Lengths in ascending order, the first being 1.
        budget: At least the number of rows.

    Returns:
        The choices of the rows, int64 `(rows,)`.
    """
    best = torch.zeros(budget + 1, dtype=torch.float64)  # minimal cost of the rows so far, for each budget
    picks = []
    for row in costs:
        tries = torch.full((len(choices), budget + 1), torch.inf, dtype=torch.float64)
        for index, number in enumerate(choices):
            if number <= budget:
                tries[index, number:] = best[: budget + 1 - number] + row[index]
        best, pick = tries.min(0)
        picks.append(pick)
    chosen, left = [], budget
    for pick in reversed(picks):
        chosen.append(choices[int(pick[left])])
        left -= chosen[-1]
    return torch.tensor(chosen[::-1])
