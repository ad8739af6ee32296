"""Multi-period discriminator of audio."""

from collections.abc import Sequence

from torch import Tensor, nn
from torch.nn import functional

from .contract import DiscriminatorOutput, Layers, zero_padding

__all__ = ["PeriodDiscriminator"]


class PeriodDiscriminator(nn.Module):
    """Multi-period discriminator (HiFi-GAN, arXiv 2010.05646, section 2.3): one network for each period p.

    Audio is reshaped to rows of p samples and convolved along columns. The last row is padded with zeros; the paper's
    reflection padding would depend on a sample's length in its batch.

    Args:
        periods: Periods, in samples.
        channels: Channels of the audio.
        width: Channels of the first layer; later layers have 4, 16 and 32 times as many.
    """

    def __init__(self, periods: Sequence[int] = (2, 3, 5, 7, 11), channels: int = 1, width: int = 32) -> None:
        super().__init__()
        self.periods = list(periods)
        widths = [channels, width, 4 * width, 16 * width, 32 * width, 32 * width]
        self.nets = nn.ModuleList()
        for _ in self.periods:
            layers = [
                nn.Conv2d(narrow, wide, (5, 1), stride=(stride, 1), padding=(2, 0))
                for narrow, wide, stride in zip(widths, widths[1:], (3, 3, 3, 3, 1), strict=False)
            ]
            self.nets.append(Layers([*layers, nn.Conv2d(widths[-1], 1, (3, 1), padding=(1, 0))]))

    def forward(self, signal: Tensor, lengths: Tensor | None = None) -> list[DiscriminatorOutput]:
        """Compute logits `(b, 1, t', p)` and features of audio `(b, c, t)`, valid up to sample `lengths`."""
        signal = zero_padding(signal, lengths)
        b, c, t = signal.shape
        outputs = []
        for period, net in zip(self.periods, self.nets, strict=True):
            rows = functional.pad(signal, (0, -t % period)).view(b, c, -1, period)  # (b, c, t) -> (b, c, t / p, p)
            steps = None if lengths is None else (lengths + period - 1).div(period, rounding_mode="floor")
            logits, _, features = net(rows, steps)
            outputs.append(DiscriminatorOutput(logits.values, logits.valid, features))
        return outputs
