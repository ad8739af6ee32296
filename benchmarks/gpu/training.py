"""Training steps of published codecs: samples a second, share of the device's peak, share of time it is busy."""

import gc
import itertools
import os
import tempfile
import time
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NamedTuple

import hydra
import pytorch_lightning as pl
import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode
from torchvision.models import vgg16

from varitok.codecs.losses.lpips import BACKBONES
from varitok.codecs.training.run import build_run
from varitok.data.batch import SignalDataset, Splits

from .report import Report, Row
from .timing import synchronize

__all__ = ["PEAKS", "measure", "measure_compiled"]

# Dense bfloat16 operations a second, of NVIDIA's data sheets.
PEAKS = {"H200": 989e12, "H100": 989e12, "A100": 312e12, "L40S": 362e12}
WARM_UP = 6  # updates; cuDNN and the allocator settle
SECONDS, UPDATES = 2.0, 20  # timing ends with the first of them
PROFILED = 2  # updates


class Step(NamedTuple):
    """A codec whose training step is timed.

    Attributes:
        words: Hydra overrides.
        shape: Shape of a signal, `(c, *grid)`.
        batches: Samples a batch: the preset's for each of several GPUs, then the published one or what one GPU holds.
    """

    words: Sequence[str]
    shape: tuple[int, ...]
    batches: tuple[int, ...]

    def tiny(self) -> "Step":
        """Return it with two of the smallest images that LPIPS takes, in the smallest network."""
        words = ["data.image_size=32", "codec=register_vit_tiny", "codec.encoder.tokens=4"]
        return Step([*self.words, *words], (3, 32, 32), (2,))


TITOK = ["experiment=image/titok", "data=dead_leaves", "data.image_size=256"]
VOICES = ["data=voices"]
SCENES = ["data=scenes", "data.image_size=128"]
STEPS = {
    "TiTok-S": Step([*TITOK, "codec=register_vit_s", "codec.encoder.tokens=128"], (3, 256, 256), (32, 256)),
    "TiTok-B": Step([*TITOK, "codec=register_vit_b", "codec.encoder.tokens=64"], (3, 256, 256), (32, 256)),
    "TiTok-L": Step([*TITOK, "codec=register_vit_l", "codec.encoder.tokens=32"], (3, 256, 256), (32, 64)),
    "EnCodec": Step(["experiment=audio/encodec", *VOICES], (1, 24000), (8, 64)),
    "DAC 44k": Step(["experiment=audio/dac_44k", *VOICES, "~data.loudness", "~data.gain"], (1, 33 * 512), (9, 72)),
    "Mimi": Step(["experiment=audio/mimi", *VOICES], (1, 150 * 1920), (16,)),
    "VidTok": Step(["experiment=video/vidtok", *SCENES], (3, 17, 128, 128), (2, 16)),
    "BSQ-ViT": Step(["experiment=video/bsq_vit", *SCENES], (3, 16, 128, 128), (2, 16)),
}
# How else the last batch may be trained; the default is `trainer.precision=auto`.
VARIANTS = {
    "TiTok-B": [["trainer.precision=32-true"]],
    "EnCodec": [["trainer.precision=bf16-mixed"]],
    "VidTok": [["++trainer.benchmark=true"]],
}
COMPILED = ("TiTok-B", "EnCodec", "VidTok")
COMPILE = "training.compile=[encoder,decoder]"
QUIET = [
    "trainer=default", "loader.workers=0", "callbacks.samples=null", "callbacks.evaluation=null", "export=none",
    "trainer.enable_progress_bar=false", "training.log_every=1000000", "checkpoint.every=1000000", "updates=1000000",
    *(f"objective.adversarial.{key}=0" for key in ("start", "head_start", "ramp")),  # heard from the first update on
]  # fmt: skip


def measure(report: Report, device: str, tiny: bool) -> None:
    """Time each codec's step at the preset's batch, at the whole one, and the latter in other ways."""
    steps = {"TiTok-B": STEPS["TiTok-B"].tiny()} if tiny else STEPS
    rounds: list[tuple[str, int, list[str]]] = []
    for place in range(max(len(step.batches) for step in steps.values())):
        rounds += [(name, step.batches[place], []) for name, step in steps.items() if place < len(step.batches)]
    rounds += [(name, steps[name].batches[-1], words) for name in steps for words in VARIANTS.get(name, [])]
    with tempfile.TemporaryDirectory() as folder:
        _place_random_weights(folder)
        for name, batch, words in rounds:
            with report.case("training", name, batch=batch, trained=" ".join(words) or "by default") as row:
                _time(row, steps[name], batch, words, device)


def measure_compiled(report: Report, device: str, tiny: bool) -> None:
    """Time steps of the last batch with and without `training.compile`."""
    steps = {"TiTok-B": STEPS["TiTok-B"].tiny()} if tiny else {name: STEPS[name] for name in COMPILED}
    if tiny:
        torch.compiler.set_stance("force_eager")  # compiling takes a CPU minutes
    with tempfile.TemporaryDirectory() as folder:
        _place_random_weights(folder)
        for name, step in steps.items():
            took = {}
            for form, words in {"eager": [], "compiled": [COMPILE]}.items():
                with report.case("compile", name, batch=step.batches[-1], form=form) as row:
                    _time(row, step, step.batches[-1], words, device)
                    took[form] = row["ms"]
                    if "eager" in took:
                        row["eager / this"] = took["eager"] / took[form]


