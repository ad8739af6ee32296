"""Multi-scale discriminator of audio."""

from torch import Tensor, nn
from torch.nn import functional

from .contract import DiscriminatorOutput, Layers, zero_padding

__all__ = ["ScaleDiscriminator"]

# Channels, kernel size, stride and groups of each layer, at the published width of 128.
LAYERS = [
    (128, 15, 1, 1),
    (128, 41, 2, 4),
    (256, 41, 2, 16),
    (512, 41, 4, 16),
    (1024, 41, 4, 16),
    (1024, 41, 1, 16),
    (1024, 5, 1, 1),
]


class ScaleDiscriminator(nn.Module):
    """Multi-scale discriminator (HiFi-GAN, arXiv 2010.05646, section 2.3): one network per sample rate.

    Average pooling halves the sample rate from each network to the next. All have weight norm (in the paper, the first
    has spectral norm).

    Args:
        scales: Number of sample rates.
        channels: Channels of the audio.
        width: Channels of the first layer, a multiple of 16; later layers have up to 8 times as many.
    """

    def __init__(self, scales: int = 3, channels: int = 1, width: int = 128) -> None:
        super().__init__()
        self.nets = nn.ModuleList()
        for _ in range(scales):
            layers, narrow = [], channels
            for published, kernel, stride, groups in LAYERS:
                wide = published * width // LAYERS[0][0]
                layers.append(nn.Conv1d(narrow, wide, kernel, stride=stride, padding=kernel // 2, groups=groups))
                narrow = wide
            self.nets.append(Layers([*layers, nn.Conv1d(narrow, 1, 3, padding=1)]))

    def forward(self, signal: Tensor, lengths: Tensor | None = None) -> list[DiscriminatorOutput]:
        """Compute logits `(b, 1, t')` and features of audio `(b, c, t)`, valid up to sample `lengths`."""
        signal = zero_padding(signal, lengths)
        outputs = []
        for number, net in enumerate(self.nets):
            if number:
                lengths = None if lengths is None else lengths.div(2, rounding_mode="floor") + (lengths > 0)
                signal = zero_padding(functional.avg_pool1d(signal, 4, stride=2, padding=2), lengths)
            logits, _, features = net(signal, lengths)
            outputs.append(DiscriminatorOutput(logits.values, logits.valid, features))
        return outputs
