"""A decoder at the rate of the latents: ConvNeXt blocks, then an inverse short-time Fourier transform.

Vocos (arXiv 2306.00814, section 3); WavTokenizer (arXiv 2408.16532, section 3.3) puts residual blocks around one
attention before it. The transform is a transposed convolution with the windowed Fourier basis: real arithmetic, which
every export format knows.

Chunk by chunk, a causal head keeps in its memory (see `convolution.py`) the last `window - hop_length` samples of its
overlap, which are not yet whole, and adds them to the next chunk's first.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional

from varitok import UserError

from .attention import attend
from .contract import Decoder
from .convolution import Convolution, StepNorm, at_rate
from .stft import ISTFT, Precise

__all__ = ["VocosDecoder"]


class _ConvNeXt(nn.Module):
    """Depthwise convolution, norm, two-layer perceptron, scale, added (ConvNeXt, arXiv 2201.03545, section 2)."""

    def __init__(self, width: int, hidden: int, scale: float, causal: bool) -> None:
        super().__init__()
        self.depthwise = Convolution(width, width, 7, groups=width, causal=causal)
        self.norm = nn.LayerNorm(width, eps=1e-6)
        self.wide = nn.Linear(width, hidden)
        self.out = nn.Linear(hidden, width)
        self.scale = nn.Parameter(torch.full((width,), scale))

    def forward(self, x: Tensor, mask: Tensor | None, memory: list[Tensor] | None) -> Tensor:
        normed = self.norm(self.depthwise(x, mask, memory).transpose(1, 2))
        y: Tensor = self.scale * self.out(functional.gelu(self.wide(normed)))
        return x + y.transpose(1, 2)


class _Residual(nn.Module):
    """Norm, SiLU and convolution, twice, added (WavTokenizer's, after DDPM's)."""

    def __init__(self, width: int, groups: int) -> None:
        super().__init__()
        self.norm_in = StepNorm(width, groups, eps=1e-6)
        self.conv_in = Convolution(width, width, 3)
        self.norm_out = StepNorm(width, groups, eps=1e-6)
        self.conv_out = Convolution(width, width, 3)

    def forward(self, x: Tensor, mask: Tensor | None) -> Tensor:
        y = self.conv_in(functional.silu(self.norm_in(x, mask)), mask)
        y = self.conv_out(functional.silu(self.norm_out(y, mask)), mask)
        return x + y  # type: ignore[no-any-return]


class _Attention(nn.Module):
    """One head over all steps, added (WavTokenizer's)."""

    def __init__(self, width: int, groups: int) -> None:
        super().__init__()
        self.norm = StepNorm(width, groups, eps=1e-6)
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)

    def forward(self, x: Tensor, mask: Tensor | None) -> Tensor:
        allowed: Tensor | None = None
        if mask is not None:
            allowed = mask.unsqueeze(1)
        y: Tensor = self.out(attend(self.qkv(self.norm(x, mask).transpose(1, 2)), 1, allowed))
        return x + y.transpose(1, 2)


class VocosDecoder(Precise, Decoder):
    """Makes sound from latents by ConvNeXt blocks at their rate and an inverse Fourier transform.

    Args:
        width: Width of the latents.
        base: Width of the blocks.
        hidden: Their hidden width; 3 times the base in Vocos and WavTokenizer.
        depth: Blocks.
        hop_length: Samples of a latent.
        window: Length of the transform's window; WavTokenizer's is 4 hops.
        channels: Channels of the signal.
        attention: Put WavTokenizer's two residual blocks, one attention and two residual blocks first; not causal.
        groups: Groups of their norms.
        middle: A network on `(b, n, base)` after the first convolution: the transformer of X-Codec 2, with depth 0.
        causal: Sample i depends on latents up to `i // hop_length` only.

    Raises:
        UserError: Sizes that don't fit each other, or attention in a causal one.
    """

    def __init__(
        self,
        *,
        width: int,
        base: int,
        hidden: int,
        depth: int,
        hop_length: int,
        window: int,
        channels: int = 1,
        attention: bool = False,
        groups: int = 32,
        middle: nn.Module | None = None,
        causal: bool = False,
    ) -> None:
        if causal and attention:
            raise UserError("codec.decoder: attention looks ahead, a causal one can't have it; give it a `middle`")
        super().__init__(width=width, downsample=(hop_length,), channels=channels, causal=causal)
        self.rate = hop_length
        self.bins = window // 2 + 1
        self.first = Convolution(width, base, 7, causal=causal)
        self.before = nn.ModuleList()
        if attention:
            kinds = (_Residual, _Residual, _Attention, _Residual, _Residual)
            self.before.extend(kind(base, groups) for kind in kinds)
        self.before_norm = StepNorm(base, groups, eps=1e-6) if attention else None
        self.norm = nn.LayerNorm(base, eps=1e-6)
        # LayerScale starts at 1 / depth, as in Vocos.
        self.blocks = nn.ModuleList(_ConvNeXt(base, hidden, 1 / max(depth, 1), causal) for _ in range(depth))
        self.last_norm = nn.LayerNorm(base, eps=1e-6)
        self.out = nn.Linear(base, channels * 2 * self.bins)
        self.istft = ISTFT(window, hop_length, causal)
        for module in self.modules():
            if isinstance(module, nn.Linear | nn.Conv1d):
                nn.init.trunc_normal_(module.weight, std=0.02)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        self.middle = middle  # it has its own start

    def forward(
        self, latents: Tensor, mask: Tensor | None, grid: list[int], memory: list[Tensor] | None = None
    ) -> Tensor:
        """Return the sounds that latents stand for."""
        here = at_rate(mask, 1, 1)
        x = self.first(latents.transpose(1, 2), here, memory)
        for layer in self.before:
            x = layer(x, here)
        if self.before_norm is not None:
            x = self.before_norm(x, here)
        if self.middle is not None:
            x = self.middle(x.transpose(1, 2), mask, memory).transpose(1, 2)
        x = self.norm(x.transpose(1, 2)).transpose(1, 2)
        for block in self.blocks:
            x = block(x, here, memory)
        spectrum = self.out(self.last_norm(x.transpose(1, 2))).transpose(1, 2)
        b, n = latents.shape[0], latents.shape[1]
        # Each channel is a sample of its own to the transform, in float32 whatever the autocast.
        spectrum = spectrum.float().reshape(b * self.channels, 2 * self.bins, n)
        each = None if here is None else here.repeat_interleave(self.channels, dim=0)
        return self.precisely(spectrum, each, memory).reshape(b, self.channels, n * self.rate)

    def compute(self, x: Tensor, mask: Tensor | None, memory: list[Tensor] | None) -> Tensor:
        """Return the sounds of logarithms of magnitudes and phases; `mask` is bool `(b, 1, n)`."""
        size, phase = x.chunk(2, dim=1)
        size = size.exp().clamp(max=100.0)
        sound: Tensor = self.istft(size * phase.cos(), size * phase.sin(), mask, memory)
        return sound
