"""Finite scalar quantization (FSQ): each dimension is rounded to a few levels."""

import math
from collections.abc import Sequence
from typing import Annotated

import torch
from torch import Tensor, nn

from varitok import UserError

from ..result import Quantized
from .contract import Bottleneck, FrozenCodebooks, straight_through
from .entropy import entropy_groups, grid_entropies
from .grid import Grid, GridQuantizer

__all__ = [
    "DitheredScalarQuantizer",
    "EvenGrid",
    "FiniteScalarQuantizer",
    "ResidualScalarQuantizer",
    "RoundingGrid",
]


class RoundingGrid(Grid):
    """FSQ's grid: integer levels around 0, divided by `levels // 2`; an even count has one more negative level.

    Args:
        levels: Levels of each dimension, at least 2.
    """

    zero: Tensor
    reach: Tensor
    offset: Tensor
    shift: Tensor

    def __init__(self, levels: Sequence[int]) -> None:
        super().__init__(levels)
        half = (self.levels - 1) * (1 + 1e-3) / 2
        offset = torch.where(self.levels % 2 == 0, 0.5, 0.0)
        for name, value in {
            "zero": self.levels // 2,  # the digit of the value 0
            "reach": half,
            "offset": offset,
            "shift": torch.atanh(offset / half),
        }.items():
            self.register_buffer(name, value, persistent=False)

    def bound(self, latents: Tensor) -> Tensor:
        """Bound latents `(b, n, d)` to the range of the levels: `tanh(z + shift) * reach - offset`."""
        return torch.tanh(latents + self.shift) * self.reach - self.offset

    def encode(self, latents: Tensor) -> Tensor:
        """Quantize latents `(b, n, d)` to int64 codes `(b, 1, n)`."""
        return self.code(torch.round(self.bound(latents)).to(torch.int64) + self.zero)

    def decode(self, codes: Tensor) -> Tensor:
        """Decode codes `(b, 1, n)` to latents `(b, n, d)` in [-1, 1]."""
        return (self.digits(codes) - self.zero).to(torch.float32) / self.zero


class FiniteScalarQuantizer(GridQuantizer):
    """Finite scalar quantization: rounding of each dimension, without a learned codebook (arXiv 2309.15505, section 3).

    >>> bottleneck = FiniteScalarQuantizer([8, 5, 5, 5])
    >>> codes = bottleneck.encode(torch.randn(2, 10, 4))  # (b, n, d) -> (b, q, n)
    >>> codes.shape, bottleneck.codebook_sizes
    (torch.Size([2, 1, 10]), (1000,))
    >>> bottleneck.decode(codes).shape
    torch.Size([2, 10, 4])

    Args:
        levels: Levels of each dimension, at least 3 (the gradient of the bound vanishes with 2); their product is
            the number of codes.
        entropy: Weight of the entropy penalty, confidence - diversity, in nats (VidTok, arXiv 2412.13061, section 3.2).
        temperature: Softmax temperature of the entropy penalty, in units of squared distance of latents in [-1, 1].
        entropy_group: Dimensions per group whose joint entropy is computed; 0: all in one group.
    """

    grid: RoundingGrid

    def __init__(
        self,
        levels: Sequence[Annotated[int, "[3, inf)"]],
        entropy: float = 0.0,
        temperature: Annotated[float, "(0, inf)"] = 0.01,
        entropy_group: Annotated[int, "[0, inf)", "0 takes all dimensions together"] = 0,
    ) -> None:
        super().__init__(levels, RoundingGrid(levels))
        self.levels = tuple(levels)
        self.entropy = entropy
        self.temperature = temperature
        self.groups = entropy_groups(levels, entropy_group, "bottleneck.entropy_group") if entropy else []

    def _quantize(self, latents: Tensor, valid: Tensor) -> Quantized:
        grid = self.grid
        bent = torch.tanh(latents + grid.shift)
        # Take the values from rounding: decoding the codes would take longer than all the rest.
        with torch.no_grad():
            rounded = (bent * grid.reach).sub_(grid.offset).round_()
            codes = grid.code(rounded.to(torch.int64).add_(grid.zero))
            values = rounded.div_(grid.zero)
        bounded = torch.addcmul(-grid.offset / grid.zero, bent, grid.reach / grid.zero)
        quantized = straight_through(bounded, values)
        if not self.entropy:
            return Quantized(quantized, codes, {}, {})
        entropies = grid_entropies(self._choices(bounded, valid), valid, self.groups)
        return Quantized(quantized, codes, *entropies.penalize(self.entropy))

    def _choices(self, bounded: Tensor, valid: Tensor) -> list[Tensor]:
        """Return `log softmax(-(z - level)^2 / temperature)` over each dimension's levels, `(b, n, levels)`."""
        bounded = torch.where(valid[..., None], bounded, 0.0)
        choices = []
        for axis, count in enumerate(self.levels):
            zero = count // 2
            values = (torch.arange(count, device=bounded.device) - zero) / zero
            choices.append(((bounded[..., axis, None] - values).square() / -self.temperature).log_softmax(-1))
        return choices


