"""Each bottleneck has the codes and latents on a GPU that it has on the CPU, live and frozen, and learns there."""

import copy

import pytest
import torch

from varitok.codecs.precision import exact_float32

from ...devices import on_devices, share_equal
from ..examples import EXAMPLES, example

# A sum in another order changes the code of a latent between two entries; residual codebooks after it differ too.
LEAST = {"cpu": 1.0, "cuda": 0.99}


def learn(bottleneck, latents, lengths):
    """Take a step in bfloat16, as training does; return the latents' gradient."""
    latents = latents.clone().requires_grad_()
    with torch.autocast(latents.device.type, torch.bfloat16, cache_enabled=False), exact_float32():
        quantized = bottleneck.train()(latents.bfloat16(), lengths, bottleneck.depths(latents))
    assert quantized.latents.dtype == torch.float32 and quantized.codes.dtype in (torch.int64, torch.float32)
    loss = quantized.latents.square().mean() + sum(quantized.penalties.values())
    loss.backward()
    bottleneck.update()
    bottleneck.eval()
    return latents.grad


@on_devices
@pytest.mark.parametrize("name", EXAMPLES)
def test_a_bottleneck_codes_as_on_the_cpu_and_learns(device, name, record_property):
    here = example(name)
    latents, lengths = torch.randn(8, 40, here.inputs) * 1.5, torch.full((8,), 33)
    learn(here, latents, lengths)  # so that codebooks are no longer at their beginning
    there, frozen = copy.deepcopy(here).to(device), here.frozen().to(device)
    placed = latents.to(device)
    with torch.no_grad(), exact_float32():
        codes = here.encode(latents)
        back = here.decode(codes)
        for kind, module in (("live", there), ("frozen", frozen)):
            share = share_equal(codes, module.encode(placed))
            record_property(f"{kind}, equal codes", share)
            assert share >= LEAST[device]
            decoded = module.decode(codes.to(device))
            assert decoded.device.type == device
            torch.testing.assert_close(decoded.cpu(), back, rtol=1e-4, atol=1e-4)
    gradient = learn(there, placed, lengths.to(device))
    assert gradient.device.type == device and gradient.isfinite().all()
    assert all(value.isfinite().all() for value in there.state_dict().values() if value.is_floating_point())
