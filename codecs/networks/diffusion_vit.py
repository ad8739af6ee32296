"""A diffusion transformer over an image's patches, with ordered tokens as its context (DiT, arXiv 2212.09748)."""

from typing import Annotated

import torch
from torch import Tensor, nn
from torch.nn import functional

from varitok import UserError

from .contract import Denoiser
from .layers.cosine import CosineTransform, random_maps
from .layers.modulation import ModulatedBlock, time_waves
from .layers.positions import grid_waves
from .register_vit import GridTable

__all__ = ["DiffusionTransformer"]


class DiffusionTransformer(Denoiser):
    """Denoiser of images from ordered tokens (FlexTok's decoder, arXiv 2502.13967).

    Noised patches and tokens are one sequence. The time modulates each block, patches and tokens by vectors of their
    own (`ModulatedBlock`). It starts as zero, or with `cosines` as the image that the tokens' coefficients make.

    Args:
        image_size: Side of the training images, in pixels; positions are interpolated for other sizes.
        patch: Side of a patch, in pixels; divides the sides of every image.
        tokens: Number of latents, N.
        width: Width of the transformer and of the latents.
        depth: Blocks of the transformer.
        heads: Attention heads per block.
        channels: Channels of the image.
        cosines: Coefficients of the image's DCT that each token gives by a linear map of its own, as for
            `RegisterDecoder`: the transformer reads their image beside the noised one and adds to it. 0: none.

    Raises:
        UserError: The patch doesn't divide `image_size`, or there are more cosines than values of an image.
    """

    def __init__(
        self,
        *,
        image_size: int,
        patch: int,
        tokens: int,
        width: int,
        depth: Annotated[int, "[0, 1000]"],
        heads: int,
        channels: int = 3,
        cosines: Annotated[int, "[0, inf)", "0 for none"] = 0,
    ) -> None:
        if image_size % patch:
            raise UserError(f"codec.decoder.network.patch={patch}: does not divide the image size {image_size}")
        if tokens * cosines > channels * image_size**2:
            reason = f"{tokens} x {cosines} is more than an image has values"
            raise UserError(f"codec.decoder.network.cosines={cosines}: {reason}")
        side = image_size // patch
        super().__init__(width=width, downsample=(patch, patch), channels=channels, tokens=tokens, sides=(side, side))
        self.patch = patch
        self.embed = nn.Conv2d(channels, width, patch, stride=patch)
        self.registers = nn.Parameter(torch.randn(1, tokens, width) * 0.02)
        self.positions = GridTable(grid_waves(width, side, side))
        self.cosines: CosineTransform | None = None
        if cosines:
            self.cosines = CosineTransform([channels, image_size, image_size], tokens * cosines)
            self.cosine_maps = nn.Parameter(random_maps(tokens, cosines, width, decodes=True))
            self.embed_draft = nn.Conv2d(channels, width, patch, stride=patch)
        self.time = nn.Sequential(nn.Linear(width, width), nn.SiLU(), nn.Linear(width, width))
        self.blocks = nn.ModuleList(ModulatedBlock(width, heads) for _ in range(depth))
        self.norm = nn.LayerNorm(width, elementwise_affine=False)
        self.modulation = nn.Linear(width, 2 * width)
        self.to_pixels = nn.Linear(width, channels * patch * patch)
        for layer in (self.modulation, self.to_pixels):
            nn.init.zeros_(layer.weight)
            nn.init.zeros_(layer.bias)

    def forward(self, noised: Tensor, time: Tensor, latents: Tensor, mask: Tensor | None) -> Tensor:
        """Return a prediction `(b, c, h, w)` from latents `(b, k, width)`, k from 1 to N; see `Denoiser.forward`."""
        b, k = latents.shape[0], latents.shape[1]
        height, width = noised.shape[2] // self.patch, noised.shape[3] // self.patch
        condition = self.time(time_waves(time, self.width).to(noised.dtype))
        patches = self.embed(noised)
        draft: Tensor | None = None
        if self.cosines is not None:
            there = latents if mask is None else latents * mask.unsqueeze(-1)
            draft = self.cosines.from_tokens(there, self.cosine_maps, list(noised.shape[1:]))
            patches = patches + self.embed_draft(draft)
        # (b, width, h, w) -> (b, h * w, width)
        placed = patches.flatten(2).transpose(1, 2) + self.positions(height, width)
        x = torch.cat([latents + self.registers[:, :k], placed], dim=1)
        if mask is not None:
            mask = torch.cat([mask, mask.new_ones((b, height * width))], dim=1)
        for block in self.blocks:
            x = block(x, condition, k, mask)
        scale, shift = self.modulation(functional.silu(condition)).unsqueeze(1).chunk(2, dim=2)
        # (b, h * w, c * patch^2) -> (b, c * patch^2, h, w)
        pixels = self.to_pixels(self.norm(x[:, k:]) * (1 + scale) + shift)
        image: Tensor = functional.pixel_shuffle(pixels.transpose(1, 2).reshape(b, -1, height, width), self.patch)
        return image if draft is None else image + draft
