"""Parameter-free audio codec: log-mel spectrograms, inverted by the filterbank's pseudo-inverse and Griffin-Lim.

In dMel (arXiv 2407.15835, section 2.1), `bottlenecks.bins.UniformBins` rounds each band's logarithm to evenly spaced
levels. All arithmetic is real, with a fixed number of iterations, so that every export format supports it.
"""

import math
from typing import Annotated, Literal

import torch
from torch import Tensor
from torch.nn import functional

from varitok import UserError

from .contract import Decoder, Encoder, Precise
from .layers.convolution import at_rate, zero_invalid
from .layers.stft import STFT, mel_bank

__all__ = ["MelDecoder", "MelFeatures"]

FLOOR = 1e-9  # smallest magnitude, for the logarithm


class MelFeatures(Precise, Encoder):
    """Log-mel spectrogram of audio, `(b, 1, n * hop_length)` to `(b, n, bands)`: `log(max(mel(|STFT(x)|), floor))`.

    Args:
        sample_rate: Sample rate, in Hz.
        bands: Number of mel bands.
        window: Length of the periodic Hann window, in samples; even.
        hop_length: Hop length, in samples.
        low: Lowest frequency, in Hz.
        high: Highest frequency, in Hz; half of the sample rate if None.
        floor: Smallest magnitude.
        causal: Whether a frame ends with its hop, instead of being centered on it.
        formula: Mel scale and area of the bands; see `mel_bank`.
        at_start: Whether a frame is centered on the start of its hop (torchaudio, Vocos); see `STFT`.
        direct: Whether the bottleneck quantizes the log-mel frames directly, without a linear projection (dMel).

    Raises:
        UserError: The window is odd, or shorter than the hop.
    """

    bank: Tensor

    def __init__(
        self,
        *,
        sample_rate: int,
        bands: int = 80,
        window: int = 800,
        hop_length: int = 200,
        low: float = 0.0,
        high: float | None = None,
        floor: Annotated[float, "(0, inf)"] = FLOOR,
        causal: bool = False,
        formula: Literal["slaney", "htk"] = "slaney",
        at_start: bool = False,
        direct: bool = False,
    ) -> None:
        super().__init__(width=bands, downsample=(hop_length,), channels=1, causal=causal, direct=direct)
        self.rate = hop_length
        self.floor = floor
        # The gradient of sqrt is infinite at 0. Not added: torch's ONNX exporter drops an addition of so little.
        self.least = min(floor, FLOOR) ** 2
        self.stft = STFT(window, hop_length, causal, at_start)
        self.register_buffer("bank", mel_bank(sample_rate, bands, window, low, high, formula), persistent=False)

    def forward(self, signal: Tensor, mask: Tensor | None = None, memory: list[Tensor] | None = None) -> Tensor:
        """Return the log-mel spectrogram `(b, n, bands)` of audio."""
        return self.precisely(signal, mask, memory)

    def compute(self, x: Tensor, mask: Tensor | None, memory: list[Tensor] | None) -> Tensor:
        """Compute the log-mel spectrogram of float32 audio `(b, 1, t)`; `mask` is bool `(b, n)`."""
        lengths: Tensor | None = None
        if mask is not None:
            lengths = self.rate * mask.sum(1, keepdim=True)
        real, imaginary = self.stft(zero_invalid(x, at_rate(mask, self.rate, 1)), memory, lengths)
        magnitude = (real.square() + imaginary.square()).clamp(min=self.least).sqrt()
        return torch.matmul(magnitude, self.bank).clamp(min=self.floor).log()


