"""Complex STFT discriminator of audio."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ..networks.layers.stft import Spectrum
from .contract import DiscriminatorOutput, Feature, Layers

__all__ = ["SpectrogramDiscriminator"]


class SpectrogramDiscriminator(nn.Module):
    """Multi-resolution complex STFT discriminator with one or several bands: one network per window length.

    The defaults are EnCodec's (arXiv 2210.13438, section 3.4). DAC's (arXiv 2306.06546, section 3.4) has dilations of
    1, a slope of 0.1, `normalized=False`, windows of 2048, 1024 and 512, and five bands. The hop length is a quarter of
    the window. Frames are centered, with zero padding.

    Args:
        windows: Window lengths, in samples.
        channels: Channels of the audio; real and imaginary parts are separate input channels.
        width: Channels of all layers.
        dilations: Dilations along time of the layers that halve the frequency axis.
        bands: Band edges as fractions of the frequency axis; one band by default. Each band has its own layers, but
            all share the last.
        normalized: Whether to divide spectra by `sqrt(sum(window^2))`.
        slope: Negative slope of the leaky ReLU.
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
        """Compute logits `(b, 1, frames, f)` and features of audio `(b, c, t)`, valid up to sample `lengths`."""
        outputs = []
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
            outputs.append(DiscriminatorOutput(logits.values, logits.valid, features))
        return outputs


def _layers(channels: int, width: int, dilations: Sequence[int]) -> list[nn.Conv2d]:
    """Build the convolutions of a band, which halve the frequency axis once per dilation and keep the time axis."""
    halving = [
        nn.Conv2d(width, width, (3, 9), stride=(1, 2), dilation=(dilation, 1), padding=(dilation, 4))
        for dilation in dilations
    ]
    first = nn.Conv2d(channels, width, (3, 9), padding=(1, 4))
    return [first, *halving, nn.Conv2d(width, width, 3, padding=1)]
