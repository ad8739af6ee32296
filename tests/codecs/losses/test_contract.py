"""Every configured loss term keeps its contract: a scalar, least for equal signals, deaf to padding."""

from typing import Any

import pytest
import torch
from omegaconf import OmegaConf
from torch import Tensor

from varitok.codecs.build import build
from varitok.codecs.losses.contract import LossTerm, SignalTerm
from varitok.codecs.losses.feature_hooks import capture
from varitok.codecs.losses.guided import Contrast
from varitok.codecs.losses.objective import Objective
from varitok.data.teachers.classifiers import has_efficientnet_lite
from varitok.data.teachers.vision import RandomTeacher

from ..examples import CONFIGS, clip_codec, read_config

SHAPES = {"spectral": (3, 2, 4000), "structure": (3, 3, 32, 32), "perceptual": (3, 3, 32, 32)}  # else clips
WEIGHTS = ("LPIPS", "Perceptual", "FlowConsistency", "torchvision_classifier")  # have tests of their own, with files


def configured(group: str) -> dict[str, Any]:
    """Return the configurations of all terms of a group, each once."""
    found: dict[str, Any] = {}
    for path in sorted((CONFIGS / group).glob("*.yaml")):
        config = OmegaConf.merge(read_config(group, path.stem), {"data": {"sample_rate": 16000, "channels": 1}})
        for name, term in config.terms.items():
            if term is not None and not any(word in str(term.module) for word in WEIGHTS):
                module = OmegaConf.create({"data": config.data, "module": term.module})
                found.setdefault(str(term.module), (f"{path.stem}.{name}", module))
    return dict(found.values())


TERMS, GUIDES = configured("objective"), configured("guide")
if has_efficientnet_lite():
    TERMS |= configured("perceptual")


def made(name: str) -> tuple[SignalTerm, Tensor, Tensor]:
    """Build a term, and signals that it compares, one with more noise."""
    module = TERMS[name].module
    shape = SHAPES.get(module["_target_"].split(".")[-2], (3, 3, 7, 16, 16))
    random = torch.Generator().manual_seed(0)
    real = torch.rand(shape, generator=random) - 0.5
    return build(module), real + 0.2 * torch.randn(shape, generator=random), real


@pytest.mark.parametrize("name", TERMS)
def test_it_is_least_for_equal_signals_and_rises_with_the_error(name: str) -> None:
    term, fake, real = made(name)
    assert isinstance(term, SignalTerm)
    fake, lengths = fake.requires_grad_(), torch.full((3,), real.shape[2])
    none, near, far = (term(real + share * (fake - real), real, lengths) for share in (0.0, 0.3, 1.0))
    assert far.shape == () and far.dtype == torch.float32
    assert none < near < far
    assert none.item() == pytest.approx(-80 if name.endswith("si_sdr") else 0, abs=1e-5)
    far.backward()
    assert fake.grad is not None and fake.grad.isfinite().all() and fake.grad.any()


@pytest.mark.parametrize("name", TERMS)
def test_padding_is_passed_over(name: str) -> None:
    """A padded batch is the mean of its samples by themselves, whatever the padding holds."""
    term, fake, real = made(name)
    sound, image = real.ndim == 3, real.ndim == 4
    counts = [4000, 1, 1111] if sound else [32] * 3 if image else [5] * 3  # of clips some terms weigh frames alike
    alone = [term(fake[i : i + 1, :, :n], real[i : i + 1, :, :n], torch.tensor([n])) for i, n in enumerate(counts)]
    for row, count in enumerate(counts):
        fake[row, :, count:], real[row, :, count:] = float("nan") if sound else 3.0, 7.0
    fake.requires_grad_()
    value = term(fake, real, torch.tensor(counts))
    torch.testing.assert_close(value, torch.stack(alone).mean(), atol=1e-5, rtol=1e-5)
    value.backward()
    assert fake.grad is not None and fake.grad.isfinite().all()
    assert not any(fake.grad[row, :, count:].any() for row, count in enumerate(counts))


@pytest.mark.parametrize("name", GUIDES)
def test_a_guided_term_reaches_the_codec_and_passes_over_padding(name: str) -> None:
    """By a teacher of random weights, with clips."""
    config = OmegaConf.merge(GUIDES[name], {"module": {"teacher": "random"}}).module
    if "at" in config:
        config = OmegaConf.merge(config, {"at": "project_in", "num_codebooks": None, "dim": None})
    term, codec = build(config), clip_codec()
    assert isinstance(term, LossTerm) and not isinstance(term, SignalTerm)
    objective = Objective({"one": {"weight": 1.0, "module": term}}, teachers={"random": RandomTeacher(6, 4)})
    objective.bind(codec)
    real, lengths = torch.rand(2, 3, 5, 16, 16) * 2 - 1, torch.tensor([5, 1])
    real[1, :, 1:] = 0

    def loss(real: Tensor, lengths: Tensor) -> Tensor:
        with capture(codec, objective.taps, real, lengths) as inside:
            result = codec(real, codec.layout.valid(lengths, real.shape[2:]))
        return objective(result.signal, real, lengths, guidance=objective.guidance(real, lengths, inside))[0]

    value = loss(real, lengths)
    assert value.shape == () and value.isfinite()
    value.backward()
    learns = [weight for part in (codec.project_in, term) for weight in part.parameters()]
    assert all(weight.grad is not None and weight.grad.any() for weight in learns)
    if not isinstance(term, Contrast):  # which compares each signal with the others
        alone = [loss(real[i : i + 1, :, :n], torch.tensor([n])) for i, n in enumerate(lengths.tolist())]
        torch.testing.assert_close(value, torch.stack(alone).mean(), atol=1e-4, rtol=1e-4)
