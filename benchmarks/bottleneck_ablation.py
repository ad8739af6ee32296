"""Train a small image tokenizer with six bottlenecks at the same 768 bits per image, and compare their quality.

    python benchmarks/bottleneck_ablation.py ../shared/data/images --updates 1500 --jobs 2

All runs are `experiment=image/one_d_piece_64` with the same photos, updates, seed and lengths; only the bottleneck
differs. Four codebooks take 24 bits per token, so those runs have 32 tokens, the others 64. Quality is measured on the
validation photos with all tokens and with a quarter of them. A run that has been evaluated is not trained again.
"""

import argparse
import csv
import os
import statistics
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / ".pkg"))

import hydra
import torch

from varitok.codecs.build import build_codec

ROOT = Path(__file__).resolve().parents[1]
FOUR = ["codec.encoder.tokens=32", "bottleneck.{part}.dim={dim}", "bottleneck.{part}.codebook_size=64"]
VARIANTS = {
    "vq": ["bottleneck=vq"],
    "fsq": ["bottleneck=fsq"],
    "lfq": ["bottleneck=lfq", "bottleneck.bits=12"],
    "bsq": ["bottleneck=bsq", "bottleneck.bits=12", "bottleneck.entropy_group=6"],
    "rvq-4": ["bottleneck=rvq", "bottleneck.num_codebooks=4", *(word.format(part="level", dim=16) for word in FOUR)],
    "product-4": ["bottleneck=product_vq", "bottleneck.groups=4", *(word.format(part="part", dim=8) for word in FOUR)],
}


def overrides(name: str, photos: str, updates: int) -> list[str]:
    return [
        "experiment=image/one_d_piece_64",
        "data=image_folder",
        f"data.root={photos}",
        f"updates={updates}",
        f"checkpoint.every={updates}",
        "callbacks.samples.every=1000000",
        "callbacks.evaluation.every=1000000",
        "export=none",
        *VARIANTS[name],
    ]


def train(name: str, photos: str, updates: int, folder: Path) -> Path:
    run = folder / name
    if not (run / "evaluation" / "evaluation.csv").exists():
        command = [sys.executable, "train.py", *overrides(name, photos, updates), f"hydra.run.dir={run}"]
        with (folder / f"{name}.log").open("w") as log:
            subprocess.run(
                command, cwd=ROOT, stdout=log, stderr=log, check=True, env={**os.environ, "OMP_NUM_THREADS": "1"}
            )
    return run / "evaluation" / "evaluation.csv"


def rows(path: Path) -> list[dict[str, float]]:
    lines = [line for line in path.read_text().splitlines() if not line.startswith("#")]
    return [{name: float(value) for name, value in row.items()} for row in csv.DictReader(lines)]


def step_times(names: list[str], photos: str, rounds: int) -> dict[str, float]:
    """Return the median ms of forward, backward and codebook update by codec, on one thread and random images."""
    torch.set_num_threads(1)
    codecs = {}
    with hydra.initialize_config_module("varitok.configs", version_base="1.3"):
        for name in names:
            codecs[name] = build_codec(hydra.compose("train", overrides(name, photos, 1)))
    images = torch.rand(16, 3, 64, 64) * 2 - 1
    times: dict[str, list[float]] = {name: [] for name in names}
    for _ in range(rounds):
        for name, codec in codecs.items():
            began = time.perf_counter()
            result = codec(images)
            (result.signal.square().mean() + sum(result.quantized.penalties.values())).backward()
            codec.bottleneck.update()
            times[name].append((time.perf_counter() - began) * 1000)
    return {name: statistics.median(values[1:]) for name, values in times.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("photos", help="folder with train/ and val/")
    parser.add_argument("--updates", type=int, default=1500)
    parser.add_argument("--jobs", type=int, default=2, help="parallel runs, of one thread each")
    parser.add_argument("--only", nargs="+", choices=list(VARIANTS), default=list(VARIANTS))
    parser.add_argument("--folder", type=Path, default=ROOT / "runs" / "bottleneck_ablation")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results" / "bottleneck_ablation.csv")
    options = parser.parse_args()
    options.folder.mkdir(parents=True, exist_ok=True)
    with ThreadPoolExecutor(options.jobs) as pool:
        runs = list(pool.map(lambda name: train(name, options.photos, options.updates, options.folder), options.only))
    times = step_times(options.only, options.photos, rounds=12)
    with options.out.open("w", newline="") as file:
        file.write(
            f"# python benchmarks/bottleneck_ablation.py PHOTOS --updates {options.updates} --jobs {options.jobs}\n"
            "# psnr in dB and ssim with all tokens, quarter_psnr with a quarter of them, on the validation photos\n"
            "# usage, and entropy in bits, of a codebook: means of the codebooks\n"
            f"# step_ms: forward, backward and update of 16 images on one thread, medians in turn\n"
            f"# torch {torch.__version__}\n"
        )
        writer = csv.writer(file)
        writer.writerow(["bottleneck", "tokens", "bits", "psnr", "ssim", "quarter_psnr", "usage", "entropy", "step_ms"])
        for name, path in zip(options.only, runs, strict=True):
            table = rows(path)
            last = table[-1]
            (quarter,) = [row for row in table if row["k"] == last["k"] / 4]
            found = [last["psnr"], last["ssim"], quarter["psnr"], last["usage"], last["entropy"], times[name]]
            writer.writerow([name, int(last["k"]), int(last["bits"]), *(f"{value:.4g}" for value in found)])
    print(options.out.read_text())


if __name__ == "__main__":
    main()
