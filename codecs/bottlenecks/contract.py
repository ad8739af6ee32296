"""The contract every bottleneck keeps; `tests/codecs/bottlenecks/test_contract.py` runs it over all of them."""

import math
from abc import ABC, abstractmethod

import torch
from torch import Tensor, nn

from ..distributed import sum_over_ranks
from ..result import Quantized
from .statistics import Gathering

__all__ = ["Bottleneck", "FrozenCodebooks", "straight_through"]


class _StraightThrough(torch.autograd.Function):
    @staticmethod
    def forward(latents: Tensor, quantized: Tensor) -> Tensor:
        return quantized.view_as(quantized)

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
    return _StraightThrough.apply(latents, quantized.detach())  # type: ignore[no-any-return]


class Bottleneck(nn.Module, ABC):
    """Turns latents into codes and back.

    Attributes:
        dim: Width of the latents that it takes and gives.
        codebook_sizes: Entries of each codebook; a token costs `sum(log2(size))` bits. Empty for a continuous
            bottleneck, whose codes are float32 `(b, channels, n)`.
        exact: Whether `forward` always gives the latents that `decode` makes of its codes, with all codebooks.
    """

    dim: int
    codebook_sizes: tuple[int, ...]
    exact: bool = False

    @property
    def rows(self) -> int:
        """Count the rows of a code: codebooks, or the channels of a continuous bottleneck."""
        return len(self.codebook_sizes) or self.dim

    @property
    def codebook_strides(self) -> tuple[int, ...]:
        """Tokens for which one code of each codebook stands: 1, but for codebooks of several rates."""
        return (1,) * len(self.codebook_sizes)

    @property
    def bits(self) -> float:
        """Count the bits of a token: `sum(log2(size) / stride)` over codebooks; 32 a channel if it is continuous."""
        codebooks = zip(self.codebook_sizes, self.codebook_strides, strict=True)
        return sum(math.log2(size) / stride for size, stride in codebooks) if self.codebook_sizes else 32.0 * self.dim

    def payload(self, tokens: int, num_codebooks: int | None = None) -> float:
        """Count the bits of `tokens` tokens, exactly; of their first `num_codebooks` codebooks, all if None."""
        if not self.codebook_sizes:
            return tokens * self.bits
        each = list(zip(self.codebook_sizes, self.codebook_strides, strict=True))[:num_codebooks]
        return sum(-(-tokens // stride) * math.log2(size) for size, stride in each)

    @abstractmethod
    def forward(self, latents: Tensor, lengths: Tensor, n_codebooks: Tensor) -> Quantized:
        """Quantize for training or evaluation.

        Args:
            latents: `(b, n, d)`, any floating type; codes are computed in float32.
            lengths: int64 `(b,)`, valid steps; the others enter neither penalties nor statistics.
            n_codebooks: int64 `(b,)`, codebooks kept, from 1 to all; the others add nothing to the latents, and
                enter neither penalties nor statistics.
        """

    @abstractmethod
    def encode(self, latents: Tensor) -> Tensor:
        """Turn latents `(b, n, d)` into int64 codes `(b, codebooks, n)`."""

    def encode_valid(self, latents: Tensor, lengths: Tensor) -> Tensor:
        """Encode latents with `lengths` valid steps, int64 `(b,)`.

        Only a bottleneck whose codes are of several steps each needs to know (`MultiRate`).
        """
        return self.encode(latents)

    @abstractmethod
    def decode(self, codes: Tensor) -> Tensor:
        """Turn codes `(b, codebooks', n)`, a prefix of the codebooks allowed, into latents `(b, n, d)`."""

    @abstractmethod
    def frozen(self) -> nn.Module:
        """Return the export form: `encode` and `decode` as tables and integer arithmetic, scriptable, float32."""

    def update(self) -> None:
        """Apply the statistics gathered since the last optimizer step, on all processes at once.

        Training calls it once after each step of the codec's optimizer, on every process. Whatever in a bottleneck
        learns by other means than a gradient (a moving codebook, an annealed temperature) has an `advance`; the
        statistics of all codebooks go through one collective. A loop that never calls it gathers without end.
        """
        # What is frozen stays in evaluation mode, and has gathered nothing.
        codebooks = [module for module in self.modules() if isinstance(module, Gathering) and module.training]
        for codebook, total in zip(
            codebooks, sum_over_ranks([codebook.gathered for codebook in codebooks]), strict=True
        ):
            codebook.advance(total)

    def discard(self) -> None:
        """Drop the statistics gathered since the last update, because this one was refused."""
        for module in self.modules():
            if isinstance(module, Gathering):
                module.forget()

    def depths(self, latents: Tensor) -> Tensor:
        """Return the number of all codebooks for each sample of `latents`."""
        return torch.full((latents.shape[0],), len(self.codebook_sizes), device=latents.device)


class FrozenCodebooks(nn.Module):
    """Base of the export forms of several codebooks: `decode` takes any prefix of them.

    A codebook beyond the prefix gets code 0, which every codebook has, and a mask leaves it out: an exported graph has
    no branch and no loop over the number of codebooks.

    Args:
        num_codebooks: Number of codebooks.
        device: Device of the codebooks.
    """

    positions: Tensor

    def __init__(self, num_codebooks: int, device: torch.device | None = None) -> None:
        super().__init__()
        self.register_buffer("positions", torch.arange(num_codebooks, device=device), persistent=False)

    def decode(self, codes: Tensor) -> Tensor:
        """Decode codes `(b, codebooks', n)`, a prefix of the codebooks allowed, to latents `(b, n, d)`."""
        count = codes.shape[1]
        kept = self.positions < count
        return self.decode_kept(codes[:, self.positions.clamp(max=count - 1)] * kept.unsqueeze(-1), kept)

    def decode_kept(self, codes: Tensor, kept: Tensor) -> Tensor:
        """Decode codes of all codebooks `(b, codebooks, n)`, leaving out those not in `kept`, bool `(codebooks,)`."""
        raise NotImplementedError
