"""The short-time Fourier transform, one for losses, discriminators and networks."""

import torch
from torch import Tensor, nn

from varitok import UserError

from ..masking import prefix_mask

__all__ = ["Spectrum"]


class Spectrum(nn.Module):
    """Short-time Fourier transform with a periodic Hann window, in float32 whatever the autocast.

    Args:
        fft: Length of the transform, in samples.
        hop: Samples between frames; a quarter of `fft` where None.
        window: Length of the window, centred in the transform; `fft` where None.
        normalized: Whether a spectrum is divided by the root of the sum of its window's squares.

    Raises:
        UserError: The hop is not from 1 to `fft`, or the window is longer than `fft`.
    """

    hann: Tensor

    def __init__(
        self, fft: int, hop: int | None = None, window: int | None = None, *, normalized: bool = False
    ) -> None:
        super().__init__()
        self.fft = fft
        self.hop = fft // 4 if hop is None else hop
        window = fft if window is None else window
        if not 1 <= self.hop <= fft or not 1 <= window <= fft:
            raise UserError(f"spectrum: hop={self.hop} and window={window} should be from 1 to fft={fft}")
        hann = torch.hann_window(window)
        if normalized:
            # The transform is linear: the window takes the factor.
            hann = hann / hann.square().sum().sqrt()
        self.register_buffer("hann", hann, persistent=False)

    def forward(self, signal: Tensor, lengths: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        """Transform `(b, c, t)`, of which the first `lengths` samples are valid; None for all.

        Returns:
            complex64 `(b, c, ceil(t / hop), fft // 2 + 1)`, and the number of valid frames `(b,)`, None for all.
        """
        signal = signal.float()
        b, c, t = signal.shape
        frames = None
        if lengths is not None:
            signal = torch.where(prefix_mask(lengths, t)[:, None], signal, 0.0)
            frames = (lengths + self.hop - 1).div(self.hop, rounding_mode="floor")
        with torch.autocast(signal.device.type, enabled=False):
            spectrum = torch.stft(
                signal.reshape(b * c, t),
                self.fft,
                self.hop,
                window=self.hann,
                win_length=len(self.hann),
                center=True,
                pad_mode="constant",
                return_complex=True,
            )
        # A frame that is centred behind the end does not count, as behind a length.
        spectrum = spectrum[..., : -(-t // self.hop)]
        return spectrum.view(b, c, *spectrum.shape[1:]).transpose(2, 3), frames
