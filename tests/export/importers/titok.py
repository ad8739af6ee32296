"""A network with the tensors of 1d-tokenizer, which is no package; written from the paper and the tensors' names."""

import torch
from torch import Tensor, nn
from torch.nn import functional

__all__ = ["TiTok"]


class _Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.ln_1, self.ln_2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attn = nn.MultiheadAttention(width, width // 64, batch_first=True)
        self.mlp = nn.ModuleDict({"c_fc": nn.Linear(width, 4 * width), "c_proj": nn.Linear(4 * width, width)})

    def forward(self, x: Tensor) -> Tensor:
        y = self.ln_1(x)
        x = x + self.attn(y, y, y, need_weights=False)[0]
        return x + self.mlp["c_proj"](functional.gelu(self.mlp["c_fc"](self.ln_2(x))))


class _Side(nn.Module):
    """Encoder or decoder: a class token, patches and latent tokens through a transformer."""

    def __init__(self, width: int, depth: int, patches: int, tokens: int) -> None:
        super().__init__()
        self.class_embedding = nn.Parameter(torch.randn(1, width))
        self.positional_embedding = nn.Parameter(torch.randn(patches + 1, width))
        self.latent_token_positional_embedding = nn.Parameter(torch.randn(tokens, width))
        self.ln_pre, self.ln_post = nn.LayerNorm(width), nn.LayerNorm(width)
        self.transformer = nn.ModuleList(_Block(width) for _ in range(depth))

    def run(self, patches: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """Return the outputs at patches and at latent tokens."""
        first = self.class_embedding.expand(len(patches), 1, -1)
        x = torch.cat([first, patches], 1) + self.positional_embedding
        x = self.ln_pre(torch.cat([x, tokens + self.latent_token_positional_embedding[: tokens.shape[1]]], 1))
        for block in self.transformer:
            x = block(x)
        x, count = self.ln_post(x), patches.shape[1]
        return x[:, 1 : 1 + count], x[:, 1 + count :]


class TiTok(nn.Module):
    """A tokenizer of random weights; images are in [0, 1]."""

    def __init__(self, side: int, patch: int, widths: tuple[int, int], depth: int, tokens: int, dim: int, size: int):
        super().__init__()
        self.grid, patches = side // patch, (side // patch) ** 2
        self.encoder, self.decoder = (_Side(width, depth, patches, tokens) for width in widths)
        self.latent_tokens = nn.Parameter(torch.randn(tokens, widths[0]))
        self.encoder.patch_embed = nn.Conv2d(3, widths[0], patch, stride=patch)
        self.encoder.conv_out = nn.Conv2d(widths[0], dim, 1)
        self.quantize = nn.ModuleDict({"embedding": nn.Embedding(size, dim)})
        self.decoder.decoder_embed = nn.Linear(dim, widths[1])
        self.decoder.mask_token = nn.Parameter(torch.randn(1, 1, widths[1]))
        self.decoder.ffn = nn.ModuleList([nn.Conv2d(widths[1], 3 * patch * patch, 1)])
        self.decoder.conv_out = nn.Conv2d(3, 3, 3, padding=1)
        self.requires_grad_(False).eval()

    def encode(self, images: Tensor) -> Tensor:
        """Return codes `(b, 1, n)`."""
        patches = self.encoder.patch_embed(images).flatten(2).mT
        latents = self.encoder.run(patches, self.latent_tokens.expand(len(images), -1, -1))[1]
        latents = self.encoder.conv_out(latents.mT[..., None])[..., 0].mT
        return torch.cdist(latents, self.quantize["embedding"].weight.expand(len(images), -1, -1)).argmin(2)[:, None]

    def decode(self, codes: Tensor) -> Tensor:
        """Return images."""
        tokens = self.decoder.decoder_embed(self.quantize["embedding"](codes[:, 0]))
        patches = self.decoder.mask_token.expand(len(codes), self.grid**2, -1)
        x = self.decoder.run(patches, tokens)[0].mT.unflatten(2, (self.grid, self.grid))
        x = self.decoder.ffn[0](x)
        b, _, h, w = x.shape
        patch = round((x.shape[1] // 3) ** 0.5)
        pixels = x.reshape(b, patch, patch, 3, h, w).permute(0, 3, 4, 1, 5, 2).reshape(b, 3, h * patch, w * patch)
        return self.decoder.conv_out(pixels)
