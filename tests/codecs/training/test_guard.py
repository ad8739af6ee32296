"""Refused updates: a value that isn't finite, or a spike, leaves no trace, on all processes alike."""

import copy
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import pytorch_lightning as pl
import torch

from varitok import UserError
from varitok.codecs.losses.adversarial import Adversarial
from varitok.codecs.losses.balancer import Balancer
from varitok.codecs.training.guard import Guard
from varitok.codecs.training.run import build_run

from ..examples import QUIET
from .test_survival import logged
from .test_training import ADVERSARIAL, RESIDUAL, compose

ROOT = Path(__file__).parents[3]
LATENTS, LOSS, GRADIENT = "latents", "loss", "gradient"


class Poison(pl.Callback):
    """Spoils what goes through chosen updates; remembers the state before and behind each update."""

    def __init__(self, where, updates, factor=float("nan")):
        self.where = where
        self.updates = updates
        self.factor = factor
        self.states = {}

    def on_train_start(self, trainer, module):
        self.module = module

        def spoiled(value):
            return value * self.factor if module.update in self.updates else value

        if self.where == LATENTS:
            module.codec.encoder.register_forward_hook(
                lambda _, __, latents: torch.cat([spoiled(latents[:1]), latents[1:]]) if module.training else latents
            )
        elif self.where == LOSS:
            loss = module.codec_loss

            def spoiled_loss(*given):
                total, terms = loss(*given)
                return spoiled(total), terms

            module.codec_loss = spoiled_loss
        else:
            next(module.codec.parameters()).register_hook(spoiled)

    def on_train_batch_start(self, trainer, module, *_):
        self.states[module.update] = copy.deepcopy(state(module))

    def on_train_end(self, trainer, module):
        self.states[module.update] = copy.deepcopy(state(module))


def state(module):
    """Return the state that a refused update must not change."""
    kept = {name: value for name, value in module.state_dict().items() if name != "updates"}
    of = module.trainer.optimizers[0].state_dict()["state"]
    return kept | {f"{key}/{name}": value for key, values in of.items() for name, value in values.items()}


