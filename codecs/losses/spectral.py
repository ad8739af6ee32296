"""Differences of sounds' spectra, and the ratio of signal to distortion.

A spectrogram's frame is centered on its sample, with zeros around the signal. Samples after a signal's length are set
to zero first, and a frame counts if its center is before the length: so padding changes nothing. (The published
codes reflect the signal at its ends, so that the last frames would depend on the batch.)
"""

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor, nn

from varitok import UserError

from ..masking import masked_mean, prefix_mask
from ..networks.stft import Spectrum, mel_bank
from .contract import SignalTerm

__all__ = ["SISDR", "MultiResolutionSTFT", "MultiScaleMel"]


class MultiScaleMel(SignalTerm):
    """Distances of mel spectrograms at several scales.

    The defaults are DAC's (arXiv 2306.06546, section 3.5): the sum over seven windows of the mean absolute difference
    of log10 magnitudes. EnCodec's (arXiv 2210.13438, equation 2, and audiocraft's configuration) is 64 bands of power,
    HTK's without norm, on windows of 64 to 1024, with both distances, the logarithmic one squared, `scale=0.1` for the
    mean over both and all windows. Vocos' (arXiv 2306.00814, section 3.4) is one window of 1024 and 100 bands.

    Args:
        sample_rate: Sample rate, in Hz.
        windows: Lengths of the windows, in samples; a quarter apart.
        bands: Mel bands, for each window or for all.
        low: Lowest frequency, in Hz.
        high: Highest, in Hz; half the sample rate if None.
        formula: "slaney" has bands of equal area, "htk" of equal height.
        power: 1 for magnitudes, 2 for power.
        normalized: Whether spectra are divided by the root of the sum of their window's squares.
        floor: Magnitudes below it count as it, in logarithms.
        magnitude: Weight of the mean absolute difference of magnitudes (or power).
        logarithm: Weight of the difference of their log10.
        squared: Whether the difference of logarithms is squared.
        scale: Factor on all; 1 gives the sum over windows.

    Raises:
        UserError: There are not as many numbers of bands as windows.
    """

    def __init__(
        self,
        sample_rate: int,
        windows: Sequence[int] = (32, 64, 128, 256, 512, 1024, 2048),
        bands: int | Sequence[int] = (5, 10, 20, 40, 80, 160, 320),
        *,
        low: float = 0.0,
        high: float | None = None,
        formula: Literal["slaney", "htk"] = "slaney",
        power: float = 1.0,
        normalized: bool = False,
        floor: float = 1e-5,
        magnitude: float = 0.0,
        logarithm: float = 1.0,
        squared: bool = False,
        scale: float = 1.0,
    ) -> None:
        super().__init__()
        numbers = [bands] * len(windows) if isinstance(bands, int) else list(bands)
        if len(numbers) != len(windows):
            raise UserError(f"mel.bands: {len(numbers)} numbers for {len(windows)} windows")
        self.spectra = nn.ModuleList([Spectrum(window, normalized=normalized) for window in windows])
        for index, (window, number) in enumerate(zip(windows, numbers, strict=True)):
            bank = mel_bank(sample_rate, number, window, low, high, formula)
            self.register_buffer(f"bank_{index}", bank, persistent=False)
        self.power = power
        self.floor = floor
        self.magnitude = magnitude
        self.logarithm = logarithm
        self.squared = squared
        self.scale = scale

    def forward(self, fake: Tensor, real: Tensor, lengths: Tensor) -> Tensor:
        """Compare sounds `(b, c, t)` in [-1, 1] over their first `lengths` samples."""
        total = fake.new_zeros((), dtype=torch.float32)
        for index in range(len(self.spectra)):
            on_fake, valid = self.spectrogram(fake, lengths, index)
            on_real, _ = self.spectrogram(real, lengths, index)
            if self.magnitude:
                total = total + self.magnitude * _frames((on_fake - on_real).abs(), valid)
            if self.logarithm:
                difference = on_fake.clamp(min=self.floor).log10() - on_real.clamp(min=self.floor).log10()
                error = difference.square() if self.squared else difference.abs()
                total = total + self.logarithm * _frames(error, valid)
        return self.scale * total

    def spectrogram(self, signal: Tensor, lengths: Tensor, index: int = 0) -> tuple[Tensor, Tensor]:
        """Return the mel spectrogram by the window `index`, `(b, c, frames, bands)`, and bool `(b, frames)`, valid."""
        spectrum, frames = self.spectra[index](signal, lengths)
        size = spectrum.abs() if self.power == 1 else _power(spectrum).pow(self.power / 2)
        with torch.autocast(signal.device.type, enabled=False):
            return size @ self.get_buffer(f"bank_{index}"), prefix_mask(frames, spectrum.shape[2])