class MelDecoder(Precise, Decoder):
    """Decoder of log-mel spectrograms: filterbank pseudo-inverse and fast Griffin-Lim (WASPAA 2013, algorithm 2).

    The initial phases are those of a fixed chirp. The iterations amplify rounding errors by about 10^6: in float32,
    outputs of different batch sizes or export formats differ by 8 % of the peak. So they run in float64, like `STFT`.
    The other arguments are those of `MelFeatures`.

    Args:
        iterations: Iterations of Griffin-Lim.
        momentum: Factor a in [0, 1): the next phase is that of `c_i + a (c_i - c_(i-1))`, where c_i is the spectrum of
            iteration i; 0 for plain Griffin-Lim.

    Raises:
        UserError: Inconsistent sizes.
    """

    inverse: Tensor
    start: Tensor
    square: Tensor
    back: Tensor

    def __init__(
        self,
        *,
        sample_rate: int,
        bands: int = 80,
        window: int = 800,
        hop_length: int = 200,
        low: float = 0.0,
        high: float | None = None,
        iterations: Annotated[int, "[0, 10000]"] = 16,
        momentum: Annotated[float, "[0, 1)"] = 0.99,
    ) -> None:
        if window % hop_length:
            raise UserError(f"mel: window={window} should be a multiple of hop_length={hop_length}")
        super().__init__(width=bands, downsample=(hop_length,), channels=1, direct=True)
        self.rate = hop_length
        self.iterations = iterations
        self.momentum = momentum
        self.stft = STFT(window, hop_length)
        square = torch.hann_window(window, dtype=torch.float64).square()
        self.register_buffer("square", square.float(), persistent=False)
        bank = mel_bank(sample_rate, bands, window, low, high).T.contiguous()
        self.register_buffer("inverse", torch.linalg.pinv(bank.double()).float().T.contiguous(), persistent=False)
        # Inverse real FFT: each bin but the first and the last also represents its conjugate.
        back = torch.full((window // 2 + 1,), 2.0 / window)
        back[0] = back[-1] = 1.0 / window
        self.register_buffer("back", back.repeat(2), persistent=False)
        # A bin's phase advances by its frequency per hop; it repeats after `window / hop_length` frames.
        self.turns = window // hop_length
        bins = torch.arange(window // 2 + 1, dtype=torch.float64)
        turns = torch.arange(self.turns, dtype=torch.float64)[:, None]
        angles = 2 * math.pi * (bins * turns / self.turns) + math.pi * bins.square() / len(bins)
        self.register_buffer("start", torch.cat([angles.cos(), angles.sin()], 1).float(), persistent=False)

    def forward(
        self, latents: Tensor, mask: Tensor | None, grid: list[int], memory: list[Tensor] | None = None
    ) -> Tensor:
        """Decode log-mel spectrograms `(b, n, bands)` into audio `(b, 1, n * hop_length)`."""
        return self.precisely(latents, mask, memory)

    def compute(self, x: Tensor, mask: Tensor | None, memory: list[Tensor] | None) -> Tensor:
        """Compute float32 audio `(b, 1, n * hop_length)` from latents `(b, n, bands)`; `mask` is bool `(b, n)`."""
        # Rounded to 1/1000, far from the edge of any level: the last bits may differ between export formats.
        mel = ((x.double() * 1000).round() / 1000).exp()
        b, n = x.shape[0], x.shape[1]
        magnitude = torch.matmul(mel, self.inverse.double()).clamp(min=0.0).unsqueeze(2)
        there = torch.ones_like(mel[:, :, :1]) if mask is None else mask.unsqueeze(2).double()
        magnitude = torch.where(there.unsqueeze(3) > 0.0, magnitude, torch.zeros_like(magnitude))
        back = self.stft.basis.double() * self.back.double().unsqueeze(1)
        # Overlap-add normalization, 0 at invalid samples, which would leak into the next iteration's frames.
        weight = there.expand(-1, -1, self.rate).flatten(1)
        weight = weight / self._overlap_add(there * self.square.double()).clamp(min=1e-6)
        samples = self.stft.samples(n)
        turns = torch.arange(n, device=x.device) % self.turns
        phase = self.start.index_select(0, turns).double().reshape(1, n, 2, -1)  # (1, n, cos and sin, bins)
        before = torch.zeros_like(magnitude)
        for _ in range(self.iterations):
            signal = self._overlap_add(torch.matmul((magnitude * phase).flatten(2), back)) * weight
            padded = functional.pad(signal, [self.stft.left, self.stft.right])
            found = self.stft.transform(padded, samples).reshape(b, n, 2, -1)
            ahead = found - self.momentum / (1 + self.momentum) * before
            before = found
            phase = ahead / ahead.square().sum(2, keepdim=True).clamp(min=1e-24).sqrt()
        signal = self._overlap_add(torch.matmul((magnitude * phase).flatten(2), back)) * weight
        return signal.float().unsqueeze(1)

    def _overlap_add(self, frames: Tensor) -> Tensor:
        """Overlap-add frames `(b, n, window)` to `(b, n * hop_length)`.

        Row r of `rows` is hop r of every frame, padded to n + turns hops; `turns` is `window / hop_length`. Reading it
        in rows of n + turns - 1 hops instead delays row r by r hops.
        """
        b, n = frames.shape[0], frames.shape[1]
        # (b, n, window) -> (b, turns, n + turns, hop_length)
        rows = functional.pad(frames.reshape(b, n, self.turns, self.rate).transpose(1, 2), [0, 0, 0, self.turns])
        length = (n + self.turns - 1) * self.rate
        added = rows.flatten(1).narrow(1, 0, self.turns * length).reshape(b, self.turns, length).sum(1)
        return added.narrow(1, self.stft.left, n * self.rate)
