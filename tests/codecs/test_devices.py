"""Every bottleneck computes on the device of its input, live and frozen; a fake GPU stands in for one.

FakeTensorMode follows shapes, types and devices without data, so an operation between a GPU's tensor and a CPU's
raises as it does on a GPU.
"""

from contextlib import suppress

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import GuardOnDataDependentSymNode, ShapeEnv

from .examples import EXAMPLES, example


@pytest.fixture
def gpu(monkeypatch):
    """A fake GPU with autocast, as a mode."""
    monkeypatch.setattr("torch.cuda.amp.common.amp_definitely_not_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda *_, **__: True)
    return FakeTensorMode(allow_non_fake_inputs=True, shape_env=ShapeEnv())


def moved(module: nn.Module, mode: FakeTensorMode) -> nn.Module:
    """Move a module's parameters and buffers to the fake GPU."""
    with mode:
        for part in module.modules():
            for tensors in (part._parameters, part._buffers):
                for name, value in tensors.items():
                    if value is not None:
                        there = mode.from_tensor(value.detach()).to("cuda")
                        learns = value.requires_grad
                        tensors[name] = nn.Parameter(there, learns) if tensors is part._parameters else there
    return module


SUMS = ("hierarchy", "rvq_multirate", "rvq_split")  # began their sums on the CPU


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.slow] * (name not in SUMS)) for name in EXAMPLES]
)
def test_a_bottleneck_computes_where_its_input_is(gpu, name):
    live, frozen = moved(example(name), gpu), moved(example(name).eval().frozen(), gpu)
    found = []
    with gpu, torch.autocast("cuda", torch.bfloat16, cache_enabled=False):
        latents = torch.empty(2, 9, live.dim, device="cuda", requires_grad=True)
        with torch.no_grad():
            for module in (frozen, live.eval()):
                codes = module.encode(latents)
                found += [codes, module.decode(codes[:, :1] if live.codebook_sizes else codes)]
        with suppress(
            GuardOnDataDependentSymNode
        ):  # whether k-means has begun depends on data, which fake tensors lack
            lengths = torch.full((2,), 7, device="cuda")
            quantized = live.train()(latents, lengths, live.depths(latents))
            assert quantized.latents.dtype == torch.float32
            found += [quantized.latents, quantized.codes, *quantized.penalties.values(), *quantized.metrics.values()]
            live.update()
    assert {value.device.type for value in found} == {"cuda"}
