"""No step of a steady update waits for the device: what would wait on a GPU is found in updates on a CPU.

A wait is an operation that needs a value, or a number of values, on the host: a tensor's truth, its items, the indices
of true elements, a copy that blocks. `test_devices.py` finds them too, in the parts of codecs, on a fake GPU.
"""

import os
import sys
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from varitok.codecs.bottlenecks.statistics import MovingCodebook
from varitok.codecs.training.run import build_run

from ..composing import composed
from .examples import TINY_CLIP, TINY_RUN, TINY_SOUND

ROOT = Path(__file__).parents[2]
# Operations whose result, or its size, depends on values.
READING = {
    *("_local_scalar_dense", "nonzero", "masked_select", "_unique2", "unique_dim", "unique_consecutive", "bincount"),
    *("equal", "unique_dim_consecutive", "is_nonzero"),
}
COPYING = {"tolist", "numpy", "cpu", "__array__"}
# By file and function: why an update waits there, or doesn't on a GPU.
ALLOWED = {
    "codecs/bottlenecks/statistics.py __init__": "on a CPU alone, to skip codebooks without a dead entry",
    "codecs/lengths/policy.py sample": "lengths are drawn on the CPU",
    "codecs/training/base.py step": "Adam counts its steps on the CPU",
    "codecs/training/readout.py read": "the verdict on an update; on a GPU that on the update before",
    "codecs/training/module.py step_discriminator": "and on the discriminator's; not on a GPU",
}
RUNS = {
    "image": [
        *TINY_RUN,
        "bottleneck=vq_ema",
        "bottleneck.dim=8",
        "bottleneck.codebook_size=64",
        "objective=adversarial",
        "objective.adversarial.discriminator.width=8",
        "objective.adversarial.discriminator.layers=1",
        "objective.adversarial.start=0",
        "objective.adversarial.head_start=0",
        "objective.adversarial.ramp=0",
    ],
    "audio": TINY_SOUND,
    "video": [*TINY_CLIP, "bottleneck.entropy=0.1"],
}


class _Waits:
    """The functions of our package that wait, while `on`."""

    def __init__(self) -> None:
        self.on = False
        self.found: set[str] = set()

    def note(self) -> None:
        frame = sys._getframe(1)
        while self.on and frame is not None:
            path = Path(os.path.realpath(frame.f_code.co_filename))
            if path.is_relative_to(ROOT / "codecs"):
                self.found.add(f"{path.relative_to(ROOT).as_posix()} {frame.f_code.co_name}")
                return
            frame = frame.f_back  # type: ignore[assignment]


class _Operations(TorchDispatchMode):
    """Operations that read."""

    def __init__(self, waits: _Waits) -> None:
        super().__init__()
        self.waits = waits

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func._schema.name.split("::")[1]
        chosen = name.startswith(("index", "_index_put")) and len(args) > 1 and isinstance(args[1], (list, tuple))
        by_truth = chosen and any(each is not None and each.dtype == torch.bool for each in args[1])
        unsized = name == "repeat_interleave" and not (kwargs or {}).get("output_size")
        if name in READING or by_truth or unsized:
            self.waits.note()
        return func(*args, **(kwargs or {}))


class _Functions(TorchFunctionMode):
    """Copies to the host, and of lists from it to a device."""

    def __init__(self, waits: _Waits) -> None:
        super().__init__()
        self.waits = waits

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func in (torch.tensor, torch.as_tensor) and (kwargs or {}).get("device") is not None
        if made or getattr(func, "__name__", "") in COPYING:
            self.waits.note()
        return func(*args, **(kwargs or {}))


class _Last(pl.Callback):
    """Looks at the last update alone: the first read what a run begins with."""

    def __init__(self, waits: _Waits, update: int) -> None:
        self.waits, self.update = waits, update

    def on_train_batch_start(self, trainer: pl.Trainer, module: Any, *_: Any) -> None:
        self.waits.on = module.update == self.update

    def on_train_batch_end(self, *_: Any) -> None:
        self.waits.on = False


def waits(tmp_path: Path, *words: str) -> set[str]:
    """Return the functions of our package in which the last of three updates waits."""
    run = build_run(composed(*words, "updates=3", "training.log_every=100"), tmp_path)
    found = _Waits()
    run.trainer.callbacks = [_Last(found, 2)]
    with _Operations(found), _Functions(found):
        run.trainer.fit(run.module, run.data)
    return found.found


@pytest.mark.slow
@pytest.mark.parametrize("name", RUNS)
def test_a_steady_update_does_not_wait(tmp_path: Path, name: str) -> None:
    assert waits(tmp_path, *RUNS[name]) <= set(ALLOWED)


@pytest.mark.slow
def test_a_wait_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A test of the test above: with k-means begun anew in each forward, it is named."""
    gather = MovingCodebook.gather

    def late(self: MovingCodebook, *given: Any) -> None:
        gather(self, *given)
        self.ready = False

    monkeypatch.setattr(MovingCodebook, "gather", late)
    assert "codecs/bottlenecks/statistics.py prepare" in waits(tmp_path, *RUNS["audio"])
