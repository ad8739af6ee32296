"""Discriminators of sounds, and what the adversarial term makes of them."""

import inspect
from itertools import cycle

import pytest
import torch
from hydra.utils import get_class
from omegaconf import DictConfig
from torch import nn

from varitok import UserError
from varitok.codecs.build import build
from varitok.codecs.discriminators.contract import DiscriminatorOutput, Feature, MultiDiscriminator
from varitok.codecs.discriminators.patch import PatchDiscriminator
from varitok.codecs.discriminators.period import PeriodDiscriminator
from varitok.codecs.discriminators.scale import ScaleDiscriminator
from varitok.codecs.discriminators.spectrogram import SpectrogramDiscriminator
from varitok.codecs.losses.adversarial import Adversarial
from varitok.codecs.losses.balancer import Balancer
from varitok.codecs.losses.objective import Objective
from varitok.codecs.losses.pixel import L1

from ...composing import composed

BANDS = (0.0, 0.1, 0.25, 0.5, 0.75, 1.0)


def spectrogram(channels=1):
    return SpectrogramDiscriminator((256, 64), channels, width=4)


def bands(channels=1):
    return SpectrogramDiscriminator(
        (256, 128), channels, width=4, dilations=(1, 1, 1), bands=BANDS, normalized=False, slope=0.1
    )


NETS = {
    "period": lambda channels=1: PeriodDiscriminator((2, 3, 5), channels, width=4),
    "scale": lambda channels=1: ScaleDiscriminator(3, channels, width=16),
    "spectrogram": spectrogram,
    "bands": bands,
    "several": lambda channels=1: MultiDiscriminator(
        {"period": PeriodDiscriminator((2,), channels, width=4), "none": None, "spectrogram": spectrogram(channels)}
    ),
}


