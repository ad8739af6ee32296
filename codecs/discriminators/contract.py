"""Outputs of discriminators, and layers whose outputs don't depend on padding."""

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
    """Activations of one layer, with a mask.

    Attributes:
        values: `(b, channels, ...)`.
        valid: bool, broadcastable to `values`, False for activations of padding alone; None if all are valid.
    """

    values: Tensor
    valid: Tensor | None


class DiscriminatorOutput(NamedTuple):
    """Logits and features of one discriminator for a batch.

    Attributes:
        logits: `(b, ...)`; larger for real samples.
        valid: bool, broadcastable to `logits`; None if all are valid.
        features: Activations of the layers, first to last, without the logits.
    """

    logits: Tensor
    valid: Tensor | None
    features: list[Feature]

    def split(self) -> tuple["DiscriminatorOutput", "DiscriminatorOutput"]:
        """Split the output into the first and the second half of the batch."""
        halves = [_halves(self.logits, self.valid), *(_halves(*feature) for feature in self.features)]
        first, second = ([Feature(*half[side]) for half in halves] for side in (0, 1))
        return DiscriminatorOutput(*first[0], first[1:]), DiscriminatorOutput(*second[0], second[1:])


class MultiDiscriminator(nn.Module):
    """Several discriminators of the same signal, as in DAC (arXiv 2306.06546, section 3.4).

    Args:
        parts: Discriminators by name; None removes one.

    Raises:
        UserError: No discriminator is left.
    """

    def __init__(self, parts: Mapping[str, nn.Module | None]) -> None:
        super().__init__()
        self.parts = nn.ModuleDict({name: part for name, part in parts.items() if part is not None})
        if not self.parts:
            raise UserError("discriminator.parts: needs at least one discriminator")

    def forward(self, signal: Tensor, lengths: Tensor | None = None) -> list[DiscriminatorOutput]:
        """Compute logits and features of signals `(b, c, *grid)` with `lengths` `(b,)` valid steps; None for all."""
        return [output for part in self.parts.values() for output in part(signal, lengths)]


class Layers(nn.Module):
    """Stack of convolutions with weight norm and leaky ReLU; invalid steps are zeroed before each convolution.

    Padding in a batch then equals the zero padding of a single sample, so that the batch doesn't change the output.

    Args:
        convolutions: The convolutions; the first axis of their kernels is time.
        slope: Negative slope of the leaky ReLU.
        last: Whether the last convolution computes the logits, without activation, and is no feature.
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
        """Apply the layers to `(b, c, n, *rest)` with `steps` `(b,)` valid steps; None for all.

        Returns:
            Output of the last convolution, its number of valid steps `(b,)`, and the features.
        """
        features = []
        valid = _mask(values, steps)
        for number, convolution in enumerate(self.convolutions, 1):
            values = convolution(zero_invalid(values, valid))
            if steps is not None:
                # The output length of a single sample; 0 for an empty one.
                kernel, stride, padding, dilation = self.geometry[number - 1]
                steps = (steps + 2 * padding - dilation * (kernel - 1) - 1).div(stride, rounding_mode="floor") + 1
                valid = _mask(values, steps)
            if number < len(self.convolutions) or not self.last:
                values = functional.leaky_relu(values, self.slope)
                features.append(Feature(values, valid))
        return Feature(values, valid), steps, features


def zero_padding(signal: Tensor, lengths: Tensor | None) -> Tensor:
    """Zero the steps of `(b, c, t)` after each sample's length."""
    if lengths is None:
        return signal
    return torch.where(prefix_mask(lengths, signal.shape[2])[:, None], signal, 0.0)


def zero_invalid(values: Tensor, valid: Tensor | None) -> Tensor:
    """Zero invalid values, which must be finite."""
    return values if valid is None else values * valid


def valid_means(values: Tensor, valid: Tensor | None) -> Tensor:
    """Average the valid values of each sample of `(b, ...)`: float32 `(b,)`, 0 for an empty sample."""
    values = values.float()
    if valid is None:
        return values.flatten(1).mean(1)
    shares = valid.flatten(1).sum(1) * (values[0].numel() / valid[0].numel())
    return (values * valid).flatten(1).sum(1) / shares.clamp(min=1)


def _mask(values: Tensor, steps: Tensor | None) -> Tensor | None:
    """Return a mask of valid steps, `(b, 1, n, 1...)`."""
    if steps is None:
        return None
    return prefix_mask(steps, values.shape[2])[(slice(None), None, slice(None), *[None] * (values.ndim - 3))]


def _halves(values: Tensor, valid: Tensor | None) -> list[tuple[Tensor, Tensor | None]]:
    half = len(values) // 2
    if valid is None:
        return [(values[:half], None), (values[half:], None)]
    return [(values[:half], valid[:half]), (values[half:], valid[half:])]
