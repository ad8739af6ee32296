"""Presets of clips and images: of the published sizes, as long as the data believe, of any size, chunk by chunk."""

import random
from functools import cache

import pytest
import torch
from torch import Tensor, nn

from varitok import UserError
from varitok.codecs.build import build, build_codec
from varitok.codecs.codec import Codec
from varitok.codecs.networks.resnet import ChannelNorm, ResNetDecoder, ResNetEncoder
from varitok.codecs.streaming import ChunkedCodec, obstacle

from ...composing import composed

# Samples of frames, rows and columns to a token.
PRESETS = {
    **dict.fromkeys(("vidtok", "vidtok_noncausal", "cosmos", "magvit2", "omnitokenizer", "adaptok"), (4, 8, 8)),
    "bsq_vit": (1, 8, 8),
    "hitvideo": (4, 64, 64),
    "landiff": (1, 1, 1),
}
OF_ONE_SIZE = ("adaptok_small", "hitvideo_small", "landiff_small")
SLOW = pytest.param("landiff_small", marks=pytest.mark.slow)
SMALL = tuple(f"{name}_small" for name in PRESETS if f"{name}_small" not in ("vidtok_noncausal_small", *OF_ONE_SIZE))
# Millions of weights of both networks: VidTok's released layers, BSQ-ViT's table 1.
SIZES = {"vidtok": (157, 0.01), "bsq_vit": (174, 0.02)}
# The same of images (LlamaGen's README, diffusers' AutoencoderKL), and pixels of each side to a token.
IMAGES = {"conv2d": (72, 16), "conv2d_f8": (70, 8), "sd_vae": (83.65, 8)}


def _config(name: str, *more: str):
    data = "feature_scenes" if name.startswith("landiff") else "scenes"
    preset = f"experiment=video/{name}" if name == "vidtok_noncausal" else f"codec={name}"
    return composed(preset, f"data={data}", "bottleneck=fsq", "length=full", *more)


@cache
def _codec(name: str) -> Codec:
    torch.manual_seed(0)
    more = ["bottleneck=hierarchy", "bottleneck.level.codebook_size=64"] if name == "hitvideo_small" else []
    codec = build_codec(_config(name, *more)).eval()
    with torch.no_grad():
        codec.project_in.weight.mul_(8)  # or an untrained one's latents would nearly all have the same code
    return codec


def _clip(t: int, h: int = 24, w: int = 16, b: int = 1, c: int = 3) -> Tensor:
    return torch.rand(b, c, t, h, w, generator=torch.Generator().manual_seed(t)) * 2 - 1


@pytest.mark.parametrize("name", PRESETS)
def test_presets_fit_together_and_the_data_know_their_steps(name):
    config = _config(name)
    with torch.device("meta"):
        encoder, decoder = build(config.codec.encoder), build(config.codec.decoder)
    assert encoder.downsample == decoder.downsample == PRESETS[name]
    assert encoder.causal == decoder.causal == (name != "vidtok_noncausal")
    assert (obstacle(encoder) == "") == (obstacle(decoder) == "") == encoder.causal
    data = config.data.get("clips", config.data)
    assert (data.downsample, data.causal_pad) == (encoder.downsample[0], encoder.causal_pad)
    if name in SIZES:
        size, share = SIZES[name]
        found = sum(part.numel() for network in (encoder, decoder) for part in network.parameters())
        assert found / 1e6 == pytest.approx(size, rel=share)


@pytest.mark.parametrize("name", IMAGES)
def test_presets_of_images_have_the_published_sizes(name):
    config = composed(f"codec={name}", "length=full")
    with torch.device("meta"):
        networks = build(config.codec.encoder), build(config.codec.decoder)
    size, side = IMAGES[name]
    assert networks[0].downsample == networks[1].downsample == (side, side)
    found = sum(part.numel() for network in networks for part in network.parameters())
    assert found / 1e6 == pytest.approx(size, rel=0.005)