class MultiResolutionSTFT(SignalTerm):
    """Distances of magnitude spectrograms at several resolutions, summed, or as a mean with `scale`.

    The defaults are Parallel WaveGAN's (arXiv 1910.11480, section 2.2): spectral convergence, and the mean absolute
    difference of natural logarithms, as the mean over three resolutions.

    Args:
        ffts: Lengths of the transforms, in samples.
        hop_lengths: Samples between frames; quarters of `ffts` if None.
        windows: Lengths of the windows; `ffts` if None.
        convergence: Weight of the norm of the difference over the norm of the real spectrogram.
        logarithm: Weight of the mean absolute difference of logarithms.
        magnitude: Weight of the mean absolute difference of magnitudes.
        floor: Magnitudes below it count as it, in logarithms.
        quiet: Root mean square of noise; a sound with less energy counts as with as much in `convergence` (ours).
        scale: Factor on all; the mean over resolutions if None.

    Raises:
        UserError: There are not as many hops or windows as transforms.
    """

    def __init__(
        self,
        ffts: Sequence[int] = (1024, 2048, 512),
        hop_lengths: Sequence[int] | None = (120, 240, 50),
        windows: Sequence[int] | None = (600, 1200, 240),
        *,
        convergence: float = 1.0,
        logarithm: float = 1.0,
        magnitude: float = 0.0,
        floor: float = 1e-5,
        quiet: float = 0.01,
        scale: float | None = None,
    ) -> None:
        super().__init__()
        hop_lengths = [fft // 4 for fft in ffts] if hop_lengths is None else hop_lengths
        windows = ffts if windows is None else windows
        if not len(ffts) == len(hop_lengths) == len(windows):
            raise UserError(f"stft: {len(ffts)} transforms, {len(hop_lengths)} hops and {len(windows)} windows")
        sizes = zip(ffts, hop_lengths, windows, strict=True)
        self.spectra = nn.ModuleList([Spectrum(fft, hop, window) for fft, hop, window in sizes])
        self.convergence = convergence
        self.logarithm = logarithm
        self.magnitude = magnitude
        self.floor = floor
        self.quiet = quiet
        self.scale = 1 / len(ffts) if scale is None else scale

    def forward(self, fake: Tensor, real: Tensor, lengths: Tensor) -> Tensor:
        """Compare sounds `(b, c, t)` in [-1, 1] over their first `lengths` samples."""
        total = fake.new_zeros((), dtype=torch.float32)
        for spectrum in self.spectra:
            on_fake, frames = spectrum(fake, lengths)
            on_real, _ = spectrum(real, lengths)
            on_fake, on_real = on_fake.abs(), on_real.abs()
            valid = prefix_mask(frames, on_fake.shape[2])
            if self.convergence:
                assert isinstance(spectrum, Spectrum)
                quiet = spectrum.hann.square().sum() * self.quiet**2
                total = total + self.convergence * self._compute_convergence(on_fake, on_real, valid, quiet)
            if self.magnitude:
                total = total + self.magnitude * _frames((on_fake - on_real).abs(), valid)
            if self.logarithm:
                difference = on_fake.clamp(min=self.floor).log() - on_real.clamp(min=self.floor).log()
                total = total + self.logarithm * _frames(difference.abs(), valid)
        return self.scale * total

    def _compute_convergence(self, fake: Tensor, real: Tensor, valid: Tensor, quiet: Tensor) -> Tensor:
        mask = valid[:, None, :, None]
        error = ((fake - real) * mask).square().flatten(1).sum(1)
        energy = (real * mask).square().flatten(1).sum(1)
        # A pause would be divided by next to nothing and drown all else: it counts as noise that is just heard.
        least = mask.expand_as(real).flatten(1).sum(1) * quiet
        # A floor under the root, or its gradient at 0 would not be a number.
        return ((error + self.floor**2).sqrt() / torch.maximum(energy, least + self.floor).sqrt()).mean()


class SISDR(SignalTerm):
    """Scale-invariant ratio of signal to distortion, negative, in dB (arXiv 1811.02508, section 2.2).

    Both sides' means are taken away first. Silent samples count as 0.

    Args:
        floor: Share of the reconstruction's energy that is added to both sides of the ratio; the default bounds what
            can be gained or lost to 80 dB.
    """

    def __init__(self, floor: float = 1e-8) -> None:
        super().__init__()
        self.floor = floor

    def forward(self, fake: Tensor, real: Tensor, lengths: Tensor) -> Tensor:
        """Compare sounds `(b, c, t)` over their first `lengths` samples; channels are averaged."""
        valid = prefix_mask(lengths, fake.shape[2])[:, None]
        count = lengths.clamp(min=1)[:, None, None]
        fake, real = (torch.where(valid, signal.float(), 0.0) for signal in (fake, real))
        fake, real = (torch.where(valid, side - side.sum(2, keepdim=True) / count, 0.0) for side in (fake, real))
        energy, floor = real.square().sum(2, keepdim=True), 1e-10 * count
        target = (fake * real).sum(2, keepdim=True) / torch.maximum(energy, floor) * real
        # Shares of the reconstruction's energy: whatever is added to them leaves the ratio deaf to its scale.
        whole = torch.maximum(fake.square().sum(2, keepdim=True), floor)
        signal, noise = ((part.square() / whole).sum(2) for part in (target, fake - target))
        ratio = 10 * ((signal + self.floor).log10() - (noise + self.floor).log10())
        return -torch.where((energy > floor)[..., 0], ratio, 0.0).mean()


def _power(spectrum: Tensor) -> Tensor:
    """Square the magnitude; by parts, as the magnitude's own gradient is not needed at zero."""
    return spectrum.real.square() + spectrum.imag.square()


def _frames(values: Tensor, valid: Tensor) -> Tensor:
    """Average `(b, c, frames, bins)` over each sample's valid frames, then over the batch."""
    return masked_mean(values.mean(3).mean(1), valid)