class EvenGrid(Grid):
    """Grid of levels evenly spaced from -1 to 1, both included.

    Args:
        levels: Levels of each dimension, at least 2.
        squash: Bound latents to [-1, 1] by tanh in `encode`; clamp them if False.
    """

    steps: Tensor

    def __init__(self, levels: Sequence[int], squash: bool = False) -> None:
        super().__init__(levels)
        self.squash = squash
        self.register_buffer("steps", (self.levels - 1).float(), persistent=False)

    def nearest(self, bounded: Tensor) -> Tensor:
        """Round values in [-1, 1] to int64 digits `(b, n, d)`."""
        positions = torch.floor((bounded.clamp(-1.0, 1.0) + 1) / 2 * self.steps + 0.5)
        return positions.to(torch.int64)

    def values(self, digits: Tensor) -> Tensor:
        """Return the values of digits, in [-1, 1]."""
        return digits.to(torch.float32) * 2 / self.steps - 1

    def encode(self, latents: Tensor) -> Tensor:
        """Quantize latents `(b, n, d)` to int64 codes `(b, 1, n)`."""
        return self.code(self.nearest(torch.tanh(latents) if self.squash else latents))

    def decode(self, codes: Tensor) -> Tensor:
        """Decode codes `(b, 1, n)` to latents `(b, n, d)` in [-1, 1]."""
        return self.values(self.digits(codes))


class _FrozenLevels(FrozenCodebooks):
    """Export form of even grids; each quantizes the residual of the previous ones."""

    scales: Tensor
    reach: Tensor

    def __init__(self, grid: EvenGrid, scales: Tensor, reach: Tensor) -> None:
        super().__init__(len(scales), scales.device)
        self.grid = grid
        self.num_codebooks = len(scales)
        self.register_buffer("scales", scales.clone())
        self.register_buffer("reach", reach.clone())

    def encode(self, latents: Tensor) -> Tensor:
        residual = torch.tanh(latents / self.reach) * self.reach
        codes: list[Tensor] = []
        for codebook in range(self.num_codebooks):
            digits = self.grid.nearest(residual / self.scales[codebook])
            residual = residual - self.grid.values(digits) * self.scales[codebook]
            codes.append(self.grid.code(digits))
        return torch.cat(codes, 1)

    def decode_kept(self, codes: Tensor, kept: Tensor) -> Tensor:
        total = self.grid.values(self.grid.digits(codes[:, :1])) * self.scales[0] * kept[0]
        for codebook in range(1, self.num_codebooks):
            added = self.grid.values(self.grid.digits(codes[:, codebook : codebook + 1])) * self.scales[codebook]
            total = total + added * kept[codebook]
        return total


