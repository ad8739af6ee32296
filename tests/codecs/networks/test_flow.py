"""A rectified flow learns velocities, and samples by integrating them."""

import pytest
import torch
from torch import Tensor

from varitok import UserError
from varitok.codecs.build import build
from varitok.codecs.codec import Codec
from varitok.codecs.lengths.distributions import PowersOfTwo
from varitok.codecs.lengths.policy import LengthPolicy, MaskToken
from varitok.codecs.losses.feature_hooks import Tap, capture
from varitok.codecs.networks.contract import Denoiser
from varitok.codecs.networks.diffusion_vit import DiffusionTransformer
from varitok.codecs.networks.flow import FlowDecoder, Guidance
from varitok.codecs.networks.register_vit import RegisterEncoder
from varitok.data.noise import gaussian

from ..examples import BOTTLENECKS, PATCH, SIZE, TOKENS, WIDTH

SIZES = {"image_size": SIZE, "patch": PATCH, "tokens": TOKENS, "width": WIDTH, "depth": 1, "heads": 2}


class Known(Denoiser):
    """A denoiser that knows the answer, and records what it is asked."""

    def __init__(self, answer):
        super().__init__(width=4, downsample=(4, 4), channels=3, tokens=2, sides=(2, 2))
        self.answer = answer
        self.times, self.latents = [], []

    def forward(self, noised, time, latents, mask):
        self.times.append(time)
        self.latents.append(latents)
        return self.answer(noised, time[:, None, None, None])


def straight(deviation):
    """Return the velocity that carries standard normal noise to signals of a deviation, independent in each value."""

    def velocity(x: Tensor, t: Tensor) -> Tensor:
        return x * (t * deviation**2 - (1 - t)) / ((t * deviation) ** 2 + (1 - t) ** 2)

    return velocity


def flow_codec(**options) -> Codec:
    """Make a codec of 16 x 16 images, 6 tokens, whose decoder samples."""
    torch.manual_seed(0)
    options = {"guidance": Guidance(2.0), "steps": 3} | options
    decoder = FlowDecoder(DiffusionTransformer(**SIZES, cosines=2), **options)
    length = LengthPolicy(PowersOfTwo(), MaskToken(WIDTH))
    codec = Codec(RegisterEncoder(**SIZES, cosines=2), BOTTLENECKS["fsq"](), decoder, length, unit_latents=True)
    with torch.no_grad():  # what starts as nothing is given weight
        for weight in decoder.parameters():
            weight.add_(0.1 * torch.randn_like(weight))
    return codec


def images(count):
    return torch.rand(count, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(1)) * 2 - 1


@pytest.mark.parametrize("solver", ["euler", "heun"])
def test_a_known_signal_is_reached_whatever_the_noise(solver):
    signal = torch.randn(2, 3, 8, 8)
    decoder = FlowDecoder(Known(lambda x, t: signal), "signal", steps=7, solver=solver)
    torch.testing.assert_close(decoder(torch.zeros(2, 2, 4), None, []), signal, atol=1e-5, rtol=0)


@torch.no_grad()
def test_solvers_follow_the_flow_of_gaussian_signals():
    """It multiplies noise by the signals' deviation; the errors of Heun's steps fall faster than those of Euler's."""
    errors = {}
    for solver, steps in ((solver, steps) for solver in ("euler", "heun") for steps in (10, 40)):
        decoder = FlowDecoder(Known(straight(0.5)), steps=steps, solver=solver)
        noise = torch.randn(1, 3, 8, 8)
        errors[solver, steps] = float((decoder(torch.zeros(1, 2, 4), None, [], None, noise) / noise - 0.5).abs().max())
    assert errors["euler", 40] < errors["euler", 10] / 3
    assert errors["heun", 40] < errors["heun", 10] / 6 and errors["heun", 40] < errors["euler", 40] / 4


def test_the_loss_of_the_true_velocity_is_its_least():
    signal = torch.randn(64, 3, 8, 8)
    latents = torch.zeros(64, 2, 4)
    estimate, loss = FlowDecoder(Known(lambda x, t: signal), "signal").loss(latents, None, signal)
    torch.testing.assert_close(estimate, signal, atol=1e-4, rtol=0)
    assert loss < 1e-6
    truth, other = (
        FlowDecoder(Known(lambda x, t, f=factor: f * straight(1.0)(x, t))).loss(latents, None, signal)[1]
        for factor in (1.0, 0.7)
    )
    assert truth < other


def test_times_are_logit_normal_and_some_samples_are_shown_no_latents():
    network = Known(lambda x, t: x)
    decoder = FlowDecoder(network, null_share=0.25, time_mean=1.0, time_deviation=0.5)
    torch.manual_seed(0)
    decoder.loss(torch.ones(4000, 2, 4), None, torch.zeros(4000, 3, 4, 4))
    logits = torch.logit(network.times[0])
    assert abs(logits.mean() - 1.0) < 0.04 and abs(logits.std() - 0.5) < 0.03
    hidden = (network.latents[0] == decoder.null).all(2).all(1)
    assert abs(hidden.float().mean() - 0.25) < 0.03
    assert (network.latents[0][~hidden] == 1).all()


