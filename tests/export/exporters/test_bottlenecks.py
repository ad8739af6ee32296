"""Every bottleneck's frozen form, as TorchScript and ONNX, gives the codes and latents of the bottleneck itself."""

import numpy as np
import onnxruntime
import pytest
import torch
from safetensors.torch import save
from torch import nn

from varitok.export.exporters.onnx import _Method, export_graph
from varitok.export.exporters.torchscript import export_torchscript, load_torchscript

from ...codecs.examples import CONFIGURED, EXAMPLES, example

SIZES = [(1, 1), (1, 5), (3, 1), (3, 5)]


@pytest.fixture(autouse=True)
def fresh_types(monkeypatch):
    """What TorchScript has compiled before must not help."""
    monkeypatch.setattr(torch.jit._recursive, "concrete_type_store", torch.jit._recursive.ConcreteTypeStore())


class _Frozen(nn.Module):
    """Stands where a frozen codec would, with nothing around the bottleneck."""

    def __init__(self, frozen):
        super().__init__()
        self.bottleneck = frozen
        self.tokens = 1

    @torch.jit.export
    def encode(self, latents: torch.Tensor) -> torch.Tensor:
        codes: torch.Tensor = self.bottleneck.encode(latents)
        return codes

    @torch.jit.export
    def decode(self, codes: torch.Tensor) -> torch.Tensor:
        latents: torch.Tensor = self.bottleneck.decode(codes)
        return latents

    def forward(self, latents: torch.Tensor) -> torch.Tensor:
        return self.decode(self.encode(latents))


def _latents(dim, b, n):
    return torch.randn(b, n, dim, generator=torch.Generator().manual_seed(b + 10 * n)) * 1.5


def _trained(name):
    """Make one whose codebooks are not at their beginning, in evaluation mode."""
    bottleneck = example(name)
    for _ in range(2):
        latents = _latents(bottleneck.inputs, 4, 20)
        bottleneck(latents, torch.full((4,), 20), bottleneck.depths(latents))
        bottleneck.update()
    if name == "token_bridge":
        bottleneck.measure(_latents(bottleneck.dim, 4, 20).transpose(1, 2) * 2 + 1)
    return bottleneck.eval().requires_grad_(False)


def _counts(bottleneck):
    codebooks = len(bottleneck.codebook_sizes)
    return sorted({1, (codebooks + 1) // 2, codebooks}) if codebooks else [bottleneck.dim]


def _check(bottleneck, encode, decode):
    """Compare both directions of an exported form with the bottleneck, at several sizes."""
    for b, n in SIZES:
        latents = _latents(bottleneck.inputs, b, n)
        codes = bottleneck.encode(latents)
        found = encode(latents)
        assert found.dtype == codes.dtype and found.shape == codes.shape
        if bottleneck.codebook_sizes:
            assert torch.equal(found, codes)
        else:
            torch.testing.assert_close(found, codes, atol=1e-5, rtol=0)
        for count in _counts(bottleneck):
            expected = bottleneck.decode(codes[:, :count])
            torch.testing.assert_close(decode(codes[:, :count].contiguous()), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.slow] * (name not in CONFIGURED)) for name in EXAMPLES]
)
@torch.no_grad()
def test_torchscript(name, tmp_path):
    bottleneck = _trained(name)
    frozen = bottleneck.frozen()
    save(frozen.state_dict())  # refuses tensors that share memory
    export_torchscript(_Frozen(frozen).eval(), tmp_path / "bottleneck.ts", {"made": "here"})
    scripted, metadata = load_torchscript(tmp_path / "bottleneck.ts")
    assert metadata == {"made": "here"}
    _check(bottleneck, scripted.encode, scripted.decode)


def _runner(path):
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    (source,) = session.get_inputs()

    def run(value):
        (output,) = session.run(None, {source.name: np.ascontiguousarray(value.numpy())})
        return torch.from_numpy(output)

    return run


@pytest.mark.slow  # the quick tests export a codebook and residual codebooks in whole codecs
@pytest.mark.parametrize("name", EXAMPLES)
@torch.no_grad()
def test_onnx(name, tmp_path):
    bottleneck = _trained(name)
    frozen = _Frozen(bottleneck.frozen()).eval()
    # Example sizes are 2 or more and all different, so that none is taken for a constant.
    latents = _latents(bottleneck.inputs, 3, 7)
    codebooks = "codebooks" if len(bottleneck.codebook_sizes) > 1 else None
    export_graph(
        _Method(frozen, "encode"),
        [latents],
        tmp_path / "encoder.onnx",
        [("latents", ["batch", "tokens", None])],
        [("codes", ["batch", None, "tokens"])],
        {},
    )
    export_graph(
        _Method(frozen, "decode"),
        [bottleneck.encode(latents)],
        tmp_path / "decoder.onnx",
        [("codes", ["batch", codebooks, "tokens"])],
        [("latents", ["batch", "tokens", None])],
        {},
    )
    _check(bottleneck, _runner(tmp_path / "encoder.onnx"), _runner(tmp_path / "decoder.onnx"))
