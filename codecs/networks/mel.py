"""A codec of sounds without a parameter: logarithmic mel bands, and back by their pseudo-inverse and Griffin-Lim.

dMel (arXiv 2407.15835, section 2.1): `bottlenecks.bins.UniformBins` rounds each band's logarithm to one of a few even
levels. All is real arithmetic with a fixed number of steps, which every export format knows.
"""

import math

import torch
from torch import Tensor
from torch.nn import functional

from varitok import UserError

from .contract import Decoder, Encoder
from .convolution import at_rate, zero_invalid
from .stft import STFT, Precise, mel_bank

__all__ = ["MelDecoder", "MelFeatures"]

FLOOR = 1e-9  # of magnitudes: a logarithm needs one


class MelFeatures(Precise, Encoder):
    """Reads sound into natural logarithms of mel magnitudes, `(b, 1, n * hop_length)` to `(b, n, bands)`.

    Args:
        sample_rate: Sample rate, in Hz.
        bands: Mel bands (Slaney's, of equal area).
        window: Length of the transform's periodic Hann window, in samples; even.
        hop_length: Samples of a frame.
        low: Lowest frequency, Hz.
        high: Highest, Hz; half of the sample rate if None.
        floor: Magnitudes below it count as it.
        causal: A frame ends with its hop, instead of being centered on it.
        direct: As an encoder, its frames are the bottleneck's latents, with no map between (dMel).

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
        floor: float = FLOOR,
        causal: bool = False,
        direct: bool = False,
    ) -> None:
        super().__init__(width=bands, downsample=(hop_length,), channels=1, causal=causal, direct=direct)
        self.rate = hop_length
        self.floor = floor
        self.stft = STFT(window, hop_length, causal)
        bank = mel_bank(sample_rate, bands, window, low, high)
        self.register_buffer("bank", bank.T.contiguous(), persistent=False)

    def forward(self, signal: Tensor, mask: Tensor | None = None, memory: list[Tensor] | None = None) -> Tensor:
        """Return the mel bands' logarithms."""
        return self.precisely(signal, mask, memory)

    def compute(self, x: Tensor, mask: Tensor | None, memory: list[Tensor] | None) -> Tensor:
        """Turn float32 signals into logarithms; `mask` is bool `(b, n)`."""
        real, imaginary = self.stft(zero_invalid(x, at_rate(mask, self.rate, 1)), memory).chunk(2, dim=1)
        magnitude = (real.square() + imaginary.square() + self.floor**2).sqrt()  # a root's slope at 0 is no number
        return torch.matmul(self.bank, magnitude).clamp(min=self.floor).log().transpose(1, 2)