class ResidualScalarQuantizer(Bottleneck):
    """Residual FSQ: codebook i is the same grid scaled by `refinement ** i` (as in vector-quantize-pytorch).

    Latents are bounded once; each codebook rounds the residual of the previous ones. With `refinement = 1 / levels`
    the sum of two codebooks is again an even grid, of `levels ** 2` levels.

    Args:
        levels: Levels of each dimension, at least 2.
        num_codebooks: Number of codebooks.
        refinement: Scale of each grid relative to the previous one, in every dimension; 1 / levels if None.
        bound: Absolute value at which latents saturate; 1 + 1 / (levels - 1) if None, the edge of the outermost cells.
    """

    scales: Tensor
    reach: Tensor

    def __init__(
        self,
        levels: Sequence[Annotated[int, "[2, inf)"]],
        num_codebooks: Annotated[int, "[1, 1000]"],
        refinement: Annotated[float | None, "(0, inf)"] = None,
        bound: Annotated[float | None, "(0, inf)"] = None,
    ) -> None:
        super().__init__()
        self.dim = len(levels)
        self.codebook_sizes = (math.prod(levels),) * num_codebooks
        self.grid = EvenGrid(levels)
        counts = self.grid.levels.double()
        step = 1 / counts if refinement is None else torch.full_like(counts, refinement)
        reach = 1 + 1 / (counts - 1) if bound is None else torch.full_like(counts, bound)
        self.register_buffer(
            "scales", torch.stack([step**codebook for codebook in range(num_codebooks)]).float(), persistent=False
        )
        self.register_buffer("reach", reach.float(), persistent=False)

    def forward(self, latents: Tensor, lengths: Tensor, n_codebooks: Tensor) -> Quantized:
        """Quantize; see `Bottleneck.forward`."""
        with torch.autocast(latents.device.type, enabled=False):
            bounded = torch.tanh(latents.float() / self.reach) * self.reach
            residual, total, codes = bounded.detach(), torch.zeros_like(bounded), []
            for codebook, scale in enumerate(self.scales):
                digits = self.grid.nearest(residual / scale)
                values = self.grid.values(digits) * scale
                residual = residual - values
                total = total + torch.where(n_codebooks[:, None, None] > codebook, values, 0.0)
                codes.append(self.grid.code(digits))
            return Quantized(straight_through(bounded, total), torch.cat(codes, 1), {}, {})

    def encode(self, latents: Tensor) -> Tensor:
        """Quantize latents to codes; see `Bottleneck.encode`."""
        return self.frozen().encode(latents.float())  # type: ignore[no-any-return, operator]

    def decode(self, codes: Tensor) -> Tensor:
        """Sum the grid points of all codebooks; see `Bottleneck.decode`."""
        return self.frozen().decode(codes)  # type: ignore[no-any-return, operator]

    def frozen(self) -> nn.Module:
        """Return the export form; see `Bottleneck.frozen`."""
        return _FrozenLevels(self.grid, self.scales, self.reach)


class DitheredScalarQuantizer(GridQuantizer):
    """FSQ trained partly with uniform noise instead of rounding (TAAE, Stable Codec, arXiv 2411.19842, section 3.2).

    In training, a sample gets uniform noise one quantization step wide, or passes unquantized, or is rounded. The
    decoder then accepts values between the grid's, so that the levels can be chosen after training. `split` converts a
    trained grid to residual codebooks.

    Args:
        levels: Levels of each dimension, at least 2.
        noise: Fraction of training samples that get noise, in [0, 1].
        bypass: Fraction of training samples that pass unquantized, in [0, 1].
    """

    grid: EvenGrid

    def __init__(
        self,
        levels: Sequence[Annotated[int, "[2, inf)"]],
        noise: Annotated[float, "[0, 1]"] = 0.5,
        bypass: Annotated[float, "[0, 1]"] = 0.25,
    ) -> None:
        super().__init__(levels, EvenGrid(levels, squash=True))
        self.noise = noise
        self.bypass = bypass

    def _quantize(self, latents: Tensor, valid: Tensor) -> Quantized:
        bounded = torch.tanh(latents)
        digits = self.grid.nearest(bounded.detach())
        quantized = straight_through(bounded, self.grid.values(digits))
        if self.training:
            draw = torch.rand(len(bounded), 1, 1, device=bounded.device)
            noisy = bounded + (torch.rand_like(bounded) * 2 - 1) / self.grid.steps
            quantized = torch.where(draw < self.noise + self.bypass, bounded, quantized)
            quantized = torch.where(draw < self.noise, noisy, quantized)
        return Quantized(quantized, self.grid.code(digits), {}, {})

    def split(self, levels: Sequence[int], num_codebooks: int) -> ResidualScalarQuantizer:
        """Rewrite the trained grid as residual codebooks: 17 levels equal two codebooks of 5 (section 3.2).

        All codebooks together decode to the latents of this grid; a prefix of them decodes to a coarser grid.

        Raises:
            UserError: `(levels - 1) ** num_codebooks` is not this grid's levels - 1.
        """
        whole = self.grid.levels.tolist()
        if len(levels) != len(whole) or any(
            (few - 1) ** num_codebooks != many - 1 for few, many in zip(levels, whole, strict=True)
        ):
            raise UserError(
                f"num_codebooks={num_codebooks} of {list(levels)} levels don't make {whole}: "
                "(levels - 1) ** num_codebooks must be levels - 1"
            )
        if len(set(levels)) > 1:
            raise UserError(f"levels {list(levels)}: every dimension must have as many")
        return ResidualScalarQuantizer(
            levels, num_codebooks, refinement=1 / (levels[0] - 1) if num_codebooks > 1 else 1.0, bound=1.0
        )
