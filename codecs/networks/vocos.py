"""Vocos decoder: ConvNeXt blocks at the latents' rate, then an inverse STFT (arXiv 2306.00814, section 3).

WavTokenizer (arXiv 2408.16532, section 3.3) adds residual blocks and self-attention before the ConvNeXt blocks. The
inverse STFT is a transposed convolution in real arithmetic, which every export format supports.

In streaming, a causal decoder stores the last `window - hop_length` samples of the overlap-add, which are incomplete,
in the memory (see `convolution.py`), and adds them to the next chunk.
"""

from typing import Annotated

import torch
from torch import Tensor, nn
from torch.nn import functional

from varitok import UserError

from .contract import Decoder, Precise
from .layers.attention import attend
from .layers.convolution import Convolution, StepNorm, at_rate
from .layers.stft import ISTFT

__all__ = ["VocosDecoder"]


class _ConvNeXt(nn.Module):
    """ConvNeXt block with LayerScale: depthwise convolution, layer norm, perceptron (arXiv 2201.03545, section 2)."""

    def __init__(self, width: int, hidden: int, scale: float, causal: bool) -> None:
        super().__init__()
        self.depthwise = Convolution(width, width, 7, groups=width, causal=causal)
        self.norm = nn.LayerNorm(width, eps=1e-6)
        self.wide = nn.Linear(width, hidden)
        self.out = nn.Linear(hidden, width)
        self.scale = nn.Parameter(torch.full((width,), scale))

    def forward(self, x: Tensor, mask: Tensor | None, memory: list[Tensor] | None) -> Tensor:
        normed = self.norm(self.depthwise(x, mask, memory).transpose(1, 2))  # (b, width, n) -> (b, n, width)
        y: Tensor = self.scale * self.out(functional.gelu(self.wide(normed)))
        return x + y.transpose(1, 2)


class _Residual(nn.Module):
    """Residual unit of WavTokenizer, after DDPM: group norm, SiLU and convolution, twice."""

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
    """Residual single-head self-attention over all steps (WavTokenizer)."""

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
    """Decoder of latents into audio by ConvNeXt blocks and an inverse STFT.

    Args:
        width: Width of the latents.
        base: Width of the blocks.
        hidden: Hidden width of the blocks; 3 times the base in Vocos and WavTokenizer.
        depth: Number of ConvNeXt blocks.
        hop_length: Samples per latent.
        window: Window length of the inverse STFT, in samples; WavTokenizer's is 4 hops.
        channels: Channels of the signal.
        attention: Whether two residual units, self-attention and two residual units come first (WavTokenizer); not
            causal.
        groups: Groups of the norms of these layers.
        middle: Network on `(b, n, base)` after the first convolution; X-Codec 2's transformer, with `depth` 0.
        causal: Whether sample i depends on latents up to `i // hop_length` only.
        at_start: Whether a latent is centered on the start of its hop (Vocos on mel bands); see `ISTFT`.

    Raises:
        UserError: Inconsistent sizes, or `causal` with `attention`.
    """

    def __init__(
        self,
        *,
        width: int,
        base: int,
        hidden: int,
        depth: Annotated[int, "[0, 1000]"],
        hop_length: int,
        window: int,
        channels: int = 1,
        attention: bool = False,
        groups: int = 32,
        middle: nn.Module | None = None,
        causal: bool = False,
        at_start: bool = False,
    ) -> None:
        if causal and attention:
            raise UserError("codec.decoder: attention looks ahead, so causal=true can't have it; use a causal `middle`")
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
        self.istft = ISTFT(window, hop_length, causal, at_start)
        for module in self.modules():
            if isinstance(module, nn.Linear | nn.Conv1d):
                nn.init.trunc_normal_(module.weight, std=0.02)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        self.middle = middle  # after the loop above: it initializes itself

    def forward(
        self, latents: Tensor, mask: Tensor | None, grid: list[int], memory: list[Tensor] | None = None
    ) -> Tensor:
        """Decode latents `(b, n, width)` into audio `(b, c, t)`."""
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
        # Channels are moved to the batch, and the inverse STFT runs in float32 even under autocast.
        # (b, c * 2 * bins, n) -> (b * c, 2 * bins, n)
        spectrum = spectrum.float().reshape(b * self.channels, 2 * self.bins, n)
        each = None if here is None else here.repeat_interleave(self.channels, dim=0)
        return self.precisely(spectrum, each, memory).reshape(b, self.channels, n * self.rate)

    def compute(self, x: Tensor, mask: Tensor | None, memory: list[Tensor] | None) -> Tensor:
        """Invert log-magnitudes and phases `(b, 2 * bins, n)` to audio; `mask` is bool `(b, 1, n)`."""
        size, phase = x.chunk(2, dim=1)
        size = size.exp().clamp(max=100.0)
        sound: Tensor = self.istft(size * phase.cos(), size * phase.sin(), mask, memory)
        return sound
