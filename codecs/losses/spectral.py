"""Spectral losses of waveforms, and the signal-to-distortion ratio.

Spectrogram frames are centered, with zero padding at both ends. Samples after a waveform's length are zeroed first,
and a frame is valid if its center is before the length, so the loss doesn't depend on the batch's padding. (Published
code uses reflection padding, with which the last frames would depend on it.)
"""

from collections.abc import Sequence
from typing import Annotated, Literal

import torch
from torch import Tensor, nn

from varitok import UserError

from ..masking import masked_mean, prefix_mask
from ..networks.layers.stft import Spectrum, mel_bank
from .contract import SignalTerm

__all__ = ["SISDR", "MultiResolutionSTFT", "MultiScaleMel"]


class MultiResolutionSTFT(SignalTerm):
    """Multi-resolution STFT loss.

        loss = scale * sum_resolutions (convergence * mean_b |S(y) - S(x)|_2 / |S(x)|_2
                                        + magnitude * mean |S(y) - S(x)| + logarithm * mean |ln S(y) - ln S(x)|)

    The defaults are Parallel WaveGAN's (arXiv 1910.11480, section 2.2): spectral convergence and log magnitudes,
    averaged over three resolutions.

    Args:
        ffts: FFT sizes, in samples.
        hop_lengths: Hop lengths, in samples; a quarter of `ffts` if None.
        windows: Window lengths, in samples; equal to `ffts` if None.
        convergence: Weight of the spectral convergence.
        logarithm: Weight of the mean absolute difference of natural logarithms.
        magnitude: Weight of the mean absolute difference of magnitudes.
        floor: Minimum to which magnitudes are clamped before the logarithm.
        quiet: RMS of white noise whose energy bounds the denominator of the spectral convergence from below (ours).
        scale: Factor of the loss; None for the mean over resolutions.
        normalized: Whether spectra are divided by the L2 norm of the window.

    Raises:
        UserError: `ffts`, `hop_lengths` and `windows` have different lengths.
    """

    log = staticmethod(torch.log)
    squared = False

    def __init__(
        self,
        ffts: Sequence[int] = (1024, 2048, 512),
        hop_lengths: Sequence[int] | None = (120, 240, 50),
        windows: Sequence[int] | None = (600, 1200, 240),
        *,
        convergence: float = 1.0,
        logarithm: float = 1.0,
        magnitude: float = 0.0,
        floor: Annotated[float, "(0, inf)"] = 1e-5,
        quiet: float = 0.01,
        scale: float | None = None,
        normalized: bool = False,
    ) -> None:
        super().__init__()
        hop_lengths = [fft // 4 for fft in ffts] if hop_lengths is None else hop_lengths
        windows = ffts if windows is None else windows
        if not len(ffts) == len(hop_lengths) == len(windows):
            raise UserError(f"stft: {len(ffts)} transforms, {len(hop_lengths)} hops and {len(windows)} windows")
        sizes = zip(ffts, hop_lengths, windows, strict=True)
        self.spectra = nn.ModuleList([Spectrum(*size, normalized=normalized) for size in sizes])
        self.convergence = convergence
        self.logarithm = logarithm
        self.magnitude = magnitude
        self.floor = floor
        self.quiet = quiet
        self.scale = 1 / len(ffts) if scale is None else scale

    def forward(self, fake: Tensor, real: Tensor, lengths: Tensor) -> Tensor:
        """Compare waveforms `(b, c, t)` in [-1, 1] over their first `lengths` samples."""
        total = fake.new_zeros((), dtype=torch.float32)
        for index in range(len(self.spectra)):
            on_fake, valid = self.spectrogram(fake, lengths, index)
            on_real, _ = self.spectrogram(real, lengths, index)
            if self.convergence:
                quiet = self.spectra[index].get_buffer("hann").square().sum() * self.quiet**2
                total = total + self.convergence * self._compute_convergence(on_fake, on_real, valid, quiet)
            if self.magnitude:
                total = total + self.magnitude * _frames((on_fake - on_real).abs(), valid)
            if self.logarithm:
                difference = self.log(on_fake.clamp(min=self.floor)) - self.log(on_real.clamp(min=self.floor))
                error = difference.square() if self.squared else difference.abs()
                total = total + self.logarithm * _frames(error, valid)
        return self.scale * total

    def spectrogram(self, signal: Tensor, lengths: Tensor, index: int = 0) -> tuple[Tensor, Tensor]:
        """Return the spectrogram `(b, c, frames, bins)` of resolution `index`, and the mask of valid frames."""
        spectrum, frames = self.spectra[index](signal, lengths)
        return spectrum.abs(), prefix_mask(frames, spectrum.shape[2])

    def _compute_convergence(self, fake: Tensor, real: Tensor, valid: Tensor, quiet: Tensor) -> Tensor:
        mask = valid[:, None, :, None]  # (b, frames) -> (b, 1, frames, 1)
        error = ((fake - real) * mask).square().flatten(1).sum(1)
        energy = (real * mask).square().flatten(1).sum(1)
        # Near silence the ratio would explode and dominate the batch: the energy is at least that of quiet noise.
        least = mask.expand_as(real).flatten(1).sum(1) * quiet
        # The constant keeps the square root's gradient finite at 0.
        return ((error + self.floor**2).sqrt() / torch.maximum(energy, least + self.floor).sqrt()).mean()


class MultiScaleMel(MultiResolutionSTFT):
    """Multi-scale mel spectrogram loss: the STFT loss of mel bands, without spectral convergence.

        loss = scale * sum_windows (magnitude * mean |M(y) - M(x)| + logarithm * mean |log10 M(y) - log10 M(x)|)

    The defaults are DAC's (arXiv 2306.06546, section 3.5): log magnitudes at seven windows. EnCodec's (arXiv
    2210.13438, equation 2, and audiocraft's configuration): 64 bands of power, HTK mels without normalization, windows
    of 64 to 1024, both distances, log distance squared, and `scale=0.1` for the mean over distances and windows.
    Vocos' (arXiv 2306.00814, section 3.4): one window of 1024 and 100 bands.

    Args:
        sample_rate: Sample rate, in Hz.
        windows: Window lengths, in samples; the hop length is a quarter of each.
        bands: Number of mel bands, of each window or of all.
        low: Lowest frequency, in Hz.
        high: Highest frequency, in Hz; half the sample rate if None.
        formula: Mel filters, "slaney" (equal area) or "htk" (equal height).
        power: Exponent of the magnitudes; 2 for power spectra.
        normalized: Whether spectra are divided by the L2 norm of the window.
        floor: Minimum to which magnitudes are clamped before the logarithm.
        magnitude: Weight of the mean absolute difference of magnitudes (or power).
        logarithm: Weight of the difference of their log10.
        squared: Whether the difference of logarithms is squared.
        scale: Factor of the loss; 1 for the sum over windows.

    Raises:
        UserError: `bands` and `windows` have different lengths.
    """

    log = staticmethod(torch.log10)

    def __init__(
        self,
        sample_rate: int,
        windows: Sequence[int] = (32, 64, 128, 256, 512, 1024, 2048),
        bands: int | Sequence[int] = (5, 10, 20, 40, 80, 160, 320),
        *,
        low: float = 0.0,
        high: float | None = None,
        formula: Literal["slaney", "htk"] = "slaney",
        power: Annotated[float, "(0, inf)"] = 1.0,
        normalized: bool = False,
        floor: Annotated[float, "(0, inf)"] = 1e-5,
        magnitude: float = 0.0,
        logarithm: float = 1.0,
        squared: bool = False,
        scale: float = 1.0,
    ) -> None:
        numbers = [bands] * len(windows) if isinstance(bands, int) else list(bands)
        if len(numbers) != len(windows):
            raise UserError(f"mel.bands: {len(numbers)} numbers for {len(windows)} windows")
        super().__init__(
            windows, None, None, convergence=0.0, logarithm=logarithm, magnitude=magnitude, floor=floor, scale=scale,
            normalized=normalized,
        )  # fmt: skip
        for index, (window, number) in enumerate(zip(windows, numbers, strict=True)):
            bank = mel_bank(sample_rate, number, window, low, high, formula)
            self.register_buffer(f"bank_{index}", bank, persistent=False)
        self.power = power
        self.squared = squared

    def spectrogram(self, signal: Tensor, lengths: Tensor, index: int = 0) -> tuple[Tensor, Tensor]:
        """Return the mel spectrogram `(b, c, frames, bands)` of window `index`, and the mask `(b, frames)`."""
        spectrum, frames = self.spectra[index](signal, lengths)
        size = spectrum.abs() if self.power == 1 else _power(spectrum).pow(self.power / 2)
        with torch.autocast(signal.device.type, enabled=False):
            return size @ self.get_buffer(f"bank_{index}"), prefix_mask(frames, spectrum.shape[2])


class SISDR(SignalTerm):
    """Negative scale-invariant signal-to-distortion ratio, in dB (SI-SDR, arXiv 1811.02508, section 2.2).

        loss = -10 log10(|a x|^2 / |y - a x|^2),   a = <y, x> / |x|^2

    x and y are made zero-mean first. The loss of a silent signal is 0.

    Args:
        floor: Share of the reconstruction's energy that is added to numerator and denominator; the default bounds the
            loss to [-80, 80] dB.
    """

    def __init__(self, floor: Annotated[float, "(0, inf)"] = 1e-8) -> None:
        super().__init__()
        self.floor = floor

    def forward(self, fake: Tensor, real: Tensor, lengths: Tensor) -> Tensor:
        """Compare waveforms `(b, c, t)` over their first `lengths` samples; channels are averaged."""
        valid = prefix_mask(lengths, fake.shape[2])[:, None]
        count = lengths.clamp(min=1)[:, None, None]
        fake, real = (torch.where(valid, signal.float(), 0.0) for signal in (fake, real))
        fake, real = (torch.where(valid, side - side.sum(2, keepdim=True) / count, 0.0) for side in (fake, real))
        energy, floor = real.square().sum(2, keepdim=True), 1e-10 * count
        target = (fake * real).sum(2, keepdim=True) / torch.maximum(energy, floor) * real
        # Relative to the reconstruction's energy, so that adding the floor keeps the ratio scale-invariant.
        whole = torch.maximum(fake.square().sum(2, keepdim=True), floor)
        signal, noise = ((part.square() / whole).sum(2) for part in (target, fake - target))
        ratio = 10 * ((signal + self.floor).log10() - (noise + self.floor).log10())
        return -torch.where((energy > floor)[..., 0], ratio, 0.0).mean()


def _power(spectrum: Tensor) -> Tensor:
    """Compute the power of a complex spectrum, without the square root of its magnitude."""
    return spectrum.real.square() + spectrum.imag.square()


def _frames(values: Tensor, valid: Tensor) -> Tensor:
    """Average `(b, c, frames, bins)` over each sample's valid frames, then over the batch."""
    return masked_mean(values.mean(3).mean(1), valid)
