"""Discriminators of images: their layers, images alone and in a batch, what they train and what stays frozen."""

from itertools import pairwise

import pytest
import torch
from torch import nn

from varitok import UserError
from varitok.codecs.build import build
from varitok.codecs.discriminators.contract import DiscriminatorOutput
from varitok.codecs.discriminators.features import FeatureDiscriminator
from varitok.codecs.discriminators.style import StyleDiscriminator
from varitok.codecs.losses.adversarial import Adversarial
from varitok.data.teachers.vision import RandomTeacher, VisionTransformer

from ...composing import composed
from ...data.saved import saved

NETS = {
    "style": lambda: StyleDiscriminator(16, width=8),
    "features": lambda: FeatureDiscriminator(RandomTeacher(8, 8), layers=[1, 2], width=4),
}


def pair(h=16, w=16):
    real = torch.rand(3, 3, h, w) - 0.5
    return (real + 0.2 * torch.randn(real.shape)).requires_grad_(), real


@pytest.mark.parametrize("name", NETS)
def test_an_image_is_judged_alone_as_in_a_batch_and_at_any_size(name):
    net = NETS[name]().eval()  # spectral norms move with each pass in training
    for side in ((16, 16), (24, 40)):
        _, real = pair(*side)
        for together, alone in zip(net(real), net(real[1:2]), strict=True):
            torch.testing.assert_close(together.logits[1:2], alone.logits, atol=1e-5, rtol=1e-4)
            assert len(together.features) == 2 and together.valid is None


@pytest.mark.parametrize("name", NETS)
def test_it_learns_to_tell_with_r1_and_the_codec_hears_it(name):
    term = Adversarial(NETS[name](), kind="nonsaturating", r1=0.1, r1_every=4)
    fake, real = pair()
    optimizer = torch.optim.Adam(term.parameters(), 2e-3)
    losses = []
    for update in range(24):
        loss, means = term.discriminator_loss(fake, real, update=update)
        losses.append(loss.item())
        assert ("r1" in means) == (update % 4 == 0)
        optimizer.zero_grad()
        loss.backward()
        assert all(parameter.grad is not None for parameter in term.parameters())
        optimizer.step()
    assert sum(losses[-4:]) < sum(losses[:4]) and means["real"] > means["fake"] and fake.grad is None
    assert torch.autograd.grad(term.codec_losses(fake, real)["adversarial"], fake)[0].any()


def test_style_has_the_published_layers():
    """At 256 pixels, counted from the paper's figure 7 (c), without the channel of the minibatch's deviation."""
    with torch.device("meta"):
        net = StyleDiscriminator(256)
    widths = [128, 256, 512, 512, 512, 512, 512]
    # Of each block two convolutions with bias, and a path without.
    blocks = sum(9 * a * a + a + 9 * a * b + b + a * b for a, b in pairwise(widths))
    last = 9 * 512 * 512 + 512 + 512 * 16 * 512 + 512 + 513
    assert sum(parameter.numel() for parameter in net.parameters()) == 3 * 128 + 128 + blocks + last
    assert net(torch.empty(1, 3, 256, 256, device="meta"))[0].logits.shape == (1, 1)


def test_styles_layers_keep_the_variance_and_halving_a_constant():
    net = StyleDiscriminator(64, width=64)
    block = net.blocks[0]
    smooth = block._smooth(torch.ones(1, 64, 16, 16), padding=1, stride=2)
    assert smooth.shape[2:] == (8, 8) and smooth[..., 1:-1, 1:-1].sub(1).abs().max() < 1e-6
    x = torch.randn(2, 64, 16, 16)
    assert 0.8 < block.keep(x).var() < 1.2  # weights of unit variance, scaled by their number


def test_a_transformers_layers_are_judged_and_r1_passes_through_its_attention(tmp_path):
    pytest.importorskip("transformers")
    teacher = VisionTransformer(str(saved(tmp_path, "dinov2")[1]), size=16)
    term = Adversarial(FeatureDiscriminator(teacher, [1, 2], width=4), r1=1.0, r1_every=1)
    fake, real = pair(20, 12)
    loss, means = term.discriminator_loss(fake, real, update=0)
    loss.backward()
    assert means["r1"] > 0 and all(parameter.grad is not None for parameter in term.parameters())
    assert not any("network" in name for name in term.state_dict())
    assert all(parameter.grad is None for parameter in teacher.parameters())
    with pytest.raises(UserError, match=r"discriminator\.layers=\[3\]: .* has layers 0 to 2"):
        FeatureDiscriminator(teacher, [3])


def test_r1_is_the_squared_gradient_at_real_signals_times_the_steps_between():
    class Slopes(nn.Module):
        def forward(self, signal, lengths=None):
            logits = (signal * self.slopes).flatten(1).sum(1, keepdim=True)
            return [DiscriminatorOutput(logits, None, [])]

        slopes = torch.tensor([3.0, 4.0])

    fake, real = torch.zeros(2, 1, 2), torch.ones(2, 1, 2)
    plain, _ = Adversarial(Slopes()).discriminator_loss(fake, real, update=0)
    term = Adversarial(Slopes(), r1=0.5, r1_every=4, start=3, every=2)
    found = {update: term.discriminator_loss(fake, real, update=update) for update in (3, 5, 9, 11)}
    assert [("r1" in means) for _, means in found.values()] == [True, False, False, True]
    assert found[3][1]["r1"] == 25 and (found[3][0] - plain).item() == pytest.approx(4 * 0.5 / 2 * 25)
    assert (term.discriminator_loss(fake, real)[0] - plain).item() == 0


@pytest.mark.parametrize("option", ["patch", "style", "dino", "efficientnet_lite0"])
def test_discriminators_are_chosen_by_name(option, tmp_path, monkeypatch):
    words = ["objective=adversarial", f"objective/discriminator={option}", "data.image_size=32"]
    config = composed(*words).objective.adversarial
    if option == "dino":
        monkeypatch.setenv("VARITOK_WEIGHTS", str(tmp_path))
        with pytest.raises(UserError, match=r"^facebook/dino-vits16: place config\.json"):
            build(config)
    elif option == "efficientnet_lite0":
        assert config.discriminator.network._target_.endswith("classifiers.efficientnet_lite")
    else:
        config.discriminator.width = 4
        assert build(config).discriminator(torch.zeros(1, 3, 32, 32))
