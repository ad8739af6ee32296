"""Snake in half precision."""

import pytest
import torch

from varitok.codecs.networks.layers.activations import Snake, SnakeBeta


@pytest.mark.parametrize("kind", [Snake, SnakeBeta])
def test_angles_are_float32_whatever_the_input_is(kind: type[torch.nn.Module]) -> None:
    """As at angles near 30, where bfloat16's steps are 0.1 rad: the result is that of float32, rounded once."""
    layer = kind(3)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.add_(torch.rand(parameter.shape))
    x = (30 * torch.randn(2, 3, 50)).bfloat16()
    outputs, gradients = [], []
    for given in (x.clone().requires_grad_(), x.float().requires_grad_()):
        outputs.append(layer(given))
        (outputs[-1].float() ** 2).sum().backward()
        gradients.append(given.grad)
    assert outputs[0].dtype == torch.bfloat16
    assert torch.equal(outputs[0], outputs[1].bfloat16())
    torch.testing.assert_close(gradients[0].float(), gradients[1], atol=1.0, rtol=0.02)