def test_guidance():
    given, free, zero = torch.randn(2, 3, 4, 4), torch.randn(2, 3, 4, 4), torch.zeros(2, 3, 4, 4)
    plain = Guidance(3.0, momentum=0.0, parallel=1.0, threshold=None)
    torch.testing.assert_close(plain(given, free, zero)[0], free + 3 * (given - free))
    torch.testing.assert_close(Guidance(1.0)(given, free, zero)[0], given)
    across, kept = Guidance(3.0, momentum=-0.5, parallel=0.0, threshold=2.5)(given, free, given)
    torch.testing.assert_close(kept, given - free - 0.5 * given)
    push = (across - given).flatten(1)
    assert ((push * given.flatten(1)).sum(1).abs() < 1e-4).all(), "none of it is along the prediction"
    assert (push.norm(dim=1) <= 2 * 2.5 + 1e-4).all()


def test_training_learns_velocities_and_evaluation_samples():
    codec = flow_codec()
    result = codec.train()(images(2), torch.tensor([2, 6]))
    assert result.signal.shape == (2, 3, SIZE, SIZE) and set(result.penalties) == {"generation"}
    result.penalties["generation"].backward()
    for name, weight in codec.named_parameters():
        assert weight.grad is not None and weight.grad.isfinite().all(), name
    assert codec.encoder.registers.grad.any() and codec.length.mechanism.token.grad.any()
    with torch.no_grad():
        result = codec.eval()(images(2))
    assert not result.penalties
    torch.testing.assert_close(result.signal, codec.decode(codec.encode(images(2))))


def test_a_guided_term_reads_a_layer_of_the_denoiser():
    codec, tap = flow_codec().train(), Tap("decoder.network.blocks.0")
    with capture(codec, [tap], images(2), None) as inside:
        codec(images(2))
    features = inside[tap]
    assert features.values.shape == (2, WIDTH, 2, 2) and features.steps == (PATCH, PATCH)


@torch.no_grad()
def test_decoding_is_a_function_of_codes_and_seed():
    codec = flow_codec().eval()
    codes = codec.encode(images(3))
    whole = codec.decode(codes)
    assert torch.equal(whole, codec.decode(codes)), "drawn anew"
    torch.testing.assert_close(codec.decode(codes[1:2]), whole[1:2], atol=1e-5, rtol=0)
    for kept in (1, 4):
        lengths = torch.full((3,), kept)
        torch.testing.assert_close(codec.decode(codes, None, lengths), codec.decode(codes[..., :kept]))
    codec.decoder.seed = 1
    assert (codec.decode(codes) - whole).abs().mean() > 0.1
    codec.decoder.seed = 0
    noise = torch.from_numpy(gaussian((3, SIZE, SIZE), 0))[None]
    latents = codec.project_out(codec.bottleneck.decode(codes), None, [])
    torch.testing.assert_close(codec.decoder(latents, None, [], None, noise), whole)


def test_the_loss_falls():
    """Of flat images, in a few updates."""
    codec = flow_codec(predicts="signal", null_share=0.0, time_deviation=0.1).train()
    signal = images(16)[:, :, :1, :1].expand(-1, -1, SIZE, SIZE)
    optimizer = torch.optim.AdamW(codec.parameters(), lr=3e-3)
    losses = []
    for _ in range(30):
        loss = codec(signal).penalties["generation"]
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert sum(losses[-10:]) < 0.5 * sum(losses[:10]), losses


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"patch": 7}, "decoder.network.patch=7: does not divide the image size 16"),
        ({"cosines": 1000}, "decoder.network.cosines=1000: 6 x 1000 is more than an image has values"),
        ({"heads": 5}, "width=16 should be a multiple of its heads=5"),
    ],
)
def test_a_mistake_in_the_network_is_one_line(values, message):
    with pytest.raises(UserError, match=message):
        DiffusionTransformer(**SIZES | values)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"solver": "rk4"}, "solver: expected 'euler' or 'heun', got 'rk4'"),
        ({"predicts": "noise"}, "predicts: expected 'velocity' or 'signal', got 'noise'"),
        ({"steps": 0}, "steps=0: must be at least 1"),
        ({"null_share": 2}, "null_share=2: must be"),
        ({"guidance": {"_target_": "varitok.codecs.networks.flow.Guidance", "scale": 0.5}}, "scale=0.5: must be"),
    ],
)
def test_a_mistake_in_the_configuration_is_one_line(values, message):
    network = {"_target_": "varitok.codecs.networks.diffusion_vit.DiffusionTransformer", **SIZES}
    with pytest.raises(UserError, match=message):
        build({"_target_": "varitok.codecs.networks.flow.FlowDecoder", "network": network, **values})