def _time(row: Row, step: Step, batch: int, words: Sequence[str], device: str) -> None:
    """Train for a few seconds, and add the measurements to the row."""
    gc.collect()  # the last run, also if it failed
    if device == "cuda":
        torch.cuda.empty_cache()
    torch.compiler.reset()
    flags = torch.backends.cudnn.benchmark
    with hydra.initialize_config_module("varitok.configs", version_base="1.3"):
        accelerator = f"trainer.accelerator={device}"
        config = hydra.compose("train", [*step.words, *QUIET, accelerator, f"loader.batch_size={batch}", *words])
    try:
        with tempfile.TemporaryDirectory() as folder:
            run = build_run(config, Path(folder))
            run.data.splits = Splits(_Resident(step.shape), _Resident(step.shape))
            meter = _Meter(device)
            run.trainer.callbacks = [meter]
            run.trainer.fit(run.module, run.data)
        row |= meter.measured(batch, device)
    finally:
        torch.backends.cudnn.benchmark = flags


class _Resident(SignalDataset):
    """Random signals in memory, so that only the step is timed."""

    def __init__(self, shape: tuple[int, ...]) -> None:
        sound = len(shape) == 2
        self.signals = [torch.rand(shape) - 0.5 if sound else _pixels(shape) for _ in range(16)]

    def __len__(self) -> int:
        return 4096

    def __getitem__(self, key: tuple[int, int]) -> Tensor:
        return self.signals[key[1] % len(self.signals)]


def _pixels(shape: tuple[int, ...]) -> Tensor:
    return torch.randint(0, 256, shape, dtype=torch.uint8)


def _place_random_weights(folder: str) -> None:
    """Let LPIPS find a VGG-16: what it costs doesn't depend on its weights."""
    features = vgg16(weights=None).features.state_dict()
    state = {f"features.{name}": value for name, value in features.items()}
    torch.save(state, Path(folder) / BACKBONES["vgg"].filename)
    os.environ["VARITOK_WEIGHTS"] = folder


class _Meter(pl.Callback):
    """Counts one update's operations, times updates after a warm-up, profiles some more, and stops the run."""

    def __init__(self, device: str) -> None:
        self.device = device
        self.counter = FlopCounterMode(display=False)
        self.active = ExitStack()  # the counter, then the profiler
        self.seconds: float | None = None

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: Any, *_: Any) -> None:
        """Begin with what the next update is for."""
        if pl_module.update == 0:
            synchronize(self.device)
            self.first = time.perf_counter()
        elif pl_module.update == 1:
            self.active.enter_context(self.counter)
        elif pl_module.update == WARM_UP:
            synchronize(self.device)
            if self.device == "cuda":
                torch.cuda.reset_peak_memory_stats()
            self.began = time.perf_counter()

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: Any, *_: Any) -> None:
        """End it."""
        update = pl_module.update  # the number of those done
        if update == 1:
            synchronize(self.device)
            self.first = time.perf_counter() - self.first
        elif update == 2:
            self.active.close()
        if self.seconds is None and update > WARM_UP:
            count = update - WARM_UP
            if count == UPDATES or time.perf_counter() - self.began > SECONDS:
                synchronize(self.device)
                self.seconds = (time.perf_counter() - self.began) / count
                self.memory = torch.cuda.max_memory_allocated() / 2**30 if self.device == "cuda" else None
                kind = ProfilerActivity.CUDA if self.device == "cuda" else ProfilerActivity.CPU
                self.profiled, self.profile = update, profile(activities=[kind])
                self.active.enter_context(self.profile)
        elif self.seconds is not None and update == self.profiled + PROFILED:
            synchronize(self.device)
            self.active.close()
            trainer.should_stop = True

    def on_exception(self, *_: Any) -> None:
        """Neither count nor profile the next run."""
        self.active.close()

    def measured(self, batch: int, device: str) -> dict[str, Any]:
        """Return the row's entries; `busy` is the share of time in which the device ran a kernel."""
        assert self.seconds is not None
        operations = self.counter.get_total_flops()
        found = {
            "ms": 1000 * self.seconds,
            "samples a second": batch / self.seconds,
            "TFLOP an update": operations / 1e12,
            "first update, s": self.first,
        }
        if device != "cuda":
            return found
        name = torch.cuda.get_device_name()
        peak = next((rate for known, rate in PEAKS.items() if known in name), None)
        events = [event for event in self.profile.key_averages() if event.self_device_time_total]
        busiest = sorted(events, key=lambda event: -event.self_device_time_total)
        total = sum(event.self_device_time_total for event in events) / 1e6 / PROFILED
        return found | {
            "MFU": operations / self.seconds / peak if peak else None,
            "busy": total / self.seconds,
            "kernels an update": sum(event.count for event in events) / PROFILED,
            "GiB": self.memory,
            "busiest, ms an update": {
                event.key[:40]: event.self_device_time_total / 1e3 / PROFILED for event in itertools.islice(busiest, 5)
            },
        }
