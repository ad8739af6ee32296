"""The contract every bottleneck keeps; `tests/codecs/test_bottlenecks.py` runs it over all of them."""

from abc import ABC, abstractmethod

import torch
from torch import Tensor, nn

from ..result import Quantized

__all__ = ["Bottleneck", "straight_through"]


class _StraightThrough(torch.autograd.Function):
    @staticmethod
    def forward(latents: Tensor, quantized: Tensor) -> Tensor:
        return quantized.clone()

    @staticmethod
    def setup_context(ctx: torch.autograd.function.FunctionCtx, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
        pass

    @staticmethod
    def backward(ctx: torch.autograd.function.FunctionCtx, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient, None


def straight_through(latents: Tensor, quantized: Tensor) -> Tensor:
    """Return `quantized` bit for bit, with the gradient going to `latents` (Bengio et al., arXiv 1308.3432).

    The usual `z + (q - z).detach()` rounds: what it returns is not the table's entry.
    """
    return _StraightThrough.apply(latents, quantized)  # type: ignore[no-any-return]


class Bottleneck(nn.Module, ABC):
    """Turns latents into codes and back.

    Attributes:
        dim: Width of the latents that it takes and gives.
        book_sizes: Entries of each book; a token costs `sum(log2(size))` bits.
    """

    dim: int
    book_sizes: tuple[int, ...]

    @abstractmethod
    def forward(self, latents: Tensor, lengths: Tensor, depth: Tensor) -> Quantized:
        """Quantize for training or evaluation.

        Args:
            latents: `(b, n, d)`, any floating type; codes are computed in float32.
            lengths: int64 `(b,)`, valid steps; the others enter neither penalties nor statistics.
            depth: int64 `(b,)`, books kept, in [1, books].
        """

    @abstractmethod
    def encode(self, latents: Tensor) -> Tensor:
        """Turn latents `(b, n, d)` into int64 codes `(b, books, n)`."""

    @abstractmethod
    def decode(self, codes: Tensor) -> Tensor:
        """Turn codes `(b, books', n)`, a prefix of the books allowed, into latents `(b, n, d)`."""

    @abstractmethod
    def frozen(self) -> nn.Module:
        """Give the export form: `encode` and `decode` as tables and integer arithmetic, scriptable, float32."""

    def depths(self, latents: Tensor) -> Tensor:
        """Return the full depth for each sample of `latents`."""
        return torch.full((latents.shape[0],), len(self.book_sizes), device=latents.device)
