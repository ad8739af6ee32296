"""Speed of our training step against a plain PyTorch loop with the same networks; cost of logging; loader speed.

    python benchmarks/train_step.py [OVERRIDE ...] [--rounds 5] [--steps 20] [--out benchmarks/results/train_step.csv]

Ours is complete: Lightning, sampling of kept lengths, gradient clipping, EMA, logging. The plain loop only loads,
samples lengths, computes gradients, clips and steps. The two run in turn, and the ratio of medians is printed: absolute
times mean little on shared machines.
"""

import argparse
import csv
import logging
import statistics
import sys
import tempfile
import time
import warnings
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / ".pkg"))

import hydra
import pytorch_lightning as pl
import torch
from omegaconf import DictConfig

from varitok.codecs.build import build, build_codec
from varitok.codecs.training.logging.loggers import CsvLog
from varitok.codecs.training.module import CodecTraining
from varitok.codecs.training.run import Run, build_run
from varitok.data.batch import Batch, Splits, normalize
from varitok.data.datamodule import DataModule
from varitok.data.datasets.images import ImageDataset

DEFAULT = ["experiment=image/one_d_piece_64", "data=dead_leaves"]
WARM_UP = 3  # untimed steps of each round


class Stopwatch(pl.Callback):
    """A callback that records the times at the end of the warm-up and of the last batch."""

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: CodecTraining, *_: object) -> None:
        """Record the time at the end of the warm-up, and of each batch."""
        if pl_module.update == WARM_UP:
            self.began = time.perf_counter()
        self.ended = time.perf_counter()


def resident(size: int) -> Splits:
    """Build a dataset of random images in memory, so that only the step is timed."""
    images = torch.randint(0, 256, (64, 3, size, size), dtype=torch.uint8)
    return Splits(*(ImageDataset(lambda i, _: images[i], 64, image_size=size, train=False) for _ in range(2)))


def ours(config: DictConfig, steps: int) -> float:
    """Return the seconds of our training step."""
    with tempfile.TemporaryDirectory() as folder:
        run = build_run(config, Path(folder))
        run.data.splits = resident(config.data.image_size)
        watch = Stopwatch()
        run.trainer.callbacks = [watch]
        run.trainer.fit(run.module, run.data)
    return (watch.ended - watch.began) / steps


def plain(config: DictConfig, steps: int) -> float:
    """Return the seconds of the plain loop's training step."""
    codec, objective = build_codec(config), build(config.objective)
    optimizer = build(config.optim.codec)(codec.parameters())
    data = DataModule(resident(config.data.image_size), **config.loader, updates=config.updates)
    for step, batch in enumerate(data.train_dataloader()):
        if step == WARM_UP:
            began = time.perf_counter()
        real = normalize(batch.signal)
        kept = codec.length.sample(len(real), codec.tokens, codec.num_codebooks)
        result = codec(real, kept.lengths, kept.n_codebooks)
        penalties = (*result.quantized.penalties.values(), *result.penalties.values())
        loss = objective(result.signal, real, batch.lengths)[0] + sum(penalties)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(codec.parameters(), config.optim.clip)
        optimizer.step()
        codec.bottleneck.update()
        optimizer.zero_grad()
    return (time.perf_counter() - began) / steps


def log_cost(run: Run, folder: str, steps: int = 2000) -> float:
    """Return the milliseconds of logging ten values per step, including the CSV file."""
    run.module.record.every = 50
    run.module.on_fit_start()
    run.module._trainer = run.trainer
    run.trainer.datamodule = run.data
    run.trainer.strategy.optimizers = [torch.optim.SGD(run.module.codec.parameters(), 0.1)]
    run.trainer.optimizers[0].param_groups[0]["initial_lr"] = 0.1
    run.trainer.loggers = [CsvLog(folder, "benchmark")]
    values = {f"value_{i}": torch.rand(()) for i in range(10)}
    began = time.perf_counter()
    for step in range(steps):
        run.module.batch = step + 1
        run.module.log_values(values, 1.0)
    return (time.perf_counter() - began) / steps * 1000


def loader_rate(run: Run, batches: int) -> float:
    """Return the samples per second of the loader alone, after its workers have started."""
    loader = iter(run.data.train_dataloader())
    for _ in range(4):
        next(loader)
    began = time.perf_counter()
    seen = sum(len(batch.signal) for batch, _ in zip(loader, range(batches), strict=False) if isinstance(batch, Batch))
    return seen / (time.perf_counter() - began)


def main() -> None:
    """Run the comparison and write its CSV."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("overrides", nargs="*", help=f"Hydra overrides; {' '.join(DEFAULT)} by default")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    for name in ("pytorch_lightning", "lightning.pytorch"):
        logging.getLogger(name).setLevel(logging.ERROR)
    warnings.filterwarnings("ignore")
    overrides = options.overrides or DEFAULT
    with hydra.initialize_config_module("varitok.configs", version_base="1.3"):
        config = hydra.compose("train", [*overrides, "trainer.enable_progress_bar=false"])
    timed = config.copy()
    timed.updates = WARM_UP + options.steps
    timed.loader.workers = 0
    times: dict[str, list[float]] = {"ours": [], "plain": []}
    for _ in range(options.rounds):
        times["ours"].append(ours(timed, options.steps))
        times["plain"].append(plain(timed, options.steps))
    batch = config.loader.batch_size
    rate = {name: batch / statistics.median(values) for name, values in times.items()}
    with tempfile.TemporaryDirectory() as folder:
        run = build_run(config, Path(folder))
        cost, supply = log_cost(run, folder), loader_rate(run, 60)
    rows = [
        ("samples a second, ours", rate["ours"]),
        ("samples a second, plain loop", rate["plain"]),
        ("ours over plain", rate["ours"] / rate["plain"]),
        ("logging, ms a step", cost),
        (f"samples a second, loader alone, {config.loader.workers} workers", supply),
        ("loader over our step", supply / rate["ours"]),
    ]
    for name, value in rows:
        print(f"{name:48s} {value:10.3f}")
    if options.out:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        with options.out.open("w", newline="") as file:
            file.write(f"# python benchmarks/train_step.py {' '.join(overrides)}\n")
            file.write(
                f"# medians of {options.rounds} rounds of {options.steps} steps in turn; torch {torch.__version__}"
            )
            file.write(f", {torch.get_num_threads()} threads, batch {batch}\n")
            csv.writer(file).writerows([("measure", "value"), *((name, f"{value:.4g}") for name, value in rows)])


if __name__ == "__main__":
    main()