def sounds(b=3, c=1, t=2500):
    random = torch.Generator().manual_seed(0)
    real = 0.5 * torch.sin(torch.arange(t) / 9.0) + 0.01 * torch.randn(b, c, t, generator=random)
    return (real + 0.2 * torch.randn(real.shape, generator=random)).requires_grad_(), real, torch.full((b,), t)


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.mark.parametrize("name", NETS)
@pytest.mark.parametrize("lengths", [(2500, 777, 1200), (2499, 1, 64)])
def test_a_sound_is_judged_the_same_padded_and_alone(name, lengths):
    """Every valid logit and feature, and only as many as alone; the padding holds nonsense."""
    net = NETS[name](2)
    real = sounds(c=2)[1]
    dirty = real.clone()
    for row, length in enumerate(lengths):
        dirty[row, :, length:] = float("nan")
    together = net(dirty, torch.tensor(lengths))
    for row, length in enumerate(lengths):
        alone = net(real[row : row + 1, :, :length], torch.tensor([length]))
        for one, other in zip(together, alone, strict=True):
            pairs = [
                ((one.logits, one.valid), (other.logits, other.valid)),
                *zip(one.features, other.features, strict=True),
            ]
            for (values, valid), (expected, also_valid) in pairs:
                kept = valid[row].expand(values[row].shape)
                wanted = also_valid[0].expand(expected[0].shape)
                torch.testing.assert_close(values[row][kept], expected[0][wanted], atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("name", NETS)
def test_without_lengths_all_is_valid(name):
    net = NETS[name]()
    _, real, lengths = sounds()
    for plain, told in zip(net(real), net(real, lengths), strict=True):
        assert plain.valid is None and all(feature.valid is None for feature in plain.features)
        kept = told.valid.expand(told.logits.shape)
        torch.testing.assert_close(plain.logits[kept], told.logits[kept], atol=1e-5, rtol=1e-4)


def test_the_published_networks_have_their_layers():
    """Counted from the papers' tables: parameters of convolutions with weight norm (a scale for each channel)."""

    def count(*layers):
        return sum(wide * narrow // groups * kernel + 2 * wide for narrow, wide, kernel, groups in layers)

    period = count(
        (1, 32, 5, 1), (32, 128, 5, 1), (128, 512, 5, 1), (512, 1024, 5, 1), (1024, 1024, 5, 1), (1024, 1, 3, 1)
    )
    assert sum(p.numel() for p in PeriodDiscriminator().parameters()) == 5 * period
    scale = count(
        (1, 128, 15, 1), (128, 128, 41, 4), (128, 256, 41, 16), (256, 512, 41, 16), (512, 1024, 41, 16),
        (1024, 1024, 41, 16), (1024, 1024, 5, 1), (1024, 1, 3, 1),
    )  # fmt: skip
    assert sum(p.numel() for p in ScaleDiscriminator().parameters()) == 3 * scale
    band = count((2, 32, 27, 1), *[(32, 32, 27, 1)] * 3, (32, 32, 9, 1))
    last = count((32, 1, 9, 1))
    assert sum(p.numel() for p in SpectrogramDiscriminator().parameters()) == 5 * (band + last)
    assert sum(p.numel() for p in SpectrogramDiscriminator((2048, 1024, 512), bands=BANDS).parameters()) == 3 * (
        5 * band + last
    )


def test_a_band_hears_nothing_of_another():
    """Features come band by band; a tone in the highest quarter changes those of its own band only."""
    net = SpectrogramDiscriminator((256,), width=4, bands=(0.0, 0.5, 0.75, 1.0), dilations=(1, 1, 1))
    silence = torch.zeros(1, 1, 4096)
    # Exactly on a bin, so that its window leaks to two neighbors only; the ends, which leak everywhere, faded out.
    tone = torch.sin(torch.arange(4096) * torch.pi * 0.875) * torch.hann_window(4096).square()
    with torch.no_grad():
        quiet, loud = net(silence)[0].features, net(silence + tone)[0].features
    away = [(one.values - other.values).abs().max().item() for one, other in zip(quiet, loud, strict=True)]
    assert max(away[:10]) < 1e-3 and min(away[10:]) > 5e-3


@pytest.mark.slow
@pytest.mark.parametrize(("name", "kind"), zip(NETS, cycle(["hinge", "least_squares"]), strict=False))
def test_discriminators_learn_to_tell_and_the_codec_hears_it(name, kind):
    term = Adversarial(NETS[name](), kind=kind, features=1.0, peak=0.8 if kind == "least_squares" else None)
    fake, real, lengths = sounds()
    lengths[1] = 1000
    optimizer = torch.optim.Adam(term.parameters(), 2e-3)
    losses = []
    for _ in range(8):
        loss, means = term.discriminator_loss(fake, real, lengths)
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert losses[-1] < losses[0] and means["real"] > means["fake"]
    assert fake.grad is None
    before = term.codec_losses(fake, real, lengths)
    for loss in before.values():
        gradient = torch.autograd.grad(loss, fake, retain_graph=True)[0]
        assert gradient.abs().sum() > 0 and gradient[1, :, 1000:].abs().sum() == 0
    assert all(parameter.requires_grad for parameter in term.parameters())
    after = term.codec_losses(real + (fake - real) / 4, real, lengths)
    assert after["features"] < before["features"] and after["adversarial"] < before["adversarial"]


@pytest.mark.parametrize(("name", "reduction"), zip(NETS, cycle(["sum", "mean"]), strict=False))
def test_losses_are_means_of_the_samples_own(name, reduction):
    term = Adversarial(
        NETS[name](), kind="least_squares", features=1.0, relative=True, reduction=reduction, peak=0.8
    )  # fmt: skip
    fake, real, _ = sounds()
    lengths = torch.tensor([2500, 600, 1501])

    def losses(rows):
        cut = slice(int(lengths[rows].max()))
        parts = fake[rows][..., cut], real[rows][..., cut], lengths[rows]
        loss, means = term.discriminator_loss(*parts)
        return torch.stack([loss, *means.values(), *term.codec_losses(*parts).values()]).detach()

    alone = torch.stack([losses([row]) for row in range(3)]).mean(0)
    torch.testing.assert_close(losses([0, 1, 2]), alone, atol=1e-5, rtol=1e-4)


class Told(nn.Module):
    """Says what the signal is: the logits are its samples, as are the features, of two layers."""

    def __init__(self):
        super().__init__()
        self.calls = []

    def forward(self, signal, lengths=None):
        self.calls.append(len(signal))
        return [
            DiscriminatorOutput(signal * scale, None, [Feature(signal, None), Feature(10 * signal, None)])
            for scale in (1, 3)
        ]


def _flat(fake, real):
    return torch.full((2, 1, 4), fake), torch.full((2, 1, 4), real)


def test_least_squares_and_hinge_are_as_defined():
    """Logits are the signal, and three times it; the loss is half of real's and half of fake's."""
    fake, real = _flat(0.5, 0.25)
    squares = Adversarial(Told(), kind="least_squares")
    expected = ((0.75**2 + 0.25**2) / 2 + (0.5**2 + 1.5**2) / 2) / 2
    assert squares.discriminator_loss(fake, real)[0].item() == pytest.approx(expected)
    assert squares.codec_losses(fake, real)["adversarial"].item() == pytest.approx((0.5**2 + 0.5**2) / 2)
    hinge = Adversarial(Told())
    expected = ((0.75 + 0.25) / 2 + (1.5 + 2.5) / 2) / 2
    assert hinge.discriminator_loss(fake, real)[0].item() == pytest.approx(expected)
    assert hinge.codec_losses(fake, real)["adversarial"].item() == pytest.approx(-1.0)
    summed = Adversarial(Told(), reduction="sum")
    assert summed.codec_losses(fake, real)["adversarial"].item() == pytest.approx(-2.0)


def test_features_are_matched_plainly_or_by_their_size():
    fake, real = _flat(0.5, 0.25)
    plain, relative = (Adversarial(Told(), features=1.0, relative=flag) for flag in (False, True))
    assert plain.codec_losses(fake, real)["features"].item() == pytest.approx((0.25 + 2.5) / 2)
    assert relative.codec_losses(fake, real)["features"].item() == pytest.approx(1.0)
    summed = Adversarial(Told(), features=1.0, reduction="sum")
    assert summed.codec_losses(fake, real)["features"].item() == pytest.approx(2 * (0.25 + 2.5))


def test_no_pass_is_made_that_is_not_needed():
    """The discriminator's turn sees both sides at once; the codec's sees the real one for feature matching only."""
    fake, real = _flat(0.5, 0.25)
    net = Told()
    Adversarial(net).discriminator_loss(fake, real)
    Adversarial(net).codec_losses(fake, real)
    assert net.calls == [4, 2]
    Adversarial(net, features=1.0).codec_losses(fake, real)
    assert net.calls == [4, 2, 2, 2]


@pytest.mark.parametrize("balanced", [False, True])
def test_a_shared_pass_gives_both_turns_their_own_gradients(balanced):
    """The same as apart, as long as no step is between; and neither turn's gradient reaches the other's side."""
    fake, real, lengths = sounds()
    lengths[1] = 700
    gradients = []
    for shared in (False, True):
        torch.manual_seed(0)
        term = Adversarial(bands(), kind="least_squares", features=2.0, peak=0.8, shared=shared)
        made = Objective({"l1": {"weight": 1.0, "module": L1()}}, term, Balancer() if balanced else None)
        scale = torch.ones(1, requires_grad=True)
        signal = scale * fake
        loss, _ = term.discriminator_loss(signal, real, lengths)
        loss.backward(retain_graph=shared)
        assert scale.grad is None and fake.grad is None
        learned = [parameter.grad.clone() for parameter in term.parameters()]
        made(signal, real, lengths, 0)[0].backward()
        for parameter, grad in zip(term.parameters(), learned, strict=True):
            assert torch.equal(parameter.grad, grad)
        gradients.append([scale.grad, fake.grad.clone(), *learned])
        fake.grad = None
        assert term.judged is None
    for apart, together in zip(*gradients, strict=True):
        torch.testing.assert_close(together, apart, atol=1e-6, rtol=1e-3)


def test_a_shared_pass_is_two_in_all():
    fake, real = _flat(0.5, 0.25)
    net = Told()
    term = Adversarial(net, features=1.0, shared=True)
    term.discriminator_loss(fake, real)
    term.codec_losses(fake.requires_grad_(), real)
    assert net.calls == [2, 2]
    term.discriminator_loss(fake, real)
    another = (2 * fake.detach()).requires_grad_()  # an update at which only the codec learns
    losses = term.codec_losses(another, real)
    assert losses["adversarial"].item() == pytest.approx(-2.0)
    assert net.calls == [2, 2, 2, 2, 2, 2]


def test_the_discriminator_learns_every_so_many_updates_and_terms_are_heard_by_name():
    term = Adversarial(Told(), weight=0.4, features=2.0, start=10, head_start=5, ramp=3, every=3)
    assert [update for update in range(8, 20) if term.learns(update)] == [10, 13, 16, 19]
    assert term.loss_weights(14) == {}
    assert term.loss_weights(15) == pytest.approx({"adversarial": 0.1, "features": 0.5})
    assert term.loss_weights(99) == pytest.approx({"adversarial": 0.4, "features": 2.0})
    assert Adversarial(Told(), weight=0.0, features=1.0).loss_weights(0) == {"features": 1.0}
    with pytest.raises(UserError, match="every=0"):
        build({"_target_": "varitok.codecs.losses.adversarial.Adversarial", "every": 0}, discriminator=Told())


def test_judged_sounds_lose_their_offset_and_get_one_peak():
    heard = []

    class Ear(Told):
        def forward(self, signal, lengths=None):
            heard.append(signal)
            return super().forward(signal, lengths)

    _, real, _ = sounds(c=2)
    lengths = torch.tensor([2500, 900, 0])
    Adversarial(Ear(), peak=0.8).codec_losses(0.1 * real + 0.3, real, lengths)
    (signal,) = heard
    torch.testing.assert_close(signal.abs().amax((1, 2)), torch.tensor([0.8, 0.8, 0.0]))
    assert signal.sum(2).abs().max() < 1e-2 and signal[1, :, 900:].abs().sum() == 0


def test_images_are_judged_under_the_same_contract():
    term = Adversarial(PatchDiscriminator(width=8, layers=2), features=1.0)
    fake, real = torch.rand(2, 3, 16, 16, requires_grad=True), torch.rand(2, 3, 16, 16)
    lengths = torch.tensor([16, 16])
    loss, _ = term.discriminator_loss(fake, real, lengths)
    losses = term.codec_losses(fake, real, lengths)
    assert loss.isfinite() and set(losses) == {"adversarial", "features"}
    assert len(term.discriminator(real)[0].features) == 3


def test_several_needs_one():
    with pytest.raises(UserError, match="needs at least one"):
        MultiDiscriminator({"period": None})


def objective(name, *overrides):
    config = composed("data=voices", f"objective={name}", *overrides)
    return build(config.objective)


@pytest.mark.parametrize(
    "name", ["stft_mel", *(pytest.param(name, marks=pytest.mark.slow) for name in ("dac", "encodec", "wavtokenizer"))]
)
def test_objectives_of_the_configuration_tell_near_from_far(name):
    """Every term is finite, has a gradient if it has a weight, and pulls the reconstruction to the sound."""
    term = "objective.adversarial.discriminator"
    narrow = {
        "stft_mel": [],
        "dac": [f"{term}.parts.period.width=2", f"{term}.parts.spectrogram.width=2"],
        "encodec": [f"{term}.width=2"],
        "wavtokenizer": [f"{term}.parts.{part}.width=2" for part in ("period", "spectrogram", "bands")],
    }[name]
    made = objective(name, *narrow)
    fake, real, lengths = sounds(b=2, t=6000)
    lengths[1] = 4500
    total, values = made(fake, real, lengths, 0)
    assert {"adversarial", "features"} <= set(values) or name == "stft_mel"
    assert all(value.isfinite() for value in values.values())
    push = torch.autograd.grad(total, fake)[0]
    assert push.isfinite().all() and push[1, :, 4500:].abs().sum() == 0
    step = 1e-3 * push / push.abs().max()
    with torch.no_grad():
        for learned in ("mel", "features"):
            if learned in values:
                nearer = made(fake - step, real, lengths, 0)[1]
                assert nearer[learned] < values[learned], learned


def test_every_argument_of_the_objectives_can_be_overridden():
    """What a module takes is in the configuration, so that `objective.terms.mel.floor=...` is no unknown key."""

    def missing(node):
        if isinstance(node, DictConfig):
            if "_target_" in node:
                taken = inspect.signature(get_class(node._target_)).parameters
                yield from (name for name in taken if name not in node)
            for value in node.values():
                yield from missing(value)

    absent = set()
    for name in ("stft_mel", "dac", "encodec", "wavtokenizer"):
        config = composed("data=voices", f"objective={name}")
        absent |= set(missing(config.objective))
    # Teachers come with `guide=`; the last two are of terms without arguments.
    assert absent <= {"adversarial", "balancer", "teachers", "args", "kwargs"}
