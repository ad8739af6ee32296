"""Training on a GPU: bfloat16 is near float32, no steady update waits, resuming, and compiled parts."""

import math
import traceback
import warnings
from collections import Counter
from pathlib import Path

import pytest
import pytorch_lightning as pl
import torch

import varitok
from varitok.codecs.training.run import build_run

from ...composing import composed
from ...devices import on_devices
from ..examples import QUIET, TINY_CLIP, TINY_RUN, TINY_SOUND

PACKAGE = Path(varitok.__file__).parent
RUNS = {"image": TINY_RUN, "audio": TINY_SOUND, "video": TINY_CLIP}
COMMON = [*QUIET, "export=none", "optim.warmup=0", "optim.final=1", "training.log_every=1"]
GAN = [
    "objective=adversarial",
    *("objective.adversarial.discriminator.width=8", "objective.adversarial.discriminator.layers=1"),
    *(f"objective.adversarial.{key}=0" for key in ("start", "head_start", "ramp")),
]
MOVING = ["bottleneck=vq_ema", "bottleneck.dim=16", "bottleneck.codebook_size=64"]


@pytest.fixture(autouse=True)
def torchs_settings():
    """Put back what a run sets for the whole process."""
    before = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    yield
    torch.set_float32_matmul_precision(before[0])
    torch.backends.cudnn.allow_tf32 = before[1]
    torch.use_deterministic_algorithms(False)


def fit(folder, device, *words, callback=None):
    run = build_run(composed(*words, *COMMON, f"trainer.accelerator={device}"), folder)
    if callback:
        run.trainer.callbacks.insert(0, callback)
    run.trainer.fit(run.module, run.data, ckpt_path=run.resume, weights_only=True)
    return run


@on_devices
@pytest.mark.parametrize("modality", RUNS)
def test_a_step_in_bfloat16_is_near_float32(device, modality, tmp_path, record_property):
    logged = {}
    for precision in ("32-true", "bf16-mixed"):
        run = fit(tmp_path / precision, device, *RUNS[modality], "updates=1", f"trainer.precision={precision}")
        logged[precision] = run.module.latest
        assert all(value.isfinite().all() for value in run.module.parameters())
    # A latent that rounds to another code changes the gradient much more than the loss.
    for name, most in {"loss": 0.1, "grad_norm": 0.5}.items():
        ratio = logged["bf16-mixed"][name] / logged["32-true"][name]
        record_property(f"{name}, bfloat16 / float32", ratio)
        assert ratio == pytest.approx(1, abs=most), name


class Waits(pl.Callback):
    """Counts by line where the host waits for the device, in updates 6 and 7.

    A stand-in for the GPU's warnings, with which the CPU tests this class, is called in each forward pass.
    """

    def __init__(self, device, stand_in=None):
        self.mode = torch.cuda.set_sync_debug_mode if device == "cuda" else lambda mode: None
        self.stand_in = stand_in
        self.lines = Counter()

    def on_train_start(self, trainer, pl_module):
        if self.stand_in:
            pl_module.codec.register_forward_hook(lambda *_: self.stand_in())

    def on_train_batch_start(self, trainer, pl_module, *_):
        if pl_module.update == 5:
            self.catcher = warnings.catch_warnings()
            self.catcher.__enter__()
            warnings.simplefilter("always")
            warnings.showwarning = self.note
            self.mode("warn")
        elif pl_module.update == 7:
            self.mode("default")
            self.catcher.__exit__(None, None, None)

    def note(self, message, *_):
        if "called a synchronizing" in str(message):
            stack = traceback.extract_stack()[:-1]
            ours = [one for one in stack if Path(one.filename).is_relative_to(PACKAGE)]
            line = (ours or stack)[-1]
            path = Path(line.filename)
            name = path.relative_to(PACKAGE) if ours else Path(*path.parts[-2:])
            self.lines[f"{name}:{line.lineno} {line.line}"] += 1


WAITING = {
    "image, GAN": [*TINY_RUN, "bottleneck=vq", *GAN],
    "image, EMA": [*TINY_RUN, *MOVING],
    "audio, RVQ": TINY_SOUND,
    "video, FSQ with entropy": [*TINY_CLIP, "bottleneck.entropy=0.1"],
}
STEADY = ["updates=9", "training.log_every=1000", "checkpoint.every=1000"]


@on_devices
@pytest.mark.parametrize("case", WAITING)
def test_no_line_of_a_steady_update_waits(device, case, tmp_path, record_property):
    waits = Waits(device)
    fit(tmp_path, device, *WAITING[case], *STEADY, callback=waits)
    for line, count in waits.lines.most_common():
        record_property(f"waits an update, {line}", count / 2)
    ours = [line for line in waits.lines if line.startswith(("codecs/", "data/"))]
    assert not ours


def test_waits_are_told_by_the_line_of_ours_that_led_to_them(tmp_path):
    waits = Waits("cpu", lambda: warnings.warn("called a synchronizing CUDA operation", stacklevel=1))
    fit(tmp_path, "cpu", *TINY_RUN, *STEADY, callback=waits)
    ((line, count),) = waits.lines.items()
    assert line.startswith("codecs/training/module.py:") and "self.codec(" in line and count == 2


def parameters(run):
    return torch.cat([value.detach().cpu().flatten() for value in run.module.parameters()]).double()


@on_devices
@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
@pytest.mark.parametrize("mode", ["false", "warn"])
def test_twelve_updates_are_six_and_six(device, mode, precision, tmp_path, record_property):
    """To the bit where torch computes deterministically, as on the CPU; else as near as the same run started twice."""
    words = [*TINY_RUN, *MOVING, *GAN, "checkpoint.every=6", "optim.codec.lr=1e-4", f"trainer.precision={precision}"]
    found = []
    for name, lives in {"first": (12,), "second": (12,), "resumed": (6, 12)}.items():
        for updates in lives:
            words_now = [*words, f"updates={updates}", f"++trainer.deterministic={mode}"]
            run = fit(tmp_path / name, device, *words_now)
        assert run.module.update == 12
        found.append(run)
    whole = parameters(found[0])
    for name, run in zip(("same run twice", "resumed"), found[1:], strict=True):
        away = ((parameters(run) - whole).norm() / whole.norm()).item()
        record_property(f"{name}, relative difference", away)
        assert math.isfinite(away) and away < 0.01
        if mode == "warn" or device == "cpu":
            for key, value in found[0].module.state_dict().items():
                assert torch.equal(value, run.module.state_dict()[key]), key


@on_devices
def test_compiled_parts_are_near_eager_ones(device, tmp_path, record_property):
    logged = []
    for parts in ("[]", "[encoder,decoder]"):
        words = [*TINY_RUN, "updates=2", f"training.compile={parts}", "trainer.precision=32-true"]
        logged.append(fit(tmp_path / str(len(logged)), device, *words).module.latest)
    for name in ("loss", "grad_norm"):
        ratio = logged[1][name] / logged[0][name]
        record_property(f"{name}, compiled / eager", ratio)
        assert ratio == pytest.approx(1, abs=1e-3 if device == "cpu" else 0.02)
