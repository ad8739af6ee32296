"""What a discriminator gives, and the pieces that keep padding out of its judgment."""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.utils.parametrizations import weight_norm

from varitok import UserError

from ..masking import prefix_mask

__all__ = [
    "DiscriminatorOutput",
    "Feature",
    "Layers",
    "MultiDiscriminator",
    "valid_means",
    "zero_invalid",
    "zero_padding",
]


class Feature(NamedTuple):
    """Activations of one layer, and which of them don't rest on padding alone.

    Attributes:
        values: `(b, channels, ...)`.
        valid: bool, broadcastable to `values`, or None if all are.
    """

    values: Tensor
    valid: Tensor | None


class DiscriminatorOutput(NamedTuple):
    """What one discriminator says of a batch.

    Attributes:
        logits: `(b, ...)`; large means real.
        valid: bool, broadcastable to `logits`, or None if all are valid.
        features: Activations of its layers, first to last, without the logits.
    """

    logits: Tensor
    valid: Tensor | None
    features: list[Feature]

    def split(self) -> tuple["DiscriminatorOutput", "DiscriminatorOutput"]:
        """Take apart the judgments of the first and the second half of the batch."""
        halves = [_halves(self.logits, self.valid), *(_halves(*feature) for feature in self.features)]
        first, second = ([Feature(*half[side]) for half in halves] for side in (0, 1))
        return DiscriminatorOutput(*first[0], first[1:]), DiscriminatorOutput(*second[0], second[1:])


class MultiDiscriminator(nn.Module):
    """Several discriminators that judge the same signal, such as DAC's (arXiv 2306.06546, section 3.4).

    Args:
        parts: Discriminators by name; None in place of one removes it.

    Raises:
        UserError: There is none.
    """

    def __init__(self, parts: Mapping[str, nn.Module | None]) -> None:
        super().__init__()
        self.parts = nn.ModuleDict({name: part for name, part in parts.items() if part is not None})
        if not self.parts:
            raise UserError("discriminator.parts: there is none")

    def forward(self, signal: Tensor, lengths: Tensor | None = None) -> list[DiscriminatorOutput]:
        """Judge signals `(b, c, *grid)` with `lengths` valid steps; None for all."""
        return [judgment for part in self.parts.values() for judgment in part(signal, lengths)]


class Layers(nn.Module):
    """Convolutions with weight norm and leaky ReLU; before each, steps after a sample's length are set to zero.

    So padding is what a single sample's own zero padding is, and a sample is judged the same in any batch.

    Args:
        convolutions: All convolutions, the first axis of whose kernel runs along time.
        slope: Slope of the leaky ReLU below zero.
        last: Whether the last convolution gives logits: no activation follows, and it is no feature.
    """

    def __init__(
        self, convolutions: Sequence[nn.Conv1d | nn.Conv2d | nn.Conv3d], slope: float = 0.1, last: bool = True
    ) -> None:
        super().__init__()
        self.geometry = [
            (convolution.kernel_size[0], convolution.stride[0], int(convolution.padding[0]), convolution.dilation[0])
            for convolution in convolutions
        ]
        self.convolutions = nn.ModuleList([weight_norm(convolution) for convolution in convolutions])
        self.slope = slope
        self.last = last

    def forward(self, values: Tensor, steps: Tensor | None) -> tuple[Feature, Tensor | None, list[Feature]]:
        """Run `(b, c, n, *rest)` with `steps` `(b,)` valid steps, None for all.

        Returns:
            What the last convolution gives, its steps, and the features.
        """
        features = []
        valid = _mask(values, steps)
        for number, convolution in enumerate(self.convolutions, 1):
            values = convolution(zero_invalid(values, valid))
            if steps is not None:
                # As many as of a sample by itself; an empty one has none.
                kernel, stride, padding, dilation = self.geometry[number - 1]
                steps = (steps + 2 * padding - dilation * (kernel - 1) - 1).div(stride, rounding_mode="floor") + 1
                valid = _mask(values, steps)
            if number < len(self.convolutions) or not self.last:
                values = functional.leaky_relu(values, self.slope)
                features.append(Feature(values, valid))
        return Feature(values, valid), steps, features


def zero_padding(signal: Tensor, lengths: Tensor | None) -> Tensor:
    """Zero what follows each sample's length, in `(b, c, t)`."""
    if lengths is None:
        return signal
    return torch.where(prefix_mask(lengths, signal.shape[2])[:, None], signal, 0.0)


def zero_invalid(values: Tensor, valid: Tensor | None) -> Tensor:
    """Zero invalid values, which must be finite."""
    return values if valid is None else values * valid


def valid_means(values: Tensor, valid: Tensor | None) -> Tensor:
    """Average `(b, ...)` over the valid part of each sample: float32 `(b,)`, 0 if it is empty."""
    values = values.float()
    if valid is None:
        return values.flatten(1).mean(1)
    shares = valid.flatten(1).sum(1) * (values[0].numel() / valid[0].numel())
    return (values * valid).flatten(1).sum(1) / shares.clamp(min=1)


def _mask(values: Tensor, steps: Tensor | None) -> Tensor | None:
    """Mark valid steps, `(b, 1, n, 1...)`."""
    if steps is None:
        return None
    return prefix_mask(steps, values.shape[2])[(slice(None), None, slice(None), *[None] * (values.ndim - 3))]


def _halves(values: Tensor, valid: Tensor | None) -> list[tuple[Tensor, Tensor | None]]:
    rows = len(values) // 2
    if valid is None:
        return [(values[:rows], None), (values[rows:], None)]
    return [(values[:rows], valid[:rows]), (values[rows:], valid[rows:])]
