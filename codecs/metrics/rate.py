"""What codes cost and how evenly they are used.

Two prices of k tokens: the exact payload, `k * sum(log2(book size))` bits, which an ideal coder that knows nothing of
the codes comes to (`Codec.bits`), and the bytes of a plain packing, whole bits for each index.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

__all__ = ["DEFINITIONS", "count_codes", "entropy", "packed_bytes", "perplexity", "usage"]

DEFINITIONS = {
    "bits": "payload of an image, exact: k * sum of log2(book size) over the books",
    "bytes": "payload of an image, packed in whole bits: ceil(k * sum of ceil(log2(book size)) / 8)",
    "bpp": "bits / pixels",
    "usage": "share of a book's entries seen among the first k codes of all images, mean of the books",
    "entropy": "bits, of the distribution of a book's entries among those codes, mean of the books",
    "perplexity": "2 ** entropy of a book, mean of the books",
}
"""What each name means, in the words that go above a table."""


def packed_bytes(book_sizes: Sequence[int], tokens: int) -> int:
    """Count the bytes of `tokens` tokens when each index takes `ceil(log2(book size))` bits, without a header."""
    return -(-tokens * sum((size - 1).bit_length() for size in book_sizes) // 8)


def count_codes(codes: Tensor, book_sizes: Sequence[int]) -> list[Tensor]:
    """Count how often each entry of each book occurs: int64 codes `(b, books, *grid)` to a `(size,)` for each book."""
    return [torch.bincount(codes[:, book].flatten(), minlength=size) for book, size in enumerate(book_sizes)]


def usage(counts: Tensor) -> float:
    """Compute the share of entries that occur, in [0, 1]."""
    return float((counts > 0).double().mean())


def entropy(counts: Tensor) -> float:
    """Compute the entropy of the entries' distribution, bits in [0, log2(size)]; 0 where nothing was counted.

    It is that of the counts, below the true one where there are few codes for the size of the book.
    """
    share = counts.double() / counts.sum().clamp(min=1)
    return -float(torch.xlogy(share, share).sum()) / torch.log(torch.tensor(2.0, dtype=torch.float64)).item() + 0.0


def perplexity(counts: Tensor) -> float:
    """Compute 2 to the power of the entropy: how many evenly used entries the codes are worth."""
    return float(2 ** entropy(counts))
