"""Networks of clips: causal where they say so, chunk by chunk as whole, padded as alone, any grid, exportable."""

import onnxruntime
import pytest
import torch

from varitok import UserError
from varitok.codecs.networks.conv_codec import ConvDecoder, ConvEncoder
from varitok.codecs.networks.layers.wavelet import Haar, InverseHaar
from varitok.codecs.networks.nested import NestedDecoder, NestedEncoder
from varitok.codecs.networks.resnet import ResNetDecoder, ResNetEncoder
from varitok.codecs.networks.tubelet import TubeletDecoder, TubeletEncoder
from varitok.codecs.streaming import obstacle

WIDTH = 8


def _factored(causal=True, **form):
    form = {"width": WIDTH, "base": 8, "depth": 1, "causal": causal} | form
    return ResNetEncoder(**form), ResNetDecoder(**form)


def _tubelet(causal=True, **form):
    form = {"width": WIDTH, "patch": (2, 4, 4), "base": 16, "depth": 2, "heads": 2, "causal": causal} | form
    return TubeletEncoder(**form), TubeletDecoder(**form)


def _nested(causal=True):
    encoder, decoder = _factored(causal, **SPLIT, width=WIDTH // 4)
    return NestedEncoder(encoder, 1), NestedDecoder(decoder, 1)


def _joint(causal=True):
    form = {"width": WIDTH, "base": 4, "strides": [[1, 2, 2], [2, 2, 2]], "dims": 3, "channels": 3, "causal": causal}
    form |= {"kernel": 3, "last_kernel": 3, "residual_kernel": 3, "dilations": [1], "activation": "elu", "norm": "none"}
    return ConvEncoder(**form), ConvDecoder(**form)


SPLIT = {"strides": [[1, 2, 2], [2, 2, 2]], "multipliers": [1, 2, 2]}
NETWORKS = {
    "vidtok": lambda causal=True: _factored(causal, **SPLIT),
    "cosmos": lambda causal=True: _factored(
        causal, strides=[2], multipliers=[1, 1], units="factorized", wavelets=1, window=3
    ),
    "magvit2": lambda causal=True: _factored(causal, **SPLIT, units="joint", attention=False),
    "convolutions": _joint,
    "block": lambda causal=True: _tubelet(causal, window=3),
    "nested": _nested,
    "axial": lambda causal=True: _tubelet(causal, attention="axial", window=2),
}


@pytest.fixture(params=NETWORKS)
def name(request):
    return request.param


def networks(name, causal=True):
    torch.manual_seed(0)
    encoder, decoder = NETWORKS[name](causal)
    with torch.no_grad():
        for part in [*encoder.parameters(), *decoder.parameters()]:
            part.add_(0.1 * torch.randn_like(part))
    return encoder.eval(), decoder.eval()


def clips(encoder, latents=4, rows=2, columns=3, b=2):
    sides = [step * count for step, count in zip(encoder.downsample, (latents, rows, columns), strict=True)]
    return torch.randn(b, 3, *sides)


def near(found, wanted):
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5 * wanted.abs().max().item())


@torch.no_grad()
def test_causal_ones_look_back_only(name):
    encoder, decoder = networks(name)
    x, step = clips(encoder), encoder.downsample[0]
    later = x.clone()
    later[:, :, 2 * step :] += 1
    one, other = encoder(x), encoder(later)
    near(other[:, :12], one[:, :12])
    assert (one[:, 12:] - other[:, 12:]).abs().max() > 1e-3
    moved = one.clone()
    moved[:, 12:] += 1
    one, other = decoder(one, None, [4, 2, 3]), decoder(moved, None, [4, 2, 3])
    near(other[:, :, : 2 * step], one[:, :, : 2 * step])
    assert (one[:, :, 2 * step :] - other[:, :, 2 * step :]).abs().max() > 1e-3


