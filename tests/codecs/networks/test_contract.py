"""Every preset's networks keep their contract: attributes, shapes, lengths, gradients, chunks."""

import math
from functools import cache

import pytest
import torch
from omegaconf import DictConfig, OmegaConf
from torch import Tensor

from varitok.codecs.build import build
from varitok.codecs.networks.contract import Decoder, Encoder
from varitok.codecs.streaming import arrange, obstacle

from ..examples import CONFIGS, read_config, shrink

PRESETS = sorted(
    path.stem for path in (CONFIGS / "codec").glob("*.yaml") if not path.stem.startswith("nerv")
)  # one has no encoder
DATA = {"sample_rate": 16000, "frame_rate": 8.0, "clips": {"frame_rate": 8.0}, "image_size": 32, "channels": 1}
SIZES = {"base": 8, "width": 8, "hidden": 8, "heads": 1, "depth": 1, "groups": 4}
SIZES |= {"bands": 8, "tokens": 5, "later_tokens": 3, "side": 2, "steps": 2}


def small(name: str) -> DictConfig:
    """Return a preset's configuration with narrow and shallow networks, and images of few patches."""
    config = OmegaConf.create({"codec": read_config("codec", name), "data": DATA})
    inner = {side: config.codec[side].get("inner") for side in ("encoder", "decoder")}
    shrink(config.codec, SIZES)
    for side, kind in inner.items():
        if kind is None:
            continue
        form = config.codec[side]
        last = form.base * (form.multipliers[-1] if form.get("multipliers") else 2 ** len(form.strides))
        depth = {"heads": 2, "window": 2} if "heads" in kind else {"depth": 1}
        form.inner = {"_target_": kind._target_, "width": last, **depth}
    for network in (config.codec.encoder, config.codec.decoder, config.codec.decoder.get("network") or {}):
        if "image_size" in network:
            patch = network.patch
            network.image_size = 2 * patch if isinstance(patch, int) else [2 * side for side in patch[1:]]
    return config


# Presets that differ in sizes alone are the same when small.
SMALL = {name: small(name) for name in PRESETS}
KINDS = {str(SMALL[name].codec.encoder) + str(SMALL[name].codec.decoder): name for name in reversed(PRESETS)}


@cache
def networks(name: str) -> tuple[Encoder, Decoder]:
    torch.manual_seed(0)
    encoder, decoder = build(SMALL[name].codec.encoder), build(SMALL[name].codec.decoder)
    with torch.no_grad():  # what starts as nothing is given weight
        for weight in [*encoder.parameters(), *decoder.parameters()]:
            weight.add_(0.1 * torch.randn_like(weight))
    return encoder.eval(), decoder.eval()


def grid_of(encoder: Encoder) -> list[int]:
    if len(encoder.downsample) < 3:
        return [3] if len(encoder.downsample) == 1 else [2, 2]  # images of the size of training
    return [3, 2, 2] if max(encoder.downsample) < 32 else [2, 1, 1]


def signals(encoder: Encoder) -> Tensor:
    size = [steps * hop for steps, hop in zip(grid_of(encoder), encoder.downsample, strict=True)]
    return torch.randn(2, encoder.channels, *size, generator=torch.Generator().manual_seed(0))


def near(found: Tensor, wanted: Tensor) -> None:
    torch.testing.assert_close(found, wanted, rtol=1e-3, atol=1e-4 * wanted.abs().max().item())


@pytest.mark.parametrize("name", sorted(set(KINDS.values())))
def test_weights_are_contiguous(name: str) -> None:
    """FSDP2 shards no others."""
    for network in networks(name):
        assert all(weight.is_contiguous() for weight in network.parameters())


@pytest.mark.parametrize("name", PRESETS)
def test_both_sides_tell_the_same(name: str) -> None:
    encoder, decoder = networks(name)
    assert isinstance(encoder, Encoder) and isinstance(decoder, Decoder)
    for key in (
        "downsample",
        "channels",
        "causal",
        "causal_pad",
        "tokens",
        "later_tokens",
        "rows",
        "columns",
        "direct",
    ):
        assert getattr(encoder, key) == getattr(decoder, key), key
    assert (
        len(encoder.downsample) in (1, 2, 3)
        and min(*encoder.downsample, encoder.channels, encoder.width, decoder.width) >= 1
    )
    assert encoder.causal_pad == (encoder.downsample[0] - 1 if encoder.causal and len(encoder.downsample) == 3 else 0)
    assert 0 <= encoder.later_tokens <= encoder.tokens