@torch.no_grad()
@pytest.mark.parametrize("name", SMALL)
def test_small_ones_code_any_size_and_an_image(name):
    codec = _codec(name)
    assert codec.downsample == (4, 8, 8) and codec.layout.causal_pad == 3
    assert sum(part.numel() for part in codec.parameters()) < 3.5e6
    x = _clip(6, 35, 45)
    codes = codec.encode(x)
    assert codes.shape[2:] == (3, 5, 6) and len(codes.unique()) > 30
    assert codec.decode(codes, (6, 35, 45)).shape == x.shape
    assert torch.equal(codec.encode(x[:, :, :1]), codes[:, :, :1])


@torch.no_grad()
@pytest.mark.parametrize("name", [*SMALL, "adaptok_small", "hitvideo_small", SLOW])
@pytest.mark.parametrize("lengths", [(41,), pytest.param(range(1, 41), marks=pytest.mark.slow, id="all")])
def test_small_ones_go_chunk_by_chunk(name, lengths):
    codec = _codec(name)
    chance = random.Random(0)
    for frames in lengths:  # more latent frames than any window; those whose frames have one size have their own
        if codec.bounded:
            x = _clip(frames, 64, 64) if codec.layout.tokens else _clip(frames)
        else:
            x = _clip(frames, 8, 8, c=64)
        _goes_chunk_by_chunk(codec, x, [1 + codec.downsample[0] * step for step in range(10) if chance.random() < 0.4])


def _goes_chunk_by_chunk(codec: Codec, x: Tensor, cuts: list[int]) -> None:
    chunked = ChunkedCodec(codec)
    whole, length = codec.encode(x), x.shape[2]
    assert length < 41 or len(whole.unique()) > 30
    state, codes, begin = None, [], 0
    for end in [*(cut for cut in cuts if cut < length), length]:
        part, state = chunked.encode_chunk(x[:, :, begin:end], state, last=end == length)
        codes.append(part)
        begin = end
    assert torch.equal(torch.cat(codes, 2), whole)
    state, signal, begin = None, [], 0
    for end in sorted({min(2, whole.shape[2]), min(3, whole.shape[2]), whole.shape[2]}):
        part, state = chunked.decode_chunk(whole[:, :, begin:end], state)
        signal.append(part)
        begin = end
    wanted = codec.decode(whole)
    torch.testing.assert_close(torch.cat(signal, 2), wanted, rtol=0, atol=1e-5 * wanted.abs().max().item())


@torch.no_grad()
@pytest.mark.filterwarnings("ignore:.*torch.jit.script.*:FutureWarning")
@pytest.mark.parametrize("units", [pytest.param("split", marks=pytest.mark.slow), "factorized"])
def test_they_script_with_a_mask(units):
    form = {"width": 4, "base": 4, "strides": [2], "multipliers": [1, 2], "depth": 1, "units": units, "window": 2}
    networks: list[nn.Module] = [ResNetEncoder(**form).eval(), ResNetDecoder(**form).eval()]
    encode, decode = (torch.jit.script(network) for network in networks)
    x, mask = torch.randn(2, 3, 6, 4, 4), torch.arange(12) < torch.tensor([[12], [4]])
    latents = networks[0](x, mask)
    torch.testing.assert_close(encode(x, mask), latents)
    torch.testing.assert_close(decode(latents, mask, [3, 2, 2]), networks[1](latents, mask, [3, 2, 2]))


IMAGE = {"width": 4, "base": 4, "strides": [2], "multipliers": [1, 2], "depth": 1, "dims": 2, "units": "joint"}


