"""Discrete cosine transform of a signal, of the coefficients alone that are expected to be the largest."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

__all__ = ["CosineTransform", "random_maps"]

# The amplitudes of natural images fall as a power of the frequency (Field, J. Opt. Soc. Am. A 4, 1987), and those of
# colors are smaller than those of gray. The constants fit the photos that come with varitok (tests).
AMPLITUDE, KNEE, DECAY, COLOR = 0.2, 0.3, 1.15, 0.3
# Along time they fall the sooner the slower the wave is in space, as of things that move at all speeds (Dong and Atick,
# Network 6, 1995). The constants fit the clips that come with varitok (tests).
MOTION, MOTION_GROWTH = 0.1, 0.6


class CosineTransform(nn.Module):
    """The `count` coefficients of an image's or a clip's DCT-II that are expected to be the largest, in that order.

    It is over channels and all axes: of RGB, waves of the channels are brightness, red against blue, and green against
    both. A coefficient is the mean of the signal times a wave of unit power, divided by what the prior expects of
    natural signals in [-1, 1]. So coefficients of all frequencies, and of signals of all sizes, are about 1.

    >>> transform = CosineTransform([3, 64, 64], 256)
    >>> coefficients = transform.analyze(torch.ones(1, 3, 64, 64))  # one gray
    >>> coefficients.shape, int((coefficients.abs() > 1e-3).sum())
    (torch.Size([1, 256]), 1)
    >>> torch.testing.assert_close(transform.synthesize(coefficients, [3, 16, 32]), torch.ones(1, 3, 16, 32))

    Args:
        sizes: Frequencies that are considered, in half waves: of channels, of frames if it is a clip, of rows, of
            columns.
        count: Number of coefficients; at most the product of `sizes`.
    """

    order: Tensor
    scale: Tensor

    def __init__(self, sizes: Sequence[int], count: int) -> None:
        super().__init__()
        waves = torch.meshgrid(*(torch.arange(size) for size in sizes), indexing="ij")
        expected = _expected(*waves).flatten()
        largest = expected.argsort(descending=True, stable=True)[:count]
        self.frequencies = [int(wave.flatten()[largest].max()) + 1 for wave in waves]
        numbers = torch.zeros_like(waves[0])
        for wave, kept in zip(waves, self.frequencies, strict=True):
            numbers = numbers * kept + wave
        self.register_buffer("order", numbers.flatten()[largest], persistent=False)
        self.register_buffer("scale", expected[largest], persistent=False)

    def basis(self, count: int, size: int, like: Tensor) -> Tensor:
        """Return cosines of 0 to `count - 1` half periods at `size` positions, `(count, size)`; from `size` on, 0."""
        numbers = torch.arange(count, device=like.device)
        angles = numbers.unsqueeze(1) * (torch.arange(size, device=like.device) + 0.5) * (math.pi / size)
        power = torch.where(numbers == 0, 1.0, math.sqrt(2.0)) * (numbers < size)
        return (angles.cos() * power.unsqueeze(1)).to(like.dtype)

    def analyze(self, signal: Tensor) -> Tensor:
        """Return the coefficients `(b, count)` of signals `(b, c, *grid)`."""
        x = signal
        for count in self.frequencies:
            size = x.shape[1]
            x = torch.tensordot(x, self.basis(count, size, x) / size, ([1], [1]))  # the next axis becomes the first
        return x.flatten(1)[:, self.order] / self.scale

    def synthesize(self, coefficients: Tensor, size: list[int]) -> Tensor:
        """Return signals `(b, *size)`, of `c, *grid`, of the first coefficients `(b, k)`; others are 0."""
        b, k = coefficients.shape
        total = 1
        for count in self.frequencies:
            total *= count
        flat = coefficients.new_zeros((b, total))
        x = flat.index_copy(1, self.order[:k], (coefficients * self.scale[:k]).to(flat.dtype))
        x = x.reshape([b] + self.frequencies)  # noqa: RUF005 (TorchScript has no unpacking)
        for axis, count in enumerate(self.frequencies):
            x = torch.tensordot(x, self.basis(count, size[axis], x), ([1], [0]))
        return x

    def to_tokens(self, signal: Tensor, maps: Tensor) -> Tensor:
        """Map the coefficients of signals to ordered tokens: the first token from the first ones, and so on.

        Args:
            signal: Signals `(b, c, *grid)`.
            maps: A linear map of each token, `(N, count / N, width)`.

        Returns:
            Tokens `(b, N, width)`.
        """
        tokens, each = maps.shape[0], maps.shape[1]
        # (b, N * each) -> (N, b, each) -> (N, b, width)
        coefficients = self.analyze(signal).reshape(-1, tokens, each).transpose(0, 1)
        return (coefficients @ maps).transpose(0, 1)

    def from_tokens(self, tokens: Tensor, maps: Tensor, size: list[int]) -> Tensor:
        """Map the first k ordered tokens to coefficients, and these to signals `(b, *size)`.

        Args:
            tokens: Tokens `(b, k, width)`.
            maps: A linear map of each token, `(N, width, count / N)`.
            size: Channels and grid of the signals.
        """
        b, k = tokens.shape[0], tokens.shape[1]
        # (b, k, width) -> (k, b, width) -> (k, b, each) -> (b, k * each)
        coefficients = (tokens.transpose(0, 1) @ maps[:k]).transpose(0, 1).reshape(b, -1)
        return self.synthesize(coefficients, size)


def random_maps(tokens: int, each: int, width: int, decodes: bool) -> Tensor:
    """Draw maps of `to_tokens`, or of `from_tokens` if `decodes`; those of all tokens are equal.

    The first make tokens of a variance of 1, the second coefficients of `each / width`, nearly gray.
    """
    maps: Tensor = torch.randn(each, width) / each**0.5
    maps = maps.T * (each / width) if decodes else maps
    return maps.expand(tokens, -1, -1).contiguous()  # FSDP2 shards no others


def _expected(color: Tensor, *waves: Tensor) -> Tensor:
    """Return the expected amplitudes of waves, given their numbers of half waves: color, frames, rows, columns."""
    *frames, down, across = waves
    power = down.square() + across.square() + KNEE
    expected: Tensor = AMPLITUDE * COLOR**color * power ** (-DECAY / 2)
    for frame in frames:
        slow = MOTION * power ** (MOTION_GROWTH / 2)
        expected = expected * slow / (slow + frame)
    return expected
