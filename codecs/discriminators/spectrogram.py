"""Discriminators that look at complex spectrograms of a sound."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ..networks.stft import Spectrum
from .contract import DiscriminatorOutput, Feature, Layers

__all__ = ["SpectrogramDiscriminator"]


class SpectrogramDiscriminator(nn.Module):
    """Multi-resolution complex STFT discriminator, of one band or several: one network for each window.

    With the defaults and a width of 32 it is EnCodec's (arXiv 2210.13438, section 3.4); with dilations of 1, a slope
    of 0.1, `normalized=False`, windows of 2048, 1024 and 512, and five bands it is DAC's (arXiv 2306.06546, section
    3.4). Windows are a quarter apart, and centered on their sample with zeros around the sound.

    Args:
        windows: Lengths of the windows, in samples.
        channels: Channels of the sound; the real and the imaginary part make two of each.
        width: Channels of all layers.
        dilations: Dilations along time of the three layers that halve the frequencies.
        bands: Edges of the bands, as shares of all frequencies; each has layers of its own but for the last. The
            default is one band.
        normalized: Whether a window's spectrum is divided by the root of the sum of its squares.
        slope: Slope of the leaky ReLU below zero.
    """

    def __init__(
        self,
        windows: Sequence[int] = (2048, 1024, 512, 256, 128),
        channels: int = 1,
        width: int = 32,
        dilations: Sequence[int] = (1, 2, 4),
        bands: Sequence[float] = (0.0, 1.0),
        normalized: bool = True,
        slope: float = 0.2,
    ) -> None:
        super().__init__()
        self.spectra = nn.ModuleList([Spectrum(window, normalized=normalized) for window in windows])
        self.edges = [[int(edge * (window // 2 + 1)) for edge in bands] for window in windows]
        self.nets, self.last = nn.ModuleList(), nn.ModuleList()
        for _ in windows:
            nets = [Layers(_layers(2 * channels, width, dilations), slope, last=False) for _ in bands[1:]]
            self.nets.append(nn.ModuleList(nets))
            self.last.append(Layers([nn.Conv2d(width, 1, 3, padding=1)]))

    def forward(self, signal: Tensor, lengths: Tensor | None = None) -> list[DiscriminatorOutput]:
        """Judge audio `(b, c, t)` with `lengths` valid samples; logits are `(b, 1, frames, f)`."""
        judgments = []
        for spectrum, edges, nets, last in zip(self.spectra, self.edges, self.nets, self.last, strict=True):
            transformed, steps = spectrum(signal, lengths)
            values = torch.cat([transformed.real, transformed.imag], dim=1)
            features: list[Feature] = []
            parts = []
            for net, low, high in zip(nets.children(), edges, edges[1:], strict=False):
                part, _, seen = net(values[..., low:high], steps)
                parts.append(part.values)
                features += seen
            logits, _, _ = last(torch.cat(parts, dim=-1), steps)
            judgments.append(DiscriminatorOutput(logits.values, logits.valid, features))
        return judgments


def _layers(channels: int, width: int, dilations: Sequence[int]) -> list[nn.Conv2d]:
    """Make a band's convolutions: time is kept, frequency is halved once for each dilation."""
    halving = [
        nn.Conv2d(width, width, (3, 9), stride=(1, 2), dilation=(dilation, 1), padding=(dilation, 4))
        for dilation in dilations
    ]
    first = nn.Conv2d(channels, width, (3, 9), padding=(1, 4))
    return [first, *halving, nn.Conv2d(width, width, 3, padding=1)]