class MelDecoder(Precise, Decoder):
    """Makes sound from rounded mel bands, by their pseudo-inverse and fast Griffin-Lim (WASPAA 2013, algorithm 2).

    Phases begin as those of a chirp, the same for all sounds, and are then made those of a sound, step by step. These
    steps amplify rounding errors by about 10^6, so they run in float64, and by matrices: in float32 signals
    differ by 8 % of the peak from one batch size, or export format, to the next, and ONNX Runtime has no float64
    convolution. The first arguments are those of `MelFeatures`.

    Args:
        sample_rate: Sample rate, in Hz.
        bands: Mel bands.
        window: Length of the transform's window, in samples.
        hop_length: Samples of a latent.
        low: Lowest frequency, Hz.
        high: Highest, Hz; half of the sample rate if None.
        iterations: Iterations of Griffin-Lim.
        momentum: How far each goes beyond the last's difference, in [0, 1); 0 is plain Griffin-Lim.

    Raises:
        UserError: Sizes that don't fit each other.
    """

    inverse: Tensor
    start: Tensor
    square: Tensor
    back: Tensor
    taps: Tensor

    def __init__(
        self,
        *,
        sample_rate: int,
        bands: int = 80,
        window: int = 800,
        hop_length: int = 200,
        low: float = 0.0,
        high: float | None = None,
        iterations: int = 16,
        momentum: float = 0.99,
    ) -> None:
        if window % hop_length:
            raise UserError(f"mel: window={window} should be a multiple of hop_length={hop_length}")
        if iterations < 0 or not 0 <= momentum < 1:
            raise UserError(f"mel: iterations={iterations} and momentum={momentum}: 0 or more, and in [0, 1)")
        super().__init__(width=bands, downsample=(hop_length,), channels=1, direct=True)
        self.rate = hop_length
        self.iterations = iterations
        self.momentum = momentum
        self.stft = STFT(window, hop_length)
        square = torch.hann_window(window, dtype=torch.float64).square()
        self.register_buffer("square", square.float(), persistent=False)
        bank = mel_bank(sample_rate, bands, window, low, high).T.contiguous()
        self.register_buffer("inverse", torch.linalg.pinv(bank.double()).float().T.contiguous(), persistent=False)
        # Back, all bins but the first and last stand for their mirror too.
        back = torch.full((window // 2 + 1,), 2.0 / window)
        back[0] = back[-1] = 1.0 / window
        self.register_buffer("back", back.repeat(2), persistent=False)
        # Bins turn on from frame to frame by their own frequency; the circle has `window / hop_length` places.
        self.turns = window // hop_length
        self.register_buffer("taps", torch.arange(window), persistent=False)
        bins = torch.arange(window // 2 + 1, dtype=torch.float64)
        turns = torch.arange(self.turns, dtype=torch.float64)[:, None]
        angles = 2 * math.pi * (bins * turns / self.turns) + math.pi * bins.square() / len(bins)
        self.register_buffer("start", torch.cat([angles.cos(), angles.sin()], 1).float(), persistent=False)

    def forward(
        self, latents: Tensor, mask: Tensor | None, grid: list[int], memory: list[Tensor] | None = None
    ) -> Tensor:
        """Return the sounds whose mel bands these are."""
        return self.precisely(latents, mask, memory)

    def compute(self, x: Tensor, mask: Tensor | None, memory: list[Tensor] | None) -> Tensor:
        """Turn latents `(b, n, bands)` into float32 signals `(b, 1, n * hop_length)`; `mask` is bool `(b, n)`."""
        # To thousandths, far from any level's edge: the last bit of a float, which may be each export's own, is noise.
        mel = ((x.double() * 1000).round() / 1000).exp()
        b, n = x.shape[0], x.shape[1]
        magnitude = torch.matmul(mel, self.inverse.double()).clamp(min=0.0).unsqueeze(2)
        there = torch.ones_like(mel[:, :, :1]) if mask is None else mask.unsqueeze(2).double()
        magnitude = torch.where(there.unsqueeze(3) > 0.0, magnitude, torch.zeros_like(magnitude))
        basis = self.stft.basis[:, 0].double()
        back = basis * self.back.double().unsqueeze(1)
        # What isn't valid of a frame's sound is cut, or it would come back in the next round's frames.
        weight = there.expand(-1, -1, self.rate).flatten(1)
        weight = weight / self._overlap_add(there * self.square.double()).clamp(min=1e-6)
        samples = torch.arange(n, device=x.device).unsqueeze(1) * self.rate + self.taps
        turns = torch.arange(n, device=x.device) % self.turns
        phase = self.start.index_select(0, turns).double().reshape(1, n, 2, -1)
        before = torch.zeros_like(magnitude)
        for _ in range(self.iterations):
            signal = self._overlap_add(torch.matmul((magnitude * phase).flatten(2), back)) * weight
            padded = functional.pad(signal, [self.stft.left, self.stft.right])
            frames = padded.index_select(1, samples.flatten()).reshape(b, n, -1)
            found = torch.matmul(frames, basis.T).reshape(b, n, 2, -1)
            ahead = found - self.momentum / (1 + self.momentum) * before
            before = found
            phase = ahead / (ahead.square().sum(2, keepdim=True) + 1e-24).sqrt()
        signal = self._overlap_add(torch.matmul((magnitude * phase).flatten(2), back)) * weight
        return signal.float().unsqueeze(1)

    def _overlap_add(self, frames: Tensor) -> Tensor:
        """Overlap-add frames `(b, n, window)` to `(b, n * hop_length)`.

        Rows of a turn's hops, one longer than they are read again, are each one hop after the row before.
        """
        b, n = frames.shape[0], frames.shape[1]
        rows = functional.pad(frames.reshape(b, n, self.turns, self.rate).transpose(1, 2), [0, 0, 0, self.turns])
        length = (n + self.turns - 1) * self.rate
        added = rows.flatten(1).narrow(1, 0, self.turns * length).reshape(b, self.turns, length).sum(1)
        return added.narrow(1, self.stft.left, n * self.rate)
