"""Precision of float32 on NVIDIA GPUs: if allowed, tensor cores round the factors of products to 10 bits (TF32)."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch

__all__ = ["allow_tf32", "exact_float32"]


def allow_tf32(allowed: bool = True) -> None:
    """Let matrix products and convolutions round their float32 factors to TF32, which is much faster.

    torch's default differs between the two: convolutions may, products may not.
    """
    torch.set_float32_matmul_precision("high" if allowed else "highest")
    torch.backends.cudnn.allow_tf32 = allowed


@contextmanager
def exact_float32() -> Iterator[None]:
    """Compute products and convolutions in float32 within the context, whatever the caller allows.

    Evaluation needs it, and the search for the nearest codebook entry: after TF32's rounding a codec has other codes on
    a GPU than on a CPU or in its bundle, most of all in late residual codebooks.
    """
    before = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    allow_tf32(False)
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before[0])
        torch.backends.cudnn.allow_tf32 = before[1]