@torch.no_grad()
def test_padding_changes_nothing_valid_where_they_look_ahead(name):
    encoder, decoder = networks(name, causal=False)
    x, step = clips(encoder, 4), encoder.downsample[0]
    mask = torch.arange(24) < torch.tensor([[24], [12]])
    z = encoder(x, mask)
    y = decoder(z, mask, [4, 2, 3])
    alone = encoder(x[1:, :, : 2 * step])
    near(z[1:, :12], alone)
    near(z[:1], encoder(x[:1]))
    near(y[1:, :, : 2 * step], decoder(alone, None, [2, 2, 3]))
    assert y[1:, :, 2 * step :].abs().max() == 0


@torch.no_grad()
@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.slow] * (name not in ("block", "magvit2"))) for name in NETWORKS]
)
def test_they_script(name):
    encoder, decoder = networks(name)
    x = clips(encoder)
    scripted, back = torch.jit.script(encoder), torch.jit.script(decoder)
    z = encoder(x)
    near(scripted(x), z)
    near(back(z, None, [4, 2, 3]), decoder(z, None, [4, 2, 3]))
    x = clips(encoder, 1, 3, 1)
    near(scripted(x), encoder(x))


class _Around(torch.nn.Module):
    def __init__(self, decoder):
        super().__init__()
        self.decoder = decoder

    def forward(self, z):
        return self.decoder(z.flatten(1, 3), None, list(z.shape[1:4]))


@torch.no_grad()
@pytest.mark.slow
@pytest.mark.parametrize("name", ["block", "cosmos", "vidtok", "axial"])
def test_they_export(name, tmp_path):
    encoder, decoder = networks(name)
    free = {0: "b", 2: "t", 3: "h", 4: "w"}
    x = clips(encoder, 5, 3, 4)
    z = encoder(x).view(2, 5, 3, 4, WIDTH)
    grid = {0: "b", 1: "t", 2: "h", 3: "w"}
    for network, example, dynamic, file in [(encoder, x, free, "e"), (_Around(decoder), z, grid, "d")]:
        torch.onnx.export(
            network,
            (example,),
            tmp_path / file,
            dynamo=True,
            dynamic_shapes=(dynamic,),
            opset_version=20,
            verbose=False,
        )
    into, back = (onnxruntime.InferenceSession(tmp_path / file) for file in ("e", "d"))
    for sides in [(1, 1, 1), (3, 2, 5)]:
        x = clips(encoder, *sides, b=1)
        wanted = encoder(x)
        near(torch.from_numpy(into.run(None, {into.get_inputs()[0].name: x.numpy()})[0]), wanted)
        z = wanted.view(1, *sides, WIDTH)
        got = back.run(None, {back.get_inputs()[0].name: z.numpy()})[0]
        near(torch.from_numpy(got), decoder(wanted, None, [*sides]))


def test_wavelets_lose_nothing_and_keep_the_energy():
    x = torch.randn(2, 3, 8, 4, 12)
    for levels in (0, 1, 2):
        haar, back = Haar(3, levels), InverseHaar(3, levels)
        y = haar(x)
        assert y.shape == (2, haar.bands, *(side // haar.rate for side in (8, 4, 12)))
        torch.testing.assert_close(y.square().sum(), x.square().sum())
        torch.testing.assert_close(back(y), x)
    flat = Haar(1, 2)(torch.ones(1, 1, 4, 4, 4))
    assert flat[0, 0].item() == pytest.approx(8) and flat[0, 1:].abs().max() < 1e-6


def test_a_window_is_needed_to_go_chunk_by_chunk():
    encoder, _ = _tubelet()
    assert obstacle(encoder) == "a transformer isn't causal, or has no window"
    assert obstacle(_factored(False, **SPLIT)[0]) == "a convolution isn't causal"


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: _factored(strides=[2], multipliers=[1]), "1 strides need 2 multipliers, not 1"),
        (lambda: _factored(**SPLIT, units="other"), "units='other' should be one of split, factorized, joint"),
        (lambda: _tubelet(attention="other"), "attention='other' should be block or axial"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(make, message):
    with pytest.raises(UserError, match=message):
        make()
