"""The interface of all bottlenecks; `tests/codecs/bottlenecks/test_contract.py` checks it for each of them."""

import math
from abc import ABC, abstractmethod

import torch
from torch import Tensor, nn

from varitok import UserError

from ..distributed import sum_over_ranks
from ..result import Quantized
from .statistics import Annealed, Gathering, MovingCodebook, replace_dead

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
    """Return `quantized` bit for bit, passing its gradient to `latents` (Bengio et al., arXiv 1308.3432).

    The usual `z + (q - z).detach()` rounds: its value differs from the codebook entry in the last bits.
    """
    return _StraightThrough.apply(latents, quantized.detach())  # type: ignore[no-any-return]


class Bottleneck(nn.Module, ABC):
    """Module that encodes latents to codes and decodes codes to latents.

    Attributes:
        dim: Width of the output latents.
        codebook_sizes: Entries of each codebook; a token costs `sum(log2(size))` bits. Empty for a continuous
            bottleneck, whose codes are float32 `(b, channels, n)`.
        exact: Whether `forward` with all codebooks always returns the latents that `decode` returns for its codes.
    """

    dim: int
    codebook_sizes: tuple[int, ...]
    exact: bool = False

    @property
    def inputs(self) -> int:
        """Return the width of the input latents: `dim`, unless they are moments of a distribution."""
        return self.dim

    @property
    def rows(self) -> int:
        """Return the size of the second axis of codes: codebooks, or channels of a continuous bottleneck."""
        return len(self.codebook_sizes) or self.dim

    @property
    def codebook_strides(self) -> tuple[int, ...]:
        """Return the tokens per code of each codebook: 1, except for codebooks of several rates."""
        return (1,) * len(self.codebook_sizes)

    @property
    def codebook_layers(self) -> tuple[int, ...]:
        """Return the numbers of consecutive codebooks that share their entries: 1, except in a hierarchy.

        A layer's codes are counted together, and an evaluation cuts codes after whole layers.
        """
        return (1,) * len(self.codebook_sizes)

    @property
    def bits(self) -> float:
        """Return the bits per token: `sum(log2(size) / stride)` over codebooks, or 32 per channel if continuous."""
        codebooks = zip(self.codebook_sizes, self.codebook_strides, strict=True)
        return sum(math.log2(size) / stride for size, stride in codebooks) if self.codebook_sizes else 32.0 * self.dim

    def payload(self, tokens: int, num_codebooks: int | None = None) -> float:
        """Return the exact number of bits of `tokens` tokens in the first `num_codebooks` codebooks, all if None."""
        if not self.codebook_sizes:
            return tokens * self.bits
        each = list(zip(self.codebook_sizes, self.codebook_strides, strict=True))[:num_codebooks]
        return sum(-(-tokens // stride) * math.log2(size) for size, stride in each)

    @abstractmethod
    def forward(self, latents: Tensor, lengths: Tensor, n_codebooks: Tensor) -> Quantized:
        """Quantize for training or evaluation.

        Args:
            latents: `(b, n, d)`, any floating type; codes are computed in float32.
            lengths: int64 `(b,)`, valid tokens; padding enters neither penalties nor statistics.
            n_codebooks: int64 `(b,)`, codebooks kept, from 1 to all; dropped ones add nothing to the latents, and
                enter neither penalties nor statistics.
        """

    @abstractmethod
    def encode(self, latents: Tensor) -> Tensor:
        """Encode latents `(b, n, d)` to int64 codes `(b, codebooks, n)`."""

    def encode_valid(self, latents: Tensor, lengths: Tensor) -> Tensor:
        """Encode latents with `lengths` valid tokens, int64 `(b,)`.

        The lengths matter only if a code spans several tokens (`MultiRate`).
        """
        return self.encode(latents)

    @abstractmethod
    def decode(self, codes: Tensor) -> Tensor:
        """Decode codes `(b, codebooks', n)`, a prefix of the codebooks allowed, to latents `(b, n, d)`."""

    @abstractmethod
    def frozen(self) -> nn.Module:
        """Return the export form: `encode` and `decode` as tables and integer arithmetic, scriptable, float32."""

    def thaw(self, frozen: nn.Module) -> None:
        """Take over the weights of an export form of such a bottleneck, as far as it has all that training needs.

        Schedules (`Annealed`) start anew.

        Raises:
            UserError: The export form lacks weights that are trained.
        """
        counters = {f"{name}.passed" for name, module in self.named_modules() if isinstance(module, Annealed)}
        if self.state_dict().keys() - counters:
            raise UserError(f"a bundle lacks what {type(self).__name__} trains; give the run or its checkpoint")

    def update(self) -> None:
        """Apply the statistics gathered since the last optimizer step, summed over all ranks.

        Training calls it on every rank after each step of the codec's optimizer. Modules that learn without a gradient
        (an EMA codebook, an annealed temperature) implement `Gathering.advance`. The statistics of all codebooks go
        through one collective. A training loop that never calls it accumulates statistics without bound.
        """
        # Frozen modules stay in evaluation mode and have gathered nothing.
        codebooks = [module for module in self.modules() if isinstance(module, Gathering) and module.training]
        for codebook, total in zip(
            codebooks, sum_over_ranks([codebook.gathered for codebook in codebooks]), strict=True
        ):
            codebook.advance(total)
        replace_dead([one for one in codebooks if isinstance(one, MovingCodebook) and one.revival])

    def discard(self) -> None:
        """Drop the statistics gathered since the last update: its optimizer step was rejected."""
        for module in self.modules():
            if isinstance(module, Gathering):
                module.forget()

    def depths(self, latents: Tensor) -> Tensor:
        """Return `n_codebooks` that keeps all codebooks of each sample of `latents`, int64 `(b,)`."""
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