@pytest.mark.parametrize("name", KINDS.values())
def test_shapes_are_exact_and_every_weight_learns(name: str) -> None:
    encoder, decoder = networks(name)
    signal, grid = signals(encoder), grid_of(encoder)
    latents = encoder(signal)
    blocks = grid[0] if len(grid) == 3 else 1
    wanted = (2 * blocks, encoder.tokens) if encoder.tokens else (2, math.prod(grid))
    assert latents.shape == (*wanted, encoder.width) and decoder.width == encoder.width
    painted = decoder(latents, None, grid)
    assert painted.shape == signal.shape and painted.isfinite().all()
    weights = [*encoder.named_parameters(), *decoder.named_parameters()]
    if weights:
        found = torch.autograd.grad((painted * torch.randn_like(painted)).mean(), [weight for _, weight in weights])
        for (key, _), gradient in zip(weights, found, strict=True):
            assert gradient.isfinite().all() and gradient.any(), key


@torch.no_grad()
def test_waveforms_are_float32_under_autocast() -> None:
    """Spectral losses hear the noise of a bfloat16 waveform."""
    of_sounds = [name for name in KINDS.values() if len(networks(name)[0].downsample) == 1]
    assert len(of_sounds) > 5
    for name in of_sounds:
        encoder, decoder = networks(name)
        with torch.autocast("cpu", torch.bfloat16):
            assert decoder(encoder(signals(encoder)), None, grid_of(encoder)).dtype == torch.float32, name


@torch.no_grad()
@pytest.mark.parametrize("name", KINDS.values())
def test_a_padded_batch_is_its_single_items(name: str) -> None:
    encoder, decoder = networks(name)
    signal, grid = signals(encoder), grid_of(encoder)
    latents = encoder(signal)
    if encoder.tokens:  # a prefix alone equals the whole with the rest masked
        mask = (torch.arange(encoder.tokens) < 2).expand(len(latents), -1)
        near(decoder(latents, mask, grid), decoder(latents[:, :2], None, grid))
        near(decoder(latents[:, :2], None, grid[:1] if len(grid) == 3 else []), decoder(latents[:, :2], None, grid))
        return
    total, each = math.prod(grid), math.prod(grid[1:])
    mask = torch.arange(total) < torch.tensor([[total], [each]])
    signal[1, :, encoder.downsample[0] :] = 3.0
    latents = encoder(signal, mask)
    alone = encoder(signal[1:, :, : encoder.downsample[0]])
    near(latents[:1], encoder(signal[:1]))
    near(latents[1:, :each], alone)
    latents[1, each:] = 3.0
    painted = decoder(latents, mask, grid)
    near(painted[1:, :, : encoder.downsample[0]], decoder(alone, None, [1, *grid[1:]]))
    assert not painted[1, :, encoder.downsample[0] :].any()


@torch.no_grad()
@pytest.mark.parametrize("name", KINDS.values())
def test_chunks_are_the_whole(name: str) -> None:
    encoder, decoder = networks(name)
    if any(obstacle(network) for network in (encoder, decoder)) or (encoder.tokens and len(encoder.downsample) == 2):
        assert not encoder.causal
        return
    signal, grid = signals(encoder), grid_of(encoder)
    hop, latents = encoder.downsample, encoder(signal)
    rows = encoder.tokens * 2 if encoder.tokens else math.prod(grid[1:])  # of latents, to a step

    def read(begin: int, end: int, memory: list[Tensor]) -> Tensor:
        return encoder(signal[:, :, begin * hop[0] : end * hop[0]], None, memory)  # type: ignore[no-any-return]

    def paint(begin: int, end: int, memory: list[Tensor]) -> Tensor:
        steps = [end - begin, *grid[1:]]
        if encoder.tokens:
            some = latents.unflatten(0, (2, -1))[:, begin:end].flatten(0, 1)
        else:
            some = latents[:, begin * rows : end * rows]
        return decoder(some, None, steps, memory)  # type: ignore[no-any-return]

    for network, run, whole in ((encoder, read, latents), (decoder, paint, decoder(latents, None, grid))):
        shapes = arrange(network, lambda memory, run=run: run(0, 1, memory))  # type: ignore[misc]
        memory = [torch.zeros(0) for _ in shapes]
        first, rest = run(0, 1, memory), run(1, grid[0], memory)
        if network is decoder:
            near(torch.cat([first, rest], 2), whole)
        elif encoder.tokens:
            both = [part.unflatten(0, (2, -1)) for part in (first, rest)]
            near(torch.cat(both, 1).flatten(0, 1), whole)
        else:
            near(torch.cat([first, rest], 1), whole)
