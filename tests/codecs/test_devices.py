"""All parts of a codec compute on the device of their input, and never wait for it; a fake GPU stands in for one.

FakeTensorMode follows shapes, types and devices without data, so an operation between a GPU's tensor and a CPU's
raises as it does on a GPU, and so does reading a value.
"""

from itertools import chain

import pytest
import torch
import torch.distributed.tensor  # before the fixture replaces torch.Generator, which its annotations read
from omegaconf import DictConfig, OmegaConf
from torch import Tensor, nn
from torch._subclasses.fake_tensor import DynamicOutputShapeException, FakeTensorMode

from varitok.codecs.bottlenecks.statistics import MovingCodebook
from varitok.codecs.build import build, build_codec
from varitok.codecs.codec import Codec
from varitok.codecs.lengths.policy import BatchShard
from varitok.codecs.losses.feature_hooks import capture
from varitok.codecs.unregistered import FrozenModules
from varitok.export.exporters.frozen import freeze

from ..composing import composed
from .examples import CONFIGS, EXAMPLES, example, shrink, shrink_scales


@pytest.fixture
def gpu(monkeypatch):
    """A fake GPU with autocast, as a mode."""
    monkeypatch.setattr("torch.cuda.amp.common.amp_definitely_not_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda *_, **__: True)
    random, rand = torch.Generator(), torch.rand
    monkeypatch.setattr(torch, "Generator", lambda *_: random)  # there is none on a GPU
    # One number is drawn on the CPU, to be read there.
    monkeypatch.setattr(torch, "rand", lambda *size, **how: rand(*size, **how) if size != ((),) else torch.tensor(0.5))
    return FakeTensorMode(allow_non_fake_inputs=True)


def moved(module: nn.Module, mode: FakeTensorMode) -> nn.Module:
    """Move a module's parameters and buffers to the fake GPU."""
    frozen = [part.networks.values() for part in module.modules() if isinstance(part, FrozenModules)]
    with mode:
        for part in chain(module.modules(), *(network.modules() for network in chain(*frozen))):
            for tensors in (part._parameters, part._buffers):
                for name, value in tensors.items():
                    if value is not None:
                        there = mode.from_tensor(value.detach()).to("cuda")
                        learns = value.requires_grad
                        tensors[name] = nn.Parameter(there, learns) if tensors is part._parameters else there
            if isinstance(part, MovingCodebook):  # in the middle of a run
                part.ready, part.seed = True, 1
    return module


SUMS = ("hierarchy", "rvq_multirate", "rvq_split")  # began their sums on the CPU
SMALL = sorted(
    path.relative_to(CONFIGS / "experiment").with_suffix("").as_posix()
    for path in (CONFIGS / "experiment").rglob("*.yaml")
    if path.stem.endswith(("_small", "_64", "demo"))
    and not path.stem.startswith(("nerv", "base"))
    and path.parent.name in ("image", "audio", "video")
)


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.slow] * (name not in SUMS)) for name in EXAMPLES]
)
def test_a_bottleneck_computes_where_its_input_is(gpu, name):
    live, frozen = moved(example(name), gpu), moved(example(name).eval().frozen(), gpu)
    found = []
    with gpu, torch.autocast("cuda", torch.bfloat16, cache_enabled=False):
        latents = torch.empty(2, 9, live.inputs, device="cuda", requires_grad=True)
        with torch.no_grad():
            for module in (frozen, live.eval()):
                codes = module.encode(latents)
                found += [codes, module.decode(codes[:, :1] if live.codebook_sizes else codes)]
        lengths = torch.full((2,), 7, device="cuda")
        try:
            quantized = live.train()(latents, lengths, live.depths(latents))
            assert quantized.latents.dtype == torch.float32
            found += [quantized.latents, quantized.codes, *quantized.penalties.values(), *quantized.metrics.values()]
        except DynamicOutputShapeException:
            assert name.startswith("library")  # some of vector-quantize-pytorch's layers index by masks
        live.update()
    assert {value.device.type for value in found} == {"cuda"}


def small(experiment: str) -> DictConfig:
    """Compose an experiment with narrow networks."""
    config = composed(f"experiment={experiment}")
    OmegaConf.set_struct(config, False)
    shrink(config.codec)
    shrink_scales(config)
    shrink(config.objective, {"width": 2, "layers": 1})
    return config


def signal_of(codec: Codec, config: DictConfig) -> Tensor:
    """Return two signals of a few steps, on the fake GPU."""
    if codec.sample_rate:
        grid = [24 * codec.downsample[0]]
    elif len(codec.downsample) == 2:
        grid = [config.data.image_size] * 2
    else:
        sides = (codec.encoder.rows or 4, codec.encoder.columns or 4)
        across = [side * step for side, step in zip(sides, codec.downsample[1:], strict=True)]
        grid = [3 * codec.downsample[0] - codec.layout.causal_pad, *across]
    return torch.empty(2, codec.encoder.channels, *grid, device="cuda")


class _StandIn(nn.Module):
    """In the place of a term that needs weights."""

    def forward(self, fake: Tensor, real: Tensor) -> Tensor:
        return (fake - real).square().mean((1, 2, 3))


@pytest.mark.slow
@pytest.mark.parametrize("experiment", SMALL)
def test_a_codec_its_objective_and_discriminator_compute_where_the_signal_is(gpu, monkeypatch, experiment):
    monkeypatch.setattr("varitok.codecs.losses.perceptual.LPIPS", lambda net: _StandIn())
    config = small(experiment)
    codec, objective = build_codec(config).train(), build(config.objective)
    objective.bind(codec)
    frozen = moved(freeze(build_codec(config).eval()), gpu)
    codec, objective = moved(codec, gpu), moved(objective, gpu)
    adversarial, layout = objective.adversarial, codec.layout
    with gpu:
        real = signal_of(codec, config)
    size = real.shape[2:]
    dealt = BatchShard(blocks=layout.blocks(size))
    kept = codec.length.sample(2 * dealt.blocks, layout.count(size), codec.num_codebooks, dealt=dealt)
    with gpu, torch.autocast("cuda", torch.bfloat16, cache_enabled=False):
        lengths = torch.full((2,), size[0], device="cuda")
        tokens = torch.minimum(kept.lengths.cuda(), layout.valid(lengths, size))
        for padded in (False, True):
            shown = tokens if padded or layout.ordered else None
            valid = lengths if padded else None
            with capture(codec, objective.taps, real, valid) as inside:
                result = codec(real, shown, kept.n_codebooks.cuda(), None if padded else kept.common)
            guidance = objective.guidance(real, valid, inside)
            losses = [*result.quantized.penalties.values()]
            if adversarial:
                adversarial.start = adversarial.head_start = adversarial.ramp = 0
                losses.append(adversarial.discriminator_loss(result.signal, real, valid)[0])
            try:
                losses.append(objective(result.signal, real, valid, 10**7, guidance)[0])
            except DynamicOutputShapeException:
                assert padded and len(size) == 3  # image terms of clips choose valid frames
            assert {value.device.type for value in (result.signal, *losses)} == {"cuda"}
            codec.bottleneck.update()
        with torch.no_grad():
            for module in (codec.eval(), frozen):
                codes = module.encode(real)
                assert codes.device.type == module.decode(codes).device.type == "cuda"
