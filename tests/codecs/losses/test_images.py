"""The objective, its terms, and the adversarial term."""

import pytest
import torch
from torch import nn

from varitok import UserError
from varitok.codecs.discriminators.patch import PatchDiscriminator
from varitok.codecs.losses.adversarial import Adversarial
from varitok.codecs.losses.balancer import Balancer
from varitok.codecs.losses.objective import Objective
from varitok.codecs.losses.pixel import L1, L2
from varitok.codecs.losses.structure import MultiScaleStructure

from ..examples import tiny_codec

TERMS = {"l1": L1, "l2": L2, "structure": MultiScaleStructure}


def _pair(h=32, w=32):
    random = torch.Generator().manual_seed(0)
    real = torch.rand(4, 3, h, w, generator=random) * 2 - 1
    return (real + 0.3 * torch.randn(real.shape, generator=random)).requires_grad_(), real, torch.full((4,), h)


@pytest.mark.parametrize("name", TERMS)
@pytest.mark.parametrize("shape", [(8, 8), (9, 31), (64, 16)])
def test_terms_take_images_of_any_shape(name, shape):
    assert TERMS[name]()(*_pair(*shape)).isfinite()


def test_pixel_terms_are_the_plain_means():
    fake, real, lengths = _pair()
    torch.testing.assert_close(L1()(fake, real, lengths), (fake - real).abs().mean())
    torch.testing.assert_close(L2()(fake, real, lengths), (fake - real).square().mean())


def test_structure_sees_what_squared_error_does_not():
    """Of two equal squared errors, a constant shift is milder than blur."""
    random = torch.Generator().manual_seed(0)
    real = torch.rand(1, 3, 32, 32, generator=random) - 0.5
    blurred = nn.functional.avg_pool2d(real, 3, stride=1, padding=1)
    shifted = real + (blurred - real).square().mean().sqrt()
    lengths = torch.tensor([32])
    assert MultiScaleStructure()(shifted, real, lengths) < MultiScaleStructure()(blurred, real, lengths) / 2


def test_objective_weighs_sums_and_logs():
    fake, real, lengths = _pair()
    objective = Objective({"a": {"weight": 2.0, "module": L1()}, "b": {"weight": 0.0, "module": L2()}, "c": None})
    total, values = objective(fake, real, lengths)
    torch.testing.assert_close(total, 2 * L1()(fake, real, lengths))
    assert set(values) == {"a", "b"} and not values["b"].requires_grad


def test_objective_names_a_term_that_lacks_its_weight():
    with pytest.raises(UserError, match=r"objective\.terms\.l1"):
        Objective({"l1": {"module": L1()}})


def test_objective_names_a_term_that_takes_the_discriminators_name():
    with pytest.raises(UserError, match=r"objective\.terms\.features"):
        Objective({"features": {"weight": 1.0, "module": L1()}}, Adversarial(nn.Identity()))


def test_objective_hears_the_discriminator_from_its_update_on():
    torch.manual_seed(0)
    fake, real, lengths = _pair()
    adversarial = Adversarial(PatchDiscriminator(width=8, layers=2), weight=0.5, features=2.0, head_start=3)
    objective = Objective({"l1": {"weight": 1.0, "module": L1()}}, adversarial)
    plain = L1()(fake, real, lengths)
    for update in (None, 2):
        total, values = objective(fake, real, lengths, update)
        torch.testing.assert_close(total, plain)
        assert set(values) == {"l1"}
    total, values = objective(fake, real, lengths, 3)
    torch.testing.assert_close(total, plain + 0.5 * values["adversarial"] + 2 * values["features"])


def test_adversarial_timetable():
    term = Adversarial(nn.Identity(), weight=0.4, start=10, head_start=5, ramp=3)
    assert [term.learns(u) for u in (9, 10)] == [False, True]
    heard = [term.loss_weights(u).get("adversarial", 0) for u in (14, 15, 16, 18, 1000)]
    assert heard == pytest.approx([0, 0.1, 0.2, 0.4, 0.4])


