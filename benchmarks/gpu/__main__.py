"""Whether varitok is right on a GPU, and how fast it is there: one command, ten minutes.

    python -m benchmarks.gpu --out OUT [--only SECTION ...] [--minutes 10] [--device cuda] [--tiny]

Run it from the checkout's root, with pytest and vector-quantize-pytorch installed. Each section is a process of its own
with a share of the time: what it measured until it crashed or was stopped is in OUT/results.json and OUT/table.md, and
the others run. The log of all is OUT/log.txt. The status is 1 if a section failed.

The first sections ask whether results are right. They run the tests with the marker `gpu`, which compare with the CPU
or with another run on the device, and record what these measured. The others ask how fast it is. Each time is that of
the device's whole work, launches by the host included. Ratios are of medians of calls in turn. MFU is the share of the
device's peak of dense bfloat16 in its data sheet; `busy`, the share of time in which the device ran a kernel.
"""

import argparse
import logging
import os
import platform
import shlex
import signal
import subprocess
import sys
import time
import warnings
from collections.abc import Sequence
from importlib import import_module
from importlib.metadata import version
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / ".pkg"))  # a checkout needs no install (ARCHITECTURE.md, "Where the package is")

from .report import Report  # noqa: E402

__all__ = ["SECTIONS", "main"]


class Section(NamedTuple):
    """A part of the measurement, in a process of its own.

    Attributes:
        asks: What it answers.
        seconds: Its share of ten minutes; what it leaves is shared by those after it.
        tests: Files of tests whose cases on the device it runs.
        measure: Module and function that measures, if there are no tests.
    """

    asks: str
    seconds: int
    tests: tuple[str, ...] = ()
    measure: str = ""


STEP = "tests/codecs/training/test_gpu.py::test_"
BUNDLE = "tests/export/exporters/test_gpu.py::test_"
SECTIONS = {
    "parity": Section(
        "Are codes and signals those of the CPU, of live and frozen modules, in float32 and in TF32?",
        75,
        ("tests/codecs/bottlenecks/test_gpu.py", f"{BUNDLE}a_codec_codes_as_on_the_cpu"),
    ),
    "steps": Section(
        "Is a step in bfloat16 near one in float32, and one of compiled parts near an eager one?",
        30,
        (f"{STEP}a_step_in_bfloat16_is_near_float32", f"{STEP}compiled_parts_are_near_eager_ones"),
    ),
    "waits": Section(
        "Which lines of a steady update wait for the device?", 25, (f"{STEP}no_line_of_a_steady_update_waits",)
    ),
    "resume": Section(
        "Are twelve updates six and six, and how far apart is the same run started twice?",
        35,
        (f"{STEP}twelve_updates_are_six_and_six",),
    ),
    "processes": Section(
        "Do two processes on the device stay one and learn what one learns? Does a sharded run end with its bundle?",
        50,
        ("tests/codecs/training/distributed/test_gpu.py",),
    ),
    "runs": Section(
        "Do whole runs of images, audio and video leave bundles that code on the device as on the CPU?",
        70,
        (f"{BUNDLE}a_whole_run_leaves_a_bundle",),
    ),
    "quantizers": Section(
        "What does a training step of a quantizer take, and the equivalent one of vector-quantize-pytorch (peer)?",
        35,
        measure="quantizers.measure",
    ),
    "attention": Section("What do masks cost forward and backward, in bfloat16?", 30, measure="attention.measure"),
    "training": Section(
        "What does a training step take, LPIPS and discriminator included?", 170, measure="training.measure"
    ),
    "compile": Section("What does training.compile=[encoder,decoder] gain?", 80, measure="training.measure_compiled"),
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; return its status."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--out", type=Path, required=True, help="folder of results.json, table.md and log.txt")
    parser.add_argument("--only", nargs="+", choices=SECTIONS, default=list(SECTIONS), metavar="SECTION")
    parser.add_argument("--minutes", type=float, default=10.0, help="time for all chosen sections")
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--tiny", action="store_true", help="one small case of each kind, to try the script itself")
    parser.add_argument("--section", choices=SECTIONS, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    report = Report(options.out.absolute())
    if options.device == "cuda" and not _has_gpu():
        parser.error("no GPU here; --device cpu --tiny tries the script itself")
    if options.section:
        return _measure(report, options.section, options.device, options.tiny)
    words = sys.argv[1:] if arguments is None else arguments
    report.begin({"command": shlex.join(["python", "-m", "benchmarks.gpu", *words])})
    ends, failed = time.monotonic() + 60 * options.minutes, False
    for place, name in enumerate(options.only):
        shares = [SECTIONS[each].seconds for each in options.only[place:]]
        limit = max(1.0, (ends - time.monotonic()) * shares[0] / sum(shares))
        report.section(name, asks=SECTIONS[name].asks)
        began = time.monotonic()
        status = _run(report.folder, name, options, limit)
        report.section(name, status=status, seconds=time.monotonic() - began)
        print(f"{name}: {status}", flush=True)
        failed |= status != "ok"
    print(report.folder / "table.md")
    return int(failed)


def _has_gpu() -> bool:
    import torch  # noqa: PLC0415 (on a CPU the command itself needs none)

    return bool(torch.cuda.is_available())


def _run(folder: Path, name: str, options: argparse.Namespace, limit: float) -> str:
    """Run a section in a process of its own; return how it ended."""
    words = ["--out", str(folder), "--section", name, "--device", options.device, *(["--tiny"] * options.tiny)]
    with (folder / "log.txt").open("a") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", "benchmarks.gpu", *words],
            cwd=ROOT,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            env=os.environ | {"WANDB_MODE": "offline"},
        )
        try:
            status = process.wait(limit)
        except subprocess.TimeoutExpired:
            return f"stopped at its limit of {limit:.0f} s"
        finally:
            try:
                os.killpg(process.pid, signal.SIGKILL)  # and the processes that it started
            except ProcessLookupError:
                pass
            process.wait()
    if status < 0:
        return f"crashed by {signal.Signals(-status).name}"
    return "ok" if not status else f"failed; see {log.name}"


def _measure(report: Report, name: str, device: str, tiny: bool) -> int:
    """Run a section in this process; return its status."""
    import torch  # noqa: PLC0415 (on a CPU the command itself needs none)

    for logger in ("pytorch_lightning", "lightning.pytorch", "lightning_fabric"):
        logging.getLogger(logger).setLevel(logging.ERROR)
    packages = ("torch", "torchvision", "pytorch-lightning", "vector-quantize-pytorch")
    report.describe(
        device=torch.cuda.get_device_name() if device == "cuda" else f"CPU ({platform.machine()})",
        host=f"{os.cpu_count()} CPU cores, Python {platform.python_version()}",
        versions=", ".join(f"{package} {version(package)}" for package in packages),
    )
    section = SECTIONS[name]
    if section.tests:
        from .correctness import run_tests  # noqa: PLC0415 (needs pytest)

        return run_tests(report, name, device, tiny, section.tests)
    warnings.filterwarnings("ignore")
    module, _, function = section.measure.partition(".")
    getattr(import_module(f".{module}", __package__), function)(report, device, tiny)
    return int(bool(report.errors))


if __name__ == "__main__":
    sys.exit(main())
