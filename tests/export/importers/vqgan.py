"""Networks with the tensors of taming-transformers, LlamaGen and Cosmos-Tokenizer, which are no packages.

Written from the papers and the tensors' names, apart from varitok's networks; `test_images.py` compares both.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional

__all__ = ["Tokenizer"]

BASE = 32  # channels of the first convolution: the fewest that 32 groups divide


def _norm(channels: int) -> nn.GroupNorm:
    return nn.GroupNorm(32, channels, eps=1e-6)


class _Residual(nn.Module):
    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = _norm(inputs), _norm(outputs)
        self.conv1, self.conv2 = nn.Conv2d(inputs, outputs, 3, padding=1), nn.Conv2d(outputs, outputs, 3, padding=1)
        self.nin_shortcut = nn.Conv2d(inputs, outputs, 1) if inputs != outputs else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv1(functional.silu(self.norm1(x)))
        return self.nin_shortcut(x) + self.conv2(functional.silu(self.norm2(y)))


class _Attention(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm = _norm(channels)
        self.q, self.k, self.v, self.proj_out = (nn.Conv2d(channels, channels, 1) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(x)
        q, k, v = (layer(y).flatten(2) for layer in (self.q, self.k, self.v))
        weights = torch.einsum("bci,bcj->bij", q, k).div(math.sqrt(x.shape[1])).softmax(2)
        return x + self.proj_out(torch.einsum("bij,bcj->bci", weights, v).reshape(x.shape))


class _Resample(nn.Module):
    def __init__(self, channels: int, up: bool) -> None:
        super().__init__()
        self.up = up
        self.conv = nn.Conv2d(channels, channels, 3, stride=1 if up else 2, padding=1 if up else 0)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(functional.interpolate(x, scale_factor=2.0) if self.up else functional.pad(x, (0, 1, 0, 1)))


class _Network(nn.Module):
    """Encoder or decoder; `changes` are the stages with a change of the resolution, from the first of the encoder."""

    def __init__(
        self, form: str, inputs: int, outputs: int, multipliers: Sequence[int], decodes: bool, changes: set[int]
    ) -> None:
        super().__init__()
        self.lists, self.decodes = form == "llamagen", decodes
        deepest = len(multipliers) - 1
        channels = BASE * (multipliers[-1] if decodes else 1)
        self.conv_in = nn.Conv2d(inputs, channels, 3, padding=1)
        stages = []
        for level in range(deepest + 1)[:: -1 if decodes else 1]:
            units, attention = nn.ModuleList(), nn.ModuleList()
            for _ in range(2 + decodes):
                units.append(_Residual(channels, BASE * multipliers[level]))
                channels = BASE * multipliers[level]
                if level == deepest and form in ("taming", "llamagen"):
                    attention.append(_Attention(channels))
            parts = {"res" if self.lists else "block": units, "attn": attention}
            if level in changes:
                parts["upsample" if decodes else "downsample"] = _Resample(channels, decodes)
            stages.append(nn.ModuleDict(parts))
        if self.lists:
            self.conv_blocks = nn.ModuleList(stages)
        else:
            setattr(self, "up" if decodes else "down", nn.ModuleList(stages[::-1] if decodes else stages))
        deep = BASE * multipliers[-1]
        middle = _Residual(deep, deep), _Attention(deep), _Residual(deep, deep)
        names = ("0", "1", "2") if self.lists else ("block_1", "attn_1", "block_2")
        self.mid = nn.ModuleDict(dict(zip(names, middle, strict=True)))
        self.norm_out, self.conv_out = _norm(channels), nn.Conv2d(channels, outputs, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv_in(x)
        if self.decodes:
            x = self._middle(x)
        for stage in self.conv_blocks if self.lists else reversed(self.up) if self.decodes else self.down:
            for index, unit in enumerate(stage["res" if self.lists else "block"]):
                x = unit(x)
                x = stage["attn"][index](x) if len(stage["attn"]) else x
            for name in ("upsample", "downsample"):
                x = stage[name](x) if name in stage else x
        if not self.decodes:
            x = self._middle(x)
        return self.conv_out(functional.silu(self.norm_out(x)))

    def _middle(self, x: Tensor) -> Tensor:
        for part in self.mid.values():
            x = part(x)
        return x


class _Codebook(nn.Module):
    def __init__(self, size: int, dim: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(size, dim)


class Tokenizer(nn.Module):
    """A codec of random weights: "taming", "llamagen", "cosmos" and "cosmos_di" (of Haar bands) or "ldm" (Gaussian)."""

    def __init__(self, form: str, multipliers: Sequence[int], width: int, dim: int, size: int) -> None:
        super().__init__()
        self.form, levels = form, len(multipliers)
        self.haar = form.startswith("cosmos")
        bands = 48 if self.haar else 3
        downs, ups = ({0}, {levels - 1}) if self.haar else (set(range(levels - 1)), set(range(1, levels)))
        moments = 2 if form == "ldm" else 1
        self.encoder = _Network(form, bands, moments * width, multipliers, False, downs)
        self.decoder = _Network(form, width, bands, multipliers, True, ups)
        self.quant_conv, self.post_quant_conv = nn.Conv2d(moments * width, moments * dim, 1), nn.Conv2d(dim, width, 1)
        self.continuous = form in ("cosmos", "ldm")
        if form in ("taming", "llamagen"):
            self.quantize = _Codebook(size, dim)
        for weight in self.parameters():
            nn.init.normal_(weight, std=0.3 if weight.dim() == 1 else weight[0].numel() ** -0.5)
        self.requires_grad_(False).eval()

    def encode(self, images: Tensor) -> Tensor:
        """Return codes `(b, 1, h, w)`, or latents."""
        latents = self.quant_conv(self.encoder(_haar(images) if self.haar else images))
        if self.continuous:
            return latents[:, : self.post_quant_conv.in_channels]
        if self.haar:
            return _scalar_codes(latents)
        rows = latents.movedim(1, -1).flatten(0, 2)
        rows = functional.normalize(rows) if self.form == "llamagen" else rows
        codes = torch.cdist(rows, self._entries(), compute_mode="donot_use_mm_for_euclid_dist").argmin(1)
        return codes.reshape(len(images), 1, *latents.shape[2:])

    def decode(self, codes: Tensor) -> Tensor:
        """Return images."""
        latents = codes
        if not self.continuous:
            latents = _scalars(codes) if self.haar else self._entries()[codes[:, 0]].movedim(-1, 1)
        found = self.decoder(self.post_quant_conv(latents))
        return _inverse_haar(found) if self.haar else found

    def _entries(self) -> Tensor:
        entries = self.quantize.embedding.weight
        return functional.normalize(entries) if self.form == "llamagen" else entries


LEVELS = (8, 8, 8, 5, 5, 5)


def _scalar_codes(latents: Tensor) -> Tensor:
    """Round each channel to its levels; the first is the lowest digit (arXiv 2309.15505)."""
    code = torch.zeros_like(latents[:, :1], dtype=torch.int64)
    for channel, count in enumerate(LEVELS):
        half, offset = (count - 1) * 1.001 / 2, 0.5 if count % 2 == 0 else 0.0
        bent = torch.tanh(latents[:, channel] + math.atanh(offset / half)) * half - offset
        code[:, 0] += (bent.round().long() + count // 2) * math.prod(LEVELS[:channel])
    return code


def _scalars(codes: Tensor) -> Tensor:
    digits = [codes[:, 0] // math.prod(LEVELS[:channel]) % count for channel, count in enumerate(LEVELS)]
    return torch.stack([digit / (count // 2) - 1 for digit, count in zip(digits, LEVELS, strict=True)], 1)


def _haar(x: Tensor) -> Tensor:
    """Return two levels of means and differences of 2 x 2 pixels, each over half of what would keep the norm."""
    for _ in range(2):
        a, b, c, d = (x[:, :, i::2, j::2] for i in (0, 1) for j in (0, 1))
        x = torch.cat([a + b + c + d, a + b - c - d, a - b + c - d, a - b - c + d], 1) / 4
    return x


def _inverse_haar(x: Tensor) -> Tensor:
    for _ in range(2):
        mean, rows, columns, both = x.chunk(4, 1)
        x = mean.new_empty(*mean.shape[:2], 2 * mean.shape[2], 2 * mean.shape[3])
        for i, j in ((0, 0), (0, 1), (1, 0), (1, 1)):
            x[:, :, i::2, j::2] = mean + (-1) ** i * rows + (-1) ** j * columns + (-1) ** (i + j) * both
    return x