@torch.no_grad()
@pytest.mark.filterwarnings("ignore:.*torch.jit.script.*:FutureWarning")
def test_those_of_images_script_with_a_mask():
    """With all that only images have: group norms, attention after units, shuffled pixels, modulated stages."""
    torch.manual_seed(0)
    form = {**IMAGE, "causal": False, "groups": 2, "deepest_attention": True, "wavelets": 1}
    networks = [ResNetEncoder(**form).eval(), ResNetDecoder(**form, shuffle=True, modulated=True).eval()]
    encode, decode = (torch.jit.script(network) for network in networks)
    x, mask = torch.randn(2, 3, 16, 8), torch.arange(8) < torch.tensor([[8], [4]])
    latents = networks[0](x, mask)
    torch.testing.assert_close(encode(x, mask), latents)
    torch.testing.assert_close(decode(latents, mask, [4, 2]), networks[1](latents, mask, [4, 2]))


@torch.no_grad()
@pytest.mark.parametrize(("form", "exact"), [({}, True), ({"groups": 2}, False), ({"attention": True}, False)])
def test_norms_of_each_position_give_a_tile_the_latents_of_the_whole(form, exact):
    """Behind what convolutions see of a border; group norms and attention see all of a tile."""
    torch.manual_seed(0)
    network = ResNetEncoder(**IMAGE | {"causal": False, "attention": False, "middle": 0} | form).eval()
    image = torch.randn(1, 3, 48, 48)
    whole = network(image).mT.reshape(4, 24, 24)[:, :16, :16]
    off = (network(image[:, :, :32, :32]).mT.reshape(4, 16, 16) - whole).abs().amax(0)
    assert off[-1, -1] > 1e-3
    assert (off[:8, :8].max() < 1e-6) == exact


@torch.no_grad()
def test_modulation_follows_the_latents_mean_and_deviation():
    torch.manual_seed(0)
    decoder = ResNetDecoder(**IMAGE, causal=False, groups=2, attention=False, modulated=True).eval()
    latents = torch.randn(1, 4, 4)
    (modulation, *_), x = decoder.modulations, torch.randn(1, 8, 3, 3)
    inputs = (latents, latents.flip(1), 2 * latents, latents + 1)
    same, flipped, wider, higher = (modulation(x, given, None, None) for given in inputs)
    torch.testing.assert_close(flipped, same)
    assert (wider - same).abs().max() > 0.01 < (higher - same).abs().max()
    assert obstacle(decoder) and obstacle(modulation) == "a modulation's statistics are of the whole signal"


@pytest.mark.parametrize(
    ("form", "told"),
    [
        ({"dims": 4}, "dims=4 should be 2 for images or 3 for clips"),
        ({"causal": True}, "an image has causal=false and window=null"),
        ({"units": "split"}, "units=split is for clips; an image's are joint"),
        ({"dims": 3, "causal": True, "groups": 2}, "a causal codec can't have group norms"),
        ({"strides": [[2, 1]], "shuffle": True}, "shuffle is for images, with equal strides"),
    ],
)
def test_what_does_not_fit_is_told(form, told):
    with pytest.raises(UserError, match=told):
        ResNetDecoder(**{**IMAGE, "causal": False, **form})


def test_changes_of_rate_of_vidtok_see_their_neighbors_and_start_as_means():
    """VidTok's steps in time are of three axes; Cosmos', like its units, of time alone."""
    for units, side in (("split", 3), ("factorized", 1)):
        for network in (ResNetEncoder, ResNetDecoder):
            made = network(width=4, base=4, strides=[[2, 1, 1]], multipliers=[1, 1], units=units)
            (step,) = made.downs if network is ResNetEncoder else made.ups
            assert step.along.kernel == (3, side, side)
            assert step.blend.sigmoid().item() == pytest.approx(0.88, abs=0.01)


def test_norms_keep_half_precision():
    """Under autocast, a float32 result would have what follows run at twice the bytes."""
    x = torch.randn(2, 4, 3, 2, 2)
    torch.testing.assert_close(ChannelNorm(4, 3)(x.bfloat16()), ChannelNorm(4, 3)(x).bfloat16(), rtol=0.02, atol=0.02)
