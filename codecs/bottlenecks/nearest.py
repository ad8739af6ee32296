"""The search for the nearest code, written once for every book of vectors."""

import torch
from torch import Tensor, nn

__all__ = ["FrozenTable", "nearest"]

BLOCK = 1 << 18  # scores held at a time: 1 MiB of float32 stays in cache, and no n x K tensor is ever made


def nearest(latents: Tensor, codebook: Tensor) -> Tensor:
    """Find the closest entry of a codebook for each latent, by Euclidean distance.

    Both are centred on the codebook's mean first: with an off-centre codebook the textbook expansion in float32 gives
    8 to 19 % wrong codes, and codes that depend on the batch's size. Ties go to the first entry.

    Args:
        latents: `(..., d)` float32.
        codebook: `(K, d)` float32.

    Returns:
        int64 `(...)`, without gradient.
    """
    with torch.no_grad():
        centre = codebook.mean(0)
        entries = codebook - centre
        offset = entries.square().sum(1) / -2
        flat = (latents - centre).reshape(-1, latents.shape[-1])
        rows = max(1, BLOCK // len(codebook))
        blocks = [torch.addmm(offset, part, entries.T).argmax(1) for part in torch.split(flat, rows)]
        return torch.cat(blocks).reshape(latents.shape[:-1])


class FrozenTable(nn.Module):
    """The export form of one book of vectors: a centred product, an argmax and a table.

    Args:
        codebook: `(K, d)`.
        normalise: Latents are scaled to unit length before the search (cosine books).
    """

    centre: Tensor
    entries: Tensor
    offset: Tensor
    table: Tensor

    def __init__(self, codebook: Tensor, normalise: bool = False) -> None:
        super().__init__()
        codebook = codebook.detach().float()
        centre = codebook.mean(0)
        entries = codebook - centre
        self.normalise = normalise
        self.register_buffer("centre", centre)
        self.register_buffer("entries", entries.T.contiguous())
        self.register_buffer("offset", (entries.double().square().sum(1) / -2).float())
        self.register_buffer("table", codebook.clone())

    def encode(self, latents: Tensor) -> Tensor:
        """Turn latents `(b, n, d)` into int64 codes `(b, 1, n)`."""
        if self.normalise:
            latents = nn.functional.normalize(latents, dim=-1)
        return (torch.matmul(latents - self.centre, self.entries) + self.offset).argmax(-1).unsqueeze(1)

    def decode(self, codes: Tensor) -> Tensor:
        """Turn codes `(b, 1, n)` into latents `(b, n, d)`."""
        return nn.functional.embedding(codes[:, 0], self.table)
