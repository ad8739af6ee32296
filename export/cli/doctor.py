"""Check a machine's packages, devices and disk for problems that would stop a run; the subcommand `doctor`."""

import argparse
import json
import netrc
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from importlib import metadata
from pathlib import Path
from typing import Literal, NamedTuple

from varitok import __version__
from varitok.codecs.training.versions import PACKAGES, installed_versions, mistakes

__all__ = ["Finding", "examine", "main"]

PIECE = 1 << 26  # bytes written to measure the disk's speed
ROOM = 1 << 30  # minimum free bytes for a run
PATIENCE = 60.0  # timeout of the process group check, in seconds


class Finding(NamedTuple):
    """Result of one check.

    Attributes:
        name: Name of the check.
        value: The result, and a remedy if it isn't good.
        state: "good"; "note" if only an optional feature is missing; "bad" if a run would stop.
    """

    name: str
    value: str
    state: Literal["good", "note", "bad"] = "good"


def main(words: Sequence[str]) -> None:
    """Run `varitok doctor`; the exit status is 2 if a check is bad."""
    parser = argparse.ArgumentParser(
        "varitok doctor",
        description="Check this machine's packages, devices and disk for problems that would stop a run.",
        epilog="for example: varitok doctor --runs /data/runs --json",
    )
    parser.add_argument("--runs", type=Path, default=Path("runs"), help="folder of the runs; default: %(default)s")
    parser.add_argument("--json", action="store_true", help="for scripts: one JSON object")
    options = parser.parse_args(words)
    found = list(examine(options.runs))
    if options.json:
        print(json.dumps({name: {"value": value, "state": state} for name, value, state in found}, indent=2))
    else:
        width = max(len(one.name) for one in found) + 2
        for name, value, state in found:
            print(f"{'  ' if state == 'good' else '- ' if state == 'note' else '! '}{name:<{width}}{value}")
    if any(one.state == "bad" for one in found):
        sys.exit(2)


def examine(runs: Path) -> Iterator[Finding]:
    """Check versions, the video decoder, W&B, the disk, GPUs, and process groups of two processes.

    Args:
        runs: Folder of the runs; it need not exist.
    """
    versions = installed_versions()
    missing = [name for name in PACKAGES if name not in versions and name != "lightning"]
    listed = ", ".join(f"{name} {version}" for name, version in versions.items())
    yield Finding("versions", f"varitok {__version__}, Python {sys.version.split()[0]}, {listed}")
    if missing:
        yield Finding("training", f"needs {', '.join(missing)}; pip install 'varitok[train]'", "bad")
    yield from (Finding("version", mistake, "bad") for mistake in mistakes(versions))
    yield _clips()
    yield _tracking()
    yield from _disk(runs)
    if "torch" in versions:
        yield from _devices()


def _clips() -> Finding:
    try:
        import av  # noqa: PLC0415 (an extra)
    except ImportError as error:
        return Finding("clips", f"can't be read ({error}); pip install 'varitok[video]'", "note")
    return Finding("clips", f"by FFmpeg (libavcodec {av.library_versions['libavcodec'][0]}) in PyAV {av.__version__}")


def _tracking() -> Finding:
    try:
        version = metadata.version("wandb")
    except metadata.PackageNotFoundError:
        return Finding("wandb", "is not installed; logger=csv works without it", "note")
    try:
        known = "api.wandb.ai" in netrc.netrc().hosts
    except (OSError, netrc.NetrcParseError):
        known = False
    if known or os.environ.get("WANDB_API_KEY"):
        return Finding("wandb", f"{version}, with a key")
    return Finding("wandb", f"{version}, no key: logger=wandb stays offline; `wandb login` sets one", "note")


def _disk(runs: Path) -> Iterator[Finding]:
    """Measure free space and write speed of the disk of a folder, or of its nearest existing parent."""
    folder = runs.absolute()
    while not folder.exists():
        folder = folder.parent
    try:
        with tempfile.NamedTemporaryFile(dir=folder) as file:
            began = time.monotonic()
            file.write(os.urandom(1 << 20) * (PIECE >> 20))
            file.flush()
            os.fsync(file.fileno())
            speed = PIECE / 1e6 / (time.monotonic() - began)
    except OSError as error:
        yield Finding("runs", f"{folder}: can't be written ({error.strerror}); give hydra.run.dir=FOLDER", "bad")
        return
    free = shutil.disk_usage(folder).free
    room = f"{folder}: {free / 1e9:.1f} GB free, written at {speed:.0f} MB/s"
    yield Finding("runs", room if free >= ROOM else f"{room}; make room", "good" if free >= ROOM else "bad")
    temporary = Path(tempfile.gettempdir())
    if temporary.stat().st_dev != folder.stat().st_dev:
        yield Finding("temporary", f"{temporary}: another disk than runs; checkpoints don't pass through it", "note")


def _devices() -> Iterator[Finding]:
    try:
        import torch  # noqa: PLC0415 (optional)
    except (ImportError, OSError) as error:
        yield Finding("torch", f"can't be loaded ({error})", "bad")
        return
    count = torch.cuda.device_count()
    each = [torch.cuda.get_device_properties(index) for index in range(count)]
    told = ", ".join(f"{one.name} ({one.total_memory / 2**30:.0f} GiB)" for one in each)
    yield Finding("gpus", told or f"none; {os.cpu_count()} CPU cores", "good" if told else "note")
    if not torch.distributed.is_available():
        yield Finding("processes", "this torch has no distributed package: one process only", "note")
        return
    for backend in ["gloo", *(["nccl"] if count > 1 else [])]:
        yield _meeting(backend)


def _meeting(backend: str) -> Finding:
    """Check that two processes can form a process group and all-reduce a number."""
    import torch.multiprocessing as mp  # noqa: PLC0415

    with tempfile.TemporaryDirectory() as folder:
        began = time.monotonic()
        started = mp.spawn(_meet, (backend, folder), nprocs=2, join=False)  # type: ignore[attr-defined,no-untyped-call]
        try:
            while not started.join(timeout=1.0):
                if time.monotonic() - began > PATIENCE:
                    for process in started.processes:
                        process.kill()
                    return Finding(backend, f"two processes formed no process group in {PATIENCE:.0f} s", "bad")
        except Exception as error:  # a child's exception or signal
            reason = str(error).strip().splitlines()[-1]
            return Finding(backend, f"two processes can't form a process group ({reason})", "bad")
    return Finding(backend, "two processes form a process group")


def _meet(rank: int, backend: str, folder: str) -> None:
    import torch  # noqa: PLC0415
    import torch.distributed as dist  # noqa: PLC0415

    dist.init_process_group(backend, f"file://{folder}/store", rank=rank, world_size=2)
    device = torch.device("cuda", rank) if backend == "nccl" else torch.device("cpu")
    total = torch.tensor(rank + 1.0, device=device)
    dist.all_reduce(total)
    dist.destroy_process_group()
    if total.item() != 3:
        raise RuntimeError("all_reduce returned a wrong sum")
