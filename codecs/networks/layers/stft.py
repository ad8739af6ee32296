"""Short-time Fourier transforms for losses, discriminators and networks, and mel filterbanks.

Losses and discriminators use `Spectrum`, which calls torch.stft. Networks use real arithmetic, which every export
format supports: `STFT` is a product with the windowed Fourier basis, `ISTFT` a transposed convolution.
"""

import math
import warnings

import torch
from torch import Tensor, nn
from torch.nn import functional
from torchaudio.functional import melscale_fbanks

from varitok import UserError

from ...masking import prefix_mask
from .convolution import at_rate, prepend_context, recall, zero_invalid
from .edges import pad_ends

__all__ = ["ISTFT", "STFT", "Spectrum", "mel_bank"]


class Spectrum(nn.Module):
    """Short-time Fourier transform with a periodic Hann window, in float32 even under autocast.

    Args:
        fft: FFT size, in samples.
        hop_length: Hop length, in samples; a quarter of `fft` if None.
        window: Window length, in samples, centered in the FFT frame; `fft` if None.
        normalized: Whether to divide spectra by `sqrt(sum(window^2))`.

    Raises:
        UserError: The hop is not from 1 to `fft`, or the window is longer than `fft`.
    """

    hann: Tensor

    def __init__(
        self, fft: int, hop_length: int | None = None, window: int | None = None, *, normalized: bool = False
    ) -> None:
        super().__init__()
        self.fft = fft
        self.hop_length = fft // 4 if hop_length is None else hop_length
        window = fft if window is None else window
        if not 1 <= self.hop_length <= fft or not 1 <= window <= fft:
            raise UserError(f"spectrum: hop_length={self.hop_length} and window={window} should be from 1 to fft={fft}")
        hann = torch.hann_window(window)
        if normalized:
            # The transform is linear, so the window is scaled instead.
            hann = hann / hann.square().sum().sqrt()
        self.register_buffer("hann", hann, persistent=False)

    def forward(self, signal: Tensor, lengths: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        """Transform audio `(b, c, t)` with `lengths` `(b,)` valid samples; None for all.

        Returns:
            complex64 `(b, c, ceil(t / hop_length), fft // 2 + 1)`, and the number of valid frames `(b,)`, None for all.
        """
        signal = signal.float()
        b, c, t = signal.shape
        frames = None
        if lengths is not None:
            signal = torch.where(prefix_mask(lengths, t)[:, None], signal, 0.0)
            frames = (lengths + self.hop_length - 1).div(self.hop_length, rounding_mode="floor")
        with torch.autocast(signal.device.type, enabled=False):
            spectrum = torch.stft(
                signal.reshape(b * c, t),
                self.fft,
                self.hop_length,
                window=self.hann,
                win_length=len(self.hann),
                center=True,
                pad_mode="constant",
                return_complex=True,
            )
        # Drop frames centered after the end.
        spectrum = spectrum[..., : -(-t // self.hop_length)]
        return spectrum.view(b, c, *spectrum.shape[1:]).transpose(2, 3), frames  # (b * c, f, n) -> (b, c, n, f)


def _fourier(window: int) -> Tensor:
    """Return the real Fourier basis, cosines then negative sines of each bin: float64 `(window + 2, window)`."""
    bins = torch.arange(window // 2 + 1, dtype=torch.float64)[:, None]
    angles = 2 * math.pi / window * torch.remainder(bins * torch.arange(window, dtype=torch.float64), window)
    return torch.cat([angles.cos(), -angles.sin()])


class STFT(nn.Module):
    """Short-time Fourier transform with a periodic Hann window, in real arithmetic: n hops to n frames.

    Frame i is centered on hop i, as in `ISTFT`; if causal, it ends with hop i. Sums are in float64: bins far below the
    peak would be rounding errors, which differ between export formats, and whose logarithms differ by any amount. They
    are a matrix product, since ONNX Runtime has no float64 convolution.

    Args:
        window: Window length and FFT size, in samples; even.
        hop_length: Hop length, in samples.
        causal: Whether frame i depends only on samples up to the end of hop i.
        at_start: Whether frame i is centered on the start of hop i and the signal is reflected at its ends, as in
            torch.stft, whose last frame is left out.

    Raises:
        UserError: The window is odd, or shorter than the hop, or `at_start` and shorter than two hops or causal.
    """

    basis: Tensor
    taps: Tensor

    def __init__(self, window: int, hop_length: int, causal: bool = False, at_start: bool = False) -> None:
        super().__init__()
        if window % 2 or window < hop_length:
            raise UserError(f"stft: window={window} should be even, and at least hop_length={hop_length}")
        self.hop_length = hop_length
        self.slot = 0
        self.obstacle = "" if causal else "a mel frame isn't causal"
        self.fill = "reflect" if at_start else "zeros"
        self.left = window - hop_length if causal else (window - hop_length) // 2
        if at_start:
            self.left = _before_start(window, hop_length, causal)
        self.right = window - hop_length - self.left
        basis = _fourier(window) * torch.hann_window(window, dtype=torch.float64)
        self.register_buffer("basis", basis.float(), persistent=False)
        self.register_buffer("taps", torch.arange(window), persistent=False)

    def forward(
        self, signal: Tensor, memory: list[Tensor] | None = None, lengths: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Transform audio `(b, 1, n * hop_length)` into real and imaginary parts, `(b, n, window / 2 + 1)`.

        `lengths`, int64 `(b, 1)`, are valid samples, at whose end a signal is reflected; None if all are valid.
        """
        if memory is not None and self.left > 0:
            padded = prepend_context(signal, memory, self.slot, self.left, 2)
        elif self.fill == "reflect":
            if lengths is None:  # counted by a sum, so that an exported graph doesn't reflect by the example's length
                lengths = torch.ones_like(signal[:1, 0], dtype=torch.int64).sum(1, keepdim=True)
            padded = pad_ends(signal, self.left, self.right, self.fill, lengths)
        else:
            padded = functional.pad(signal, [self.left, self.right])
        spectrum = self.transform(padded.squeeze(1).double(), self.samples(signal.shape[2] // self.hop_length))
        real, imaginary = spectrum.to(signal.dtype).chunk(2, dim=2)
        return real, imaginary

    def samples(self, frames: int) -> Tensor:
        """Return the index of each frame's samples in a padded signal, `(frames * window)`."""
        starts = torch.arange(frames, device=self.taps.device).unsqueeze(1) * self.hop_length
        return (starts + self.taps).flatten()

    def transform(self, padded: Tensor, samples: Tensor) -> Tensor:
        """Transform the frames of a padded signal `(b, t)`, float64, into `(b, n, window + 2)`."""
        window = self.taps.shape[0]
        frames = padded.index_select(1, samples).reshape(padded.shape[0], -1, window)
        return torch.matmul(frames, self.basis.double().T)


def _before_start(window: int, hop_length: int, causal: bool) -> int:
    """Return the samples of a frame before the start of its hop, on which it is centered."""
    if causal:
        raise UserError("stft: at_start=true looks ahead, so causal=true can't have it")
    if window < 2 * hop_length:
        raise UserError(f"stft: window={window} should be 2 or more times hop_length={hop_length} for at_start=true")
    return window // 2


class ISTFT(nn.Module):
    """Inverse short-time Fourier transform with a periodic Hann window, in real arithmetic: n frames to n hops.

    Windowed frames are overlap-added and divided by the sum of the squared windows, as in torch.istft. Unlike there,
    frame i is centered on hop i (Vocos' `same` padding).

    Args:
        window: Window length and FFT size, in samples; even.
        hop_length: Hop length, in samples; divides `window`.
        causal: Whether frame i begins with hop i, so that sample i depends on frames up to `i // hop_length` only. The
            signal before the first frame is silence.
        at_start: Whether frame i is centered on the start of hop i, as in torch.istft. That leaves out the last hop,
            which is here what the last frames have of it.

    Raises:
        UserError: The window is odd, not a multiple of the hop, or below twice the hop; or `at_start` and causal.
    """

    basis: Tensor
    square: Tensor
    steady: Tensor

    def __init__(self, window: int, hop_length: int, causal: bool = False, at_start: bool = False) -> None:
        super().__init__()
        if window % hop_length or window % 2 or window < 2 * hop_length:
            raise UserError(f"istft: window={window} should be even, and 2 or more times hop_length={hop_length}")
        self.window = window
        self.hop_length = hop_length
        self.causal = causal
        self.left = _before_start(window, hop_length, causal) if at_start else (window - hop_length) // 2
        self.slot = 0
        self.obstacle = "" if causal else "its Fourier transform isn't causal"
        hann = torch.hann_window(window, dtype=torch.float64)
        # Inverse real FFT: each bin but the first and the last also represents its conjugate.
        twice = torch.full((window // 2 + 1, 1), 2.0, dtype=torch.float64)
        twice[0] = twice[-1] = 1.0
        basis = _fourier(window) * twice.repeat(2, 1) / window * hann
        square = hann.square()
        self.register_buffer("basis", basis.float()[:, None], persistent=False)
        self.register_buffer("square", square.float()[None, None], persistent=False)
        self.register_buffer("steady", square.view(-1, hop_length).sum(0).float(), persistent=False)

    def forward(
        self, real: Tensor, imaginary: Tensor, mask: Tensor | None = None, memory: list[Tensor] | None = None
    ) -> Tensor:
        """Invert spectra `(b, window / 2 + 1, n)` to audio `(b, 1, n * hop_length)`; `mask` is bool `(b, 1, n)`."""
        b, n = real.shape[0], real.shape[2]
        spectrum = zero_invalid(torch.cat([real, imaginary], dim=1), mask)
        added = functional.conv_transpose1d(spectrum, self.basis.to(spectrum.dtype), stride=self.hop_length)
        if memory is not None:
            tail = recall(memory, self.slot, added, [b, 1, self.window - self.hop_length])
            added = added + functional.pad(tail, [0, added.shape[2] - tail.shape[2]])
            memory[self.slot] = added[:, :, n * self.hop_length :]
        if self.causal:
            signal = (added[:, 0, : n * self.hop_length].reshape(b, n, self.hop_length) / self.steady).reshape(
                b, 1, n * self.hop_length
            )
        else:
            there = torch.ones_like(real[:, :1]) if mask is None else mask.to(real.dtype)
            weight = functional.conv_transpose1d(there, self.square.to(there.dtype), stride=self.hop_length)
            signal = (added / weight.clamp(min=1e-6)).narrow(2, self.left, n * self.hop_length)
        return zero_invalid(signal, at_rate(None if mask is None else mask[:, 0], self.hop_length, 1))


def mel_bank(
    sample_rate: int, bands: int, window: int, low: float, high: float | None, formula: str = "slaney"
) -> Tensor:
    """Return a mel filterbank, `(window / 2 + 1, bands)`.

    Args:
        sample_rate: Sample rate, in Hz.
        bands: Number of mel bands.
        window: FFT size, in samples.
        low: Lowest frequency, in Hz.
        high: Highest frequency, in Hz; half of the sample rate if None.
        formula: Mel scale and normalization: "slaney" has bands of equal area, "htk" of equal height.

    Raises:
        UserError: The frequencies don't rise, or exceed half of the sample rate.
    """
    top = sample_rate / 2 if high is None else high
    if not low < top <= sample_rate / 2:
        raise UserError(f"mel: low={low:g} and high={top:g} should rise to at most {sample_rate / 2:g} Hz")
    with warnings.catch_warnings():
        # With short windows, the lowest bands contain no bin; their weights are 0.
        warnings.filterwarnings("ignore", message="At least one mel filterbank has all zero values")
        norm = "slaney" if formula == "slaney" else None
        bank: Tensor = melscale_fbanks(window // 2 + 1, low, top, bands, sample_rate, norm, formula)
    return bank