@pytest.mark.parametrize("kind", ["hinge", "nonsaturating"])
def test_discriminator_learns_to_tell_and_the_codec_hears_it(kind):
    torch.manual_seed(0)
    term = Adversarial(PatchDiscriminator(width=8, layers=2), kind=kind, lecam=0.1)
    fake, real, _ = _pair()
    optimizer = torch.optim.Adam(term.parameters(), 2e-3)
    first = None
    for _ in range(40):
        loss, means = term.discriminator_loss(fake, real)
        first = loss.item() if first is None else first
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss < first and means["real"] > means["fake"]
    assert fake.grad is None
    assert term.real_average > term.fake_average
    said = term.codec_losses(fake, real)["adversarial"]
    gain = torch.autograd.grad(said, fake)[0]
    assert term.codec_losses(fake - 5 * gain.sign() * 0.01, real)["adversarial"] < said


def test_the_codec_may_have_another_criterion():
    """Open-MAGVIT2: the discriminator's is a hinge, the codec's softplus(-D)."""
    fake, real, _ = _pair()
    net = PatchDiscriminator(width=8, layers=1)
    hinge, soft = Adversarial(net), Adversarial(net, kind="nonsaturating")
    mixed = Adversarial(net, codec_kind="nonsaturating")
    assert mixed.discriminator_loss(fake, real)[0] == hinge.discriminator_loss(fake, real)[0]
    assert mixed.codec_losses(fake, real) == soft.codec_losses(fake, real) != hinge.codec_losses(fake, real)


def test_lecam_averages_are_saved():
    assert {"real_average", "fake_average"} <= Adversarial(nn.Identity()).state_dict().keys()


def test_the_adaptive_weight_is_the_ratio_of_gradients_at_the_last_layer():
    """VQGAN's equation 7, clamped and logged; feature matching keeps its weight."""
    codec, real, lengths = tiny_codec(), torch.rand(2, 3, 16, 16) - 0.5, torch.tensor([16, 16])
    last = codec.decoder.out.weight
    net = PatchDiscriminator(width=8, layers=1)

    def losses(update=0, **options):
        adversarial = Adversarial(net, weight=0.5, features=2.0, **options)
        objective = Objective({"l1": {"weight": 3.0, "module": L1()}, "l2": {"weight": 0, "module": L2()}}, adversarial)
        objective.bind(codec)
        return objective(codec(real).signal, real, None, update)

    _, plain = losses()
    fake = codec(real).signal
    heard = Adversarial(net).codec_losses(fake, real)["adversarial"]
    wanted, found = (
        torch.autograd.grad(loss, last, retain_graph=True)[0].norm() for loss in (3 * L1()(fake, real, lengths), heard)
    )
    factor = wanted / (found + 1e-6)
    total, values = losses(adaptive=1e4)
    torch.testing.assert_close(values["adversarial_factor"], factor)
    torch.testing.assert_close(total, 3 * plain["l1"] + 0.5 * factor * plain["adversarial"] + 2 * plain["features"])
    clamped = losses(adaptive=factor.item() / 2)[1]["adversarial_factor"]
    torch.testing.assert_close(clamped, factor / 2)
    assert losses(adaptive=1e4, head_start=1)[1].keys() == {"l1", "l2"}
    assert losses(None, adaptive=1e4)[1].keys() == {"l1", "l2"}
    total.backward()
    assert last.grad is not None and last.grad.isfinite().all()


def test_an_adaptive_weight_that_can_not_be_is_told():
    adversarial = Adversarial(nn.Identity(), adaptive=1e4)
    with pytest.raises(UserError, match=r"adversarial\.adaptive: not with a balancer"):
        Objective({"l1": {"weight": 1.0, "module": L1()}}, adversarial, Balancer())
    with pytest.raises(UserError, match=r"adversarial\.adaptive: needs a term"):
        Objective({"l1": {"weight": 0.0, "module": L1()}}, adversarial)
    codec = tiny_codec()
    codec.decoder.requires_grad_(False)
    with pytest.raises(UserError, match=r"adversarial\.adaptive: needs the decoder's last layer, which is frozen"):
        Objective({"l1": {"weight": 1.0, "module": L1()}}, adversarial).bind(codec)


def test_discriminator_judges_an_image_the_same_in_any_batch():
    torch.manual_seed(0)
    net = PatchDiscriminator(width=8)
    _, real, _ = _pair()
    (together,), (alone,) = net(real), net(real[2:3])
    torch.testing.assert_close(together.logits[2:3], alone.logits, atol=1e-5, rtol=0)
