"""Product quantization: channels are split into parts, each with its own bottleneck."""

from collections.abc import Callable, Sequence
from typing import Annotated

import torch
from torch import Tensor, nn

from varitok import UserError

from ..result import Quantized
from .composite import Composite, FrozenComposite, MeasuredParts, overlap
from .contract import Bottleneck

__all__ = ["Product", "grouped"]


class _FrozenProduct(FrozenComposite):
    def __init__(self, product: "Product") -> None:
        super().__init__(product)
        self.widths = list(product.widths)

    def encode(self, latents: Tensor) -> Tensor:
        pieces = torch.split(latents, self.widths, dim=-1)
        codes: list[Tensor] = []
        for index, part in enumerate(self.parts):
            codes.append(part.encode(pieces[index]))  # type: ignore[operator]
        return torch.cat(codes, 1)[:, self.order]

    def decode_kept(self, codes: Tensor, kept: Tensor) -> Tensor:
        pieces: list[Tensor] = []
        for part in self.parts:
            pieces.append(part.decode_kept(codes, kept))  # type: ignore[operator]
        return torch.cat(pieces, -1)


class Product(Composite):
    """Product quantization: independent quantizers of disjoint channels (Jegou et al., TPAMI 2011).

    With residual parts it is group-residual quantization (HiFi-Codec, arXiv 2305.02765, section 3.2). Codebooks are
    ordered level by level, so that a prefix of them is a coarser code of all channels. A part whose codebooks are all
    dropped decodes to zeros. Penalties are averaged over parts.

    Args:
        parts: Bottlenecks; their widths sum to the width of the latents.
        disentangle: Weight of the mean squared inner product between parts' latents (FQGAN, arXiv 2411.16681,
            section 3.2), which requires parts of equal width.

    Raises:
        UserError: `disentangle` with a single part or parts of different widths.
    """

    def __init__(self, parts: Sequence[Bottleneck], disentangle: float = 0.0) -> None:
        super().__init__(sum(part.dim for part in parts), parts, interleave=True)
        self.widths = [part.dim for part in parts]
        self.disentangle = disentangle
        if disentangle and (len(set(self.widths)) > 1 or len(parts) == 1):
            raise UserError(f"bottleneck.disentangle: needs two or more parts of one width, got {self.widths}")

    def forward(self, latents: Tensor, lengths: Tensor, n_codebooks: Tensor) -> Quantized:
        """Quantize; see `Bottleneck.forward`."""
        with torch.autocast(latents.device.type, enabled=False):
            pieces = torch.split(latents.float(), self.widths, -1)
            codes, kept, measured = [], [], MeasuredParts()
            for index, piece in enumerate(pieces):
                part, found = self.run_part(index, piece, lengths, n_codebooks)
                codes.append(part.codes)
                kept.append(found)
                measured.add(part)
            penalties = {name: value / len(codes) for name, value in measured.penalties.items()}
            if self.disentangle:
                penalties["disentangle"] = self.disentangle * overlap(kept, lengths)
        return Quantized(torch.cat(kept, -1), self.arrange(codes), penalties, measured.means())

    def encode(self, latents: Tensor) -> Tensor:
        """Quantize each part; see `Bottleneck.encode`."""
        pieces = torch.split(latents.float(), self.widths, -1)
        return self.arrange([part.encode(piece) for part, piece in zip(self.parts, pieces, strict=True)])  # type: ignore[operator]

    def decode(self, codes: Tensor) -> Tensor:
        """Decode and concatenate the parts; see `Bottleneck.decode`."""
        pieces = []
        for index, width in enumerate(self.widths):
            part = self.decode_part(index, codes)
            empty = torch.zeros(codes.shape[0], codes.shape[2], width, device=codes.device)
            pieces.append(empty if part is None else part)
        return torch.cat(pieces, -1)

    def frozen(self) -> nn.Module:
        """Return the export form; see `Bottleneck.frozen`."""
        return _FrozenProduct(self)


def grouped(part: Callable[[], Bottleneck], groups: Annotated[int, "[1, 1000]"], disentangle: float = 0.0) -> Product:
    """Build a product of equal parts (UniTok's multi-codebook, arXiv 2502.20321; LFSC's grouped FSQ, 2409.12117).

    Args:
        part: Factory of a part.
        groups: Number of parts.
        disentangle: See `Product`.
    """
    return Product([part() for _ in range(groups)], disentangle)
