"""Discrete cosine transform of a signal, of the coefficients alone that are expected to be the largest."""

import math

import torch
from torch import Tensor, nn

__all__ = ["CosineTransform"]

# The amplitudes of natural images fall as a power of the frequency (Field, J. Opt. Soc. Am. A 4, 1987), and those of
# colors are smaller than those of gray. The constants fit the photos that come with varitok (tests).
AMPLITUDE, KNEE, DECAY, COLOR = 0.2, 0.3, 1.15, 0.3


class CosineTransform(nn.Module):
    """The `count` coefficients of an image's DCT-II that are expected to be the largest, in that order.

    It is over rows, columns and channels: of RGB, waves of the channels are brightness, red against blue, and green
    against both. A coefficient is the mean of the image times a wave of unit power, divided by what the prior expects
    of natural images in [-1, 1]. So coefficients of all frequencies, and of images of all sizes, are about 1.

    >>> transform = CosineTransform(3, 64, 256)
    >>> coefficients = transform.analyze(torch.ones(1, 3, 64, 64))  # one gray
    >>> coefficients.shape, int((coefficients.abs() > 1e-3).sum())
    (torch.Size([1, 256]), 1)
    >>> torch.testing.assert_close(transform.synthesize(coefficients, [3, 16, 32]), torch.ones(1, 3, 16, 32))

    Args:
        channels: Channels of the image.
        side: Frequencies of rows and of columns that are considered, in half waves per side.
        count: Number of coefficients; at most `channels * side * side`.
    """

    order: Tensor
    scale: Tensor

    def __init__(self, channels: int, side: int, count: int) -> None:
        super().__init__()
        color, down, across = torch.meshgrid(*(torch.arange(n) for n in (channels, side, side)), indexing="ij")
        expected = AMPLITUDE * COLOR**color * (down.square() + across.square() + KNEE) ** (-DECAY / 2)
        largest = expected.flatten().argsort(descending=True, stable=True)[:count]
        kept = int(torch.maximum(down, across).flatten()[largest].max()) + 1
        self.frequencies = [channels, kept, kept]
        numbers = (color * kept + down) * kept + across
        self.register_buffer("order", numbers.flatten()[largest], persistent=False)
        self.register_buffer("scale", expected.flatten()[largest], persistent=False)

    def basis(self, count: int, size: int, like: Tensor) -> Tensor:
        """Return cosines of 0 to `count - 1` half periods at `size` positions, `(count, size)`; from `size` on, 0."""
        numbers = torch.arange(count, device=like.device)
        angles = numbers.unsqueeze(1) * (torch.arange(size, device=like.device) + 0.5) * (math.pi / size)
        power = torch.where(numbers == 0, 1.0, math.sqrt(2.0)) * (numbers < size)
        return (angles.cos() * power.unsqueeze(1)).to(like.dtype)

    def analyze(self, signal: Tensor) -> Tensor:
        """Return the coefficients `(b, count)` of images `(b, c, h, w)`."""
        x = signal
        for count in self.frequencies:
            size = x.shape[1]
            x = torch.tensordot(x, self.basis(count, size, x) / size, ([1], [1]))  # the next axis becomes the first
        return x.flatten(1)[:, self.order] / self.scale

    def synthesize(self, coefficients: Tensor, size: list[int]) -> Tensor:
        """Return images `(b, *size)`, of `c, h, w`, of the first coefficients `(b, k)`; others are 0."""
        b, k = coefficients.shape
        channels, down, across = self.frequencies[0], self.frequencies[1], self.frequencies[2]
        flat = coefficients.new_zeros((b, channels * down * across))
        x = flat.index_copy(1, self.order[:k], (coefficients * self.scale[:k]).to(flat.dtype))
        x = x.reshape(b, channels, down, across)
        for axis, count in enumerate(self.frequencies):
            x = torch.tensordot(x, self.basis(count, size[axis], x), ([1], [0]))
        return x
