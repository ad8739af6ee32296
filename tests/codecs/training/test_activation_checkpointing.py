"""Activations that are made again: the same run to the bit, with less memory, and nothing left behind."""

from functools import partialmethod

import pytest
import torch

from varitok import UserError
from varitok.codecs.build import build_codec
from varitok.codecs.training.activation_checkpointing import ActivationCheckpointing, blocks
from varitok.codecs.training.run import build_run

from ...composing import composed
from ..examples import QUIET, TINY_CLIP, TINY_SOUND
from .test_survival import logged
from .test_training import ADVERSARIAL, TINY, compose, fit


@pytest.mark.parametrize(
    "words",
    [
        pytest.param(TINY + ADVERSARIAL, id="image"),
        pytest.param(TINY_SOUND, id="sound", marks=pytest.mark.slow),
        pytest.param(TINY_CLIP, id="clip", marks=pytest.mark.slow),
    ],
)
def test_a_run_is_the_same_to_the_bit(tmp_path, words):
    states = []
    for name, parts in (("plain", "[]"), ("recomputed", "[encoder,decoder]")):
        config = composed(*words, *QUIET, f"training.activation_checkpointing={parts}")
        run = build_run(config, tmp_path / name)
        run.trainer.fit(run.module, run.data)
        assert bool(run.module.recompute.forgetful) == (name == "recomputed")
        states.append((run.module.state_dict(), logged(tmp_path / name)))
    (one, log), (other, again) = states
    assert all(torch.equal(value, other[name]) for name, value in one.items())
    assert log == again


@pytest.mark.slow
def test_what_is_compiled_is_compiled_in_the_first_update(tmp_path, monkeypatch):
    compiled = []

    def noted(graph, _):
        compiled.append(run.module.update)
        return graph

    monkeypatch.setattr(torch.nn.Module, "compile", partialmethod(torch.nn.Module.compile, backend=noted))
    logs = []
    for name, parts in (("plain", "[]"), ("compiled", "[encoder,decoder,discriminator,losses]")):
        words = [
            *QUIET,
            *ADVERSARIAL,
            f"training.compile={parts}",
            "training.activation_checkpointing=[encoder,decoder]",
            "training.log_every=1",
        ]
        run = build_run(compose(*words), tmp_path / name)
        run.trainer.fit(run.module, run.data)
        logs.append([float(row[2]) for row in logged(tmp_path / name) if row[1] == "loss"])
    assert set(compiled) == {0, 1, 2}  # the discriminator begins in the second, and is heard from the third
    assert len(logs[0]) == 4 and logs[0] == pytest.approx(logs[1], abs=1e-5)


def test_chance_in_a_block_is_the_same_both_times():
    block = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.Dropout(0.5), torch.nn.Linear(8, 8))
    network = torch.nn.ModuleList([block])
    gradients = []
    for parts in ([], [network]):
        torch.manual_seed(3)
        block.zero_grad()
        with ActivationCheckpointing(parts):
            loss = block(torch.ones(64, 8)).square().sum()
        torch.rand(5)  # chance between the two passes
        loss.backward()
        gradients.append(block[0].weight.grad.clone())
    assert torch.equal(*gradients)


def kept(codec, parts, signal):
    """Count the bytes that the forward pass keeps for the backward pass, beside the weights."""
    storages = {}
    weights = {parameter.untyped_storage().data_ptr() for parameter in codec.parameters()}

    def pack(tensor):
        storages[tensor.untyped_storage().data_ptr()] = tensor  # held, so that no address comes twice
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor), ActivationCheckpointing(parts):
        codec(signal)
    return sum(tensor.untyped_storage().nbytes() for address, tensor in storages.items() if address not in weights)


@pytest.mark.parametrize("words", [TINY, ["experiment=audio/demo"], TINY_CLIP], ids=["image", "sound", "clip"])
def test_less_is_kept(words):
    codec = build_codec(composed(*words))
    assert all(blocks(part) for part in (codec.encoder, codec.decoder))
    size = {1: (2, 1, 8000), 2: (2, 3, 16, 16), 3: (2, 3, 5, 16, 16)}[len(codec.downsample)]
    signal = torch.rand(size)
    assert kept(codec, [codec.encoder, codec.decoder], signal) < 0.8 * kept(codec, [], signal)


def test_networks_are_left_as_they_were(tmp_path):
    run = fit(tmp_path, *QUIET, "training.activation_checkpointing=[encoder,decoder]", "training.ema_decay=0")
    assert not any("forward" in vars(module) for module in run.module.evaluated.modules())


def test_a_bottleneck_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"training\.activation_checkpointing: a bottleneck updates codebooks in"):
        build_run(compose("training.activation_checkpointing=[bottleneck]"), tmp_path)
    with pytest.raises(UserError, match=r"training\.activation_checkpointing: the codec has no part 'encodr'"):
        build_run(compose("training.activation_checkpointing=[encodr]"), tmp_path)
