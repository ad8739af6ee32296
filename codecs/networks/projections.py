"""Maps between the networks' latents and those of the bottleneck: linear, by attention, or a branch for each part.

latents (b, n, width) --> project_in --> (b, n, d) --> bottleneck --> (b, n, d) --> project_out --> (b, n, width)
"""

from abc import ABC, abstractmethod
from typing import Annotated

import torch
from torch import Tensor, nn
from torch.nn import functional

from varitok import UserError

from ..masking import prefix_mask
from .layers.attention import attend
from .layers.sequence import SequenceTransformer

__all__ = ["AttentionProjection", "BranchedProjection", "DirectProjection", "LinearProjection", "Projection"]


class Projection(nn.Module, ABC):
    """Map from tokens of one width to tokens of another."""

    @abstractmethod
    def forward(self, x: Tensor, lengths: Tensor | None, grid: list[int]) -> Tensor:
        """Map tokens `(b, n, inputs)` to `(b, n, outputs)`.

        Args:
            x: The tokens.
            lengths: int64 `(b,)`, number of valid tokens; others are undefined in the output. None if all are valid.
            grid: Steps of each axis of the tokens' grid; any list if they are ordered.
        """


class DirectProjection(Projection):
    """The identity, for networks whose latents the bottleneck quantizes directly."""

    def forward(self, x: Tensor, lengths: Tensor | None, grid: list[int]) -> Tensor:
        """Return the tokens; see `Projection.forward`."""
        return x


class LinearProjection(nn.Linear, Projection):
    """A linear map of each token.

    Args:
        inputs: Width of the input.
        outputs: Width of the output.
    """

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__(inputs, outputs)

    def keep_scale(self) -> "LinearProjection":
        """Start without a bias, and with weights that keep unit variance; return itself.

        A bias would make the latents of quiet signals equal. torch's default weights shrink latents, so that all get
        one code.
        """
        nn.init.zeros_(self.bias)
        nn.init.kaiming_normal_(self.weight, nonlinearity="linear")
        return self

    def forward(self, x: Tensor, lengths: Tensor | None, grid: list[int]) -> Tensor:  # type: ignore[override]
        """Map each token; see `Projection.forward`."""
        return functional.linear(x, self.weight, self.bias)


class AttentionProjection(Projection):
    """Attention from one width to another, beside a linear map (UniTok, arXiv 2502.20321).

    `y = A x' + B attention(x')`, with `x' = norm(x)`, then `y + mlp(norm(y))`. Attention has the larger of both widths.
    Tokens have no positions but those that the network before knows.

    Args:
        inputs: Width of the input.
        outputs: Width of the output.
        heads: Attention heads; divides the larger width.

    Raises:
        UserError: `heads` doesn't divide the larger width.
    """

    def __init__(self, inputs: int, outputs: int, heads: int) -> None:
        super().__init__()
        width = max(inputs, outputs)
        if width % heads:
            raise UserError(f"codec: the projection's heads={heads} should divide {width}, the larger of both widths")
        self.heads = heads
        self.out_features = outputs
        self.norm = nn.LayerNorm(inputs)
        self.straight = LinearProjection(inputs, outputs).keep_scale()
        self.qkv = nn.Linear(inputs, 3 * width)
        self.out = nn.Linear(width, outputs)
        self.mlp_norm = nn.LayerNorm(outputs)
        self.wide = nn.Linear(outputs, 2 * outputs)
        self.narrow = nn.Linear(2 * outputs, outputs)

    def forward(self, x: Tensor, lengths: Tensor | None, grid: list[int]) -> Tensor:
        """Map tokens that attend to each other; see `Projection.forward`."""
        x = self.norm(x)
        allowed: Tensor | None = None
        if lengths is not None:
            allowed = prefix_mask(lengths, x.shape[1])[:, None, None, :]
        y = self.straight(x, lengths, grid) + self.out(attend(self.qkv(x), self.heads, allowed))
        mapped: Tensor = y + self.narrow(functional.gelu(self.wide(self.mlp_norm(y))))
        return mapped


class BranchedProjection(Projection):
    """A branch for each part of a product: a transformer over the image, a norm and a linear map.

    FQGAN (arXiv 2411.16681, section 3.1) calls the branches feature adapters. A term that reads one part reaches one
    branch alone. Positions are rotary, where the authors learn one vector for each place of the grid.

    Args:
        inputs: Width of the input and of the transformers.
        outputs: Width of all parts together.
        parts: Number of parts, all of one width.
        depth: Blocks of each transformer; 0 for norm and linear map alone.
        heads: Attention heads per block; twice their number divides the width.

    Raises:
        UserError: The widths don't fit `parts` or `heads`.
    """

    def __init__(
        self,
        inputs: int,
        outputs: int,
        parts: Annotated[int, "[1, 1000]"],
        depth: Annotated[int, "[0, 1000]"],
        heads: int,
    ) -> None:
        super().__init__()
        if outputs % parts:
            raise UserError(f"codec: the projection's parts={parts} should divide {outputs}, the bottleneck's width")
        self.out_features = outputs
        self.transformers = nn.ModuleList(
            SequenceTransformer(inputs, depth, heads, layer_scale=1.0, qk_norm=True, axes=2) for _ in range(parts)
        )
        self.norms = nn.ModuleList(nn.LayerNorm(inputs) for _ in range(parts))
        self.maps = nn.ModuleList(LinearProjection(inputs, outputs // parts).keep_scale() for _ in range(parts))

    def forward(self, x: Tensor, lengths: Tensor | None, grid: list[int]) -> Tensor:
        """Run all branches and concatenate their channels; see `Projection.forward`."""
        rows, columns = grid
        mask: Tensor | None = None
        if lengths is not None:
            mask = prefix_mask(lengths, x.shape[1])
        found: list[Tensor] = []
        for transformer, norm, last in zip(self.transformers, self.norms, self.maps):  # noqa: B905 (TorchScript's zip is never strict)
            found.append(last(norm(transformer(x, mask, None, rows, columns)), lengths, grid))
        return torch.cat(found, -1)
