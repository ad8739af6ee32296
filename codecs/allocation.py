"""Share a budget of tokens out over the blocks of clips, where each block has tokens of its own (AdapTok).

Only a live codec decodes blocks of unlike lengths in one pass. How much of a whole signal a file keeps (a number of
tokens, bytes, a bit rate or a quality) is the bundle's question: `varitok.export.bitstream.rate_control`.
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
    """Choose how many tokens each block keeps, so that the sum of squared errors is least.

    AdapTok's integer program (arXiv 2505.17011, section 3.3), solved exactly, over the numbers 1, 2, 4, ... N. There a
    scorer predicts the errors; here the decoder measures them, in log2(N) passes, with all blocks cut alike.

    Args:
        codec: In evaluation mode, with tokens of its own for each block.
        signals: `(b, c, t, h, w)` in [-1, 1].
        tokens: Mean over blocks that is not exceeded, at least 1.
        over: Share out over the blocks of each "signal", or of the whole "batch".

    Returns:
        Lengths, int64 `(b, blocks)`.

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
        errors.append(steps.reshape(len(signals), -1, step).sum(2))
    costs = torch.stack(errors, dim=2).double()  # (b, blocks, choices)
    costs[:, 1:, torch.tensor(choices) > layout.later_tokens] = torch.inf  # later blocks don't have as many
    groups = costs.flatten(0, 1)[None] if over == "batch" else costs
    budget = int(tokens * groups.shape[1])
    chosen = torch.stack([least_cost(group, choices, budget) for group in groups])
    return chosen.reshape(costs.shape[:2]).to(signals.device)


def least_cost(costs: Tensor, choices: list[int], budget: int) -> Tensor:
    """Choose a number for each row: their sum is at most `budget`, the sum of costs is least (a knapsack, exactly).

    Args:
        costs: float64 `(rows, choices)`.
        choices: Ascending, the first being 1.
        budget: At least the number of rows.

    Returns:
        int64 `(rows,)`.
    """
    best = torch.zeros(budget + 1, dtype=torch.float64)  # least cost of the rows so far, by their budget
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