def same(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def poisoned(folder, poison, *overrides):
    run = build_run(compose(*QUIET, *overrides), folder)
    run.trainer.callbacks.insert(0, poison)
    run.trainer.fit(run.module, run.data, ckpt_path=run.resume, weights_only=True)
    return run


EMA = ["bottleneck=vq_ema", "bottleneck.dim=8", "bottleneck.codebook_size=16"]


@pytest.mark.parametrize(
    ("where", "extra"),
    [
        (LATENTS, RESIDUAL),
        (LOSS, EMA),
        (GRADIENT, ["bottleneck=kl"]),
    ],
    ids=lambda value: value if isinstance(value, str) else value[0],
)
def test_what_is_not_finite_leaves_no_trace(tmp_path, where, extra, caplog):
    poison = Poison(where, {1, 3})
    run = poisoned(tmp_path, poison, *extra, "updates=6", "training.log_every=1")
    for update in range(1, 6):
        assert same(poison.states[update], poison.states[update + 1]) == (update in poison.updates)
    assert run.module.update == 6 and run.module.guard.refused == 2
    assert all(value.isfinite().all() for value in run.module.state_dict().values() if value.is_floating_point())
    assert caplog.text.count("was refused: ") == 2 and "its batch: signal " in caplog.text
    refused = {int(update): float(value) for update, name, value in logged(tmp_path)[1:] if name == "refused"}
    assert refused == {2: 1, 3: 1, 4: 2, 5: 2, 6: 2}
    losses = [float(value) for _, name, value in logged(tmp_path)[1:] if name == "loss"]
    assert len(losses) == 4 and all(map(math.isfinite, losses))


def test_a_discriminator_does_not_learn_from_it(tmp_path):
    poison = Poison(LATENTS, {2}, factor=1e30)
    run = poisoned(tmp_path, poison, *ADVERSARIAL, "objective.adversarial.lecam=0.1", "updates=5")
    found = run.module.state_dict()
    assert all(value.isfinite().all() for value in found.values() if value.is_floating_point())


def test_averages_of_losses_pass_over_what_is_not_finite():
    balancer = Balancer(decay=0.5)
    balancer.track(["l1"])
    signal = torch.ones(2, 3, requires_grad=True)
    for factor in (1.0, float("nan"), 1.0):
        balancer({"l1": (factor * signal).abs().mean()}, {"l1": 1.0}, signal)
    assert float(balancer.norm_l1 / balancer.share_l1) == pytest.approx(2 * 3**0.5 / 6)
    adversarial = Adversarial(torch.nn.Identity(), lecam=1.0)
    adversarial._follow(torch.tensor(1.0), torch.tensor(-1.0))
    before = adversarial.real_average.clone()
    adversarial._follow(torch.tensor(float("inf")), torch.tensor(float("nan")))
    assert torch.equal(adversarial.real_average, before)


@pytest.mark.slow
def test_a_jump_is_refused_where_it_is_asked_for(tmp_path):
    words = ["updates=26", "training.log_every=100", "checkpoint.every=100"]
    for spike, refused in ((None, 0), (50, 1)):
        poison = Poison(GRADIENT, {23}, factor=1e6)
        given = [] if spike is None else [f"training.guard.spike={spike}"]
        run = poisoned(tmp_path / str(spike), poison, *words, *given)
        assert run.module.guard.refused == refused
        assert same(poison.states[23], poison.states[24]) == bool(refused)


@pytest.mark.slow
def test_too_many_in_a_row_end_the_run_with_its_state_saved(tmp_path):
    poison = Poison(LOSS, range(3, 99))
    words = ["updates=20", "training.guard.patience=4", "checkpoint.every=2"]
    told = r"4 updates in a row were refused \(latents or loss are not finite\).*lower optim\.codec\.lr"
    with pytest.raises(UserError, match=told):
        poisoned(tmp_path, poison, *words)
    saved = torch.load(tmp_path / "checkpoints/last.ckpt", weights_only=True)["state_dict"]
    assert saved.pop("updates") == 7
    assert all(torch.equal(value, poison.states[3][name]) for name, value in saved.items())
    again = poisoned(tmp_path, Poison(LOSS, ()), *words)
    assert again.module.update == 20 and again.module.guard.refused == 4


def test_a_run_goes_back_to_its_last_checkpoint_once(tmp_path, caplog):
    words = ["updates=20", "training.guard.patience=3", "training.guard.roll_back=true", "checkpoint.every=4"]
    poison = Poison(LOSS, {6, 7, 8})
    run = poisoned(tmp_path / "once", poison, *words)
    assert run.module.update == 20 and "back to the weights of" in caplog.text
    assert same(poison.states[4], poison.states[9]) and not same(poison.states[8], poison.states[9])
    with pytest.raises(UserError, match="3 updates in a row were refused"):
        poisoned(tmp_path / "twice", Poison(LOSS, {6, 7, 8, 10, 11, 12}), *words)


@pytest.mark.parametrize(("key", "value"), [("patience", 0), ("spike", 1)])
def test_what_the_guard_takes_is_told(tmp_path, key, value):
    with pytest.raises(UserError, match=rf"training\.guard\.{key}={value}: must be"):
        build_run(compose(f"training.guard.{key}={value}"), tmp_path)


def test_it_remembers():
    guard, other = Guard(spike=10), Guard(spike=10)
    for norm in range(1, 40):
        assert guard.accepts(torch.tensor(float(norm)))
    other.restore(guard.state(), 0, torch.device("cpu"))
    assert not other.accepts(torch.tensor(1000.0)) and other.why == "the gradient's norm of 1e+03 is 50 times the usual"
    assert guard.accepts(torch.tensor(150.0))


SCRIPT = """
import sys
import pytest
import torch
import torch.distributed as dist
sys.path[:0] = {paths!r}
from tests.codecs.training.test_guard import QUIET, Poison, compose, state
from varitok.codecs.training.run import build_run

def main(folder):
    run = build_run(compose(*QUIET, *{words!r}), __import__("pathlib").Path(folder))
    poison = Poison("latents", set())
    run.trainer.callbacks.insert(0, poison)
    setup = run.module.on_fit_start
    def only_the_second():
        setup()
        if run.module.global_rank == 1:
            poison.updates = {{2, 4}}
    run.module.on_fit_start = only_the_second
    run.trainer.fit(run.module, run.data)
    torch.save([run.module.guard.refused, poison.states], f"{{folder}}/{{run.module.global_rank}}.pt")

if __name__ == "__main__":
    main(sys.argv[1])
"""


@pytest.mark.slow
def test_all_processes_refuse_what_one_of_them_can_not_take(tmp_path):
    words = [*EMA, "trainer.devices=2", "trainer.strategy=ddp_find_unused_parameters_true", "updates=6"]
    script = tmp_path / "script.py"
    script.write_text(SCRIPT.format(paths=[str(ROOT), str(ROOT / ".pkg")], words=words))
    done = subprocess.run(
        [sys.executable, str(script), str(tmp_path)],
        capture_output=True, text=True, check=False, env=os.environ | {"OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    (refused, states), (refused_too, states_too) = (torch.load(tmp_path / f"{rank}.pt") for rank in range(2))
    assert refused == refused_too == 2
    for update in range(1, 7):
        assert same(states[update], states_too[update])
        if update < 6:
            assert same(states[update], states[update + 1]) == (update in (2, 4))
