"""A steady update waits for the device nowhere but in a `Readout`: one GPU, and one of several."""

import traceback
from collections import Counter

import pytest
import pytorch_lightning as pl
import torch
import torch.distributed as dist
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode

from varitok.codecs.training.callbacks.stopping import Stopping
from varitok.codecs.training.distributed.strategy import Parallel
from varitok.codecs.training.run import build_run

from ..examples import QUIET
from .test_guard import EMA, GRADIENT, LATENTS, Poison, same
from .test_survival import logged
from .test_training import ADVERSARIAL, compose

FUSED = ["+optim.codec.fused=true", "+optim.discriminator.fused=true"]
SUM = dist.ReduceOp.SUM
ROOMS = (".pkg/varitok/", "/pytorch_lightning/", "/optim/")
WAITS = {"_local_scalar_dense", "nonzero", "masked_select", "bincount", "equal", "is_nonzero"}


class Waits(TorchDispatchMode):
    """Counts operations for whose result the host would wait on a GPU, by the function that calls them."""

    def __init__(self):
        super().__init__()
        self.on = False
        self.found = Counter()

    def count(self):
        if not self.on:
            return
        place = [one for one in traceback.extract_stack() if any(room in one.filename for room in ROOMS)][-1]
        name = "/".join(place.filename.split("/")[-2:])
        if not name.startswith(("data/", "lengths/")):  # batches and lengths are on the host
            self.found[f"{name}:{place.name}"] += 1

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func._schema.name.partition("::")[2] in WAITS:
            self.count()
        return func(*args, **(kwargs or {}))


class Late(pl.Callback):
    """Reads verdicts an update late, as on a GPU."""

    def on_train_start(self, trainer, pl_module):
        assert pl_module.can_be_late()
        pl_module.late = True


class Steady(Late):
    """Counts the waits of two updates in the middle of a run, the loop's own included."""

    def __init__(self):
        self.waits = Waits()

    def on_train_batch_start(self, trainer, pl_module, *_):
        self.waits.on = 4 <= pl_module.update < 6


@pytest.fixture(params=[1, 2])
def processes(request, monkeypatch):
    if request.param == 2:  # this one, and one that always says the same
        for name, value in {
            "RANK": 0,
            "LOCAL_RANK": 0,
            "GROUP_RANK": 0,
            "WORLD_SIZE": 2,
            "LOCAL_WORLD_SIZE": 2,
        }.items():
            monkeypatch.setenv(name, str(value))
        monkeypatch.setenv("TORCHELASTIC_RUN_ID", "x")
        monkeypatch.setattr(dist, "all_reduce", lambda one, op=SUM, **_: one.mul_(2) if op == SUM else None)
        monkeypatch.setattr(Parallel, "watch", lambda self, part: None)  # DDP's reducers need real collectives
        dist.init_process_group("fake", rank=0, world_size=2, store=FakeStore())
    yield request.param
    if dist.is_initialized():
        dist.destroy_process_group()


def test_a_steady_update_waits_for_nothing(tmp_path, monkeypatch, processes):
    words = [f"trainer.devices={processes}", *(["trainer.strategy=ddp"] if processes > 1 else [])]
    run = build_run(compose(*QUIET, *ADVERSARIAL, *FUSED, *words, "updates=7", "training.log_every=100"), tmp_path)
    steady, tolist = Steady(), torch.Tensor.tolist  # which isn't dispatched
    monkeypatch.setattr(torch.Tensor, "tolist", lambda one: [steady.waits.count(), tolist(one)][1])
    run.trainer.callbacks = [steady, *(one for one in run.trainer.callbacks if isinstance(one, Stopping))]
    with steady.waits:
        run.trainer.fit(run.module, run.data)
    # The guard's verdict, and the signal that the processes agree on, of the update before.
    assert steady.waits.found == {"training/readout.py:read": 2 * processes}
    assert run.module.update == 7 and not run.module.guard.refused


@pytest.mark.parametrize(("where", "words"), [(LATENTS, EMA), (GRADIENT, ADVERSARIAL)], ids=[LATENTS, GRADIENT])
def test_a_verdict_read_late_changes_nothing(tmp_path, caplog, where, words):
    class Unseen(Poison):
        on_train_batch_start = pl.Callback.on_train_batch_start  # reading the state reads the verdict

    words = [*QUIET, *words, *FUSED, "updates=9", "training.log_every=4", "checkpoint.every=3"]
    states, said = [], []
    for late in (False, True):
        run = build_run(compose(*words), tmp_path / str(late))
        run.trainer.callbacks[:0] = [Unseen(where, {1, 3, 4}), *([Late()] if late else [])]
        run.trainer.fit(run.module, run.data)
        assert run.module.late == late and run.module.guard.refused == 3
        states.append(torch.load(tmp_path / str(late) / "checkpoints/last.ckpt", weights_only=True))
        said.append([line for line in caplog.messages if "was refused" in line])
        caplog.clear()
    assert said[0] == said[1] and len(said[0]) == 3
    for part in ("state_dict", "unread"):
        assert same(*(flat(state[part]) for state in states))
    assert same(*(flat(state["optimizer_states"]) for state in states))
    assert sorted(logged(tmp_path / "True")) == sorted(logged(tmp_path / "False"))


def flat(values, name=""):
    """Map the path of each tensor or number in nested containers to it, as a tensor."""
    if isinstance(values, (dict, list, tuple)):
        items = values.items() if isinstance(values, dict) else enumerate(values)
        return {key: one for item, value in items for key, one in flat(value, f"{name}/{item}").items()}
    return {} if values is None or isinstance(values, str) else {name: torch.as_tensor(values)}
