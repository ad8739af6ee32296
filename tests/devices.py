"""The devices of tests that need a GPU's arithmetic: the GPU, and the CPU to show that the tests themselves run."""

import os

import pytest
import torch

__all__ = ["on_devices", "share_equal"]

# For `trainer.deterministic`: cuBLAS reads it once, when CUDA starts.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")

GPU = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")]
on_devices = pytest.mark.parametrize(
    "device", [pytest.param("cpu", marks=pytest.mark.slow), pytest.param("cuda", marks=GPU)]
)


def share_equal(one: torch.Tensor, other: torch.Tensor) -> float:
    """Return the share of equal codes of two devices; of a continuous codec, of latents within 1e-3."""
    one, other = one.cpu(), other.cpu()
    assert one.shape == other.shape and one.dtype == other.dtype
    equal = one == other if one.dtype == torch.int64 else (one - other).abs() <= 1e-3
    return float(equal.double().mean())
