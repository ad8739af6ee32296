"""How the processes of a run are started, and how they end: torchrun, srun, submitit, and Lightning's own launcher."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from ...examples import QUIET
from ..test_survival import PROGRAM, logged, start, wait_for
from ..test_training import ADVERSARIAL, TINY
from .processes import free_port

pytestmark = pytest.mark.slow
WORDS = [*TINY, *QUIET, *ADVERSARIAL, "training.log_every=1", "updates=6"]
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2"]
ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1"}


def done(command, folder, **environment):
    started = [
        subprocess.Popen(one, env=ENVIRONMENT | extra | environment, cwd=folder, stderr=subprocess.PIPE, text=True)
        for one, extra in command
    ]
    told = [process.communicate(timeout=900)[1] for process in started]
    assert [process.returncode for process in started] == [0] * len(started), told


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """The log of one process with the whole batch."""
    folder = tmp_path_factory.mktemp("alone")
    done([([*PROGRAM, *WORDS, "loader.batch_size=6", f"hydra.run.dir={folder}"], {})], folder)
    return values(folder)


def values(folder):
    return {(update, name): float(value) for update, name, value in logged(folder)[1:]}


def assert_close(folder, alone):
    found = values(folder)
    assert found.keys() == alone.keys()
    assert all(value == pytest.approx(alone[key], rel=1e-3, abs=1e-4) for key, value in found.items())
    assert "devices: 2" in (folder / "config.yaml").read_text()
    assert len(logged(folder)) == len(set(map(tuple, logged(folder)))), "two processes have logged"


def test_lightning_starts_the_others(tmp_path, alone):
    done([([*PROGRAM, *WORDS, "trainer.devices=2"], {})], tmp_path)
    (folder,) = tmp_path.glob("runs/demo/*")
    assert_close(folder, alone)


def test_torchrun(tmp_path, alone):
    done([([*TORCHRUN, "--standalone", PROGRAM[1], *WORDS, f"hydra.run.dir={tmp_path}"], {})], tmp_path)
    assert_close(tmp_path, alone)


def test_torchrun_on_two_machines(tmp_path, alone):
    """Which are one here; each starts one process, and the folder's name is that of the job."""
    shared = [*TORCHRUN[:-1], "--nproc-per-node=1", "--nnodes=2", "--rdzv-backend=c10d", "--rdzv-id=job7"]
    shared += [f"--rdzv-endpoint=127.0.0.1:{free_port()}", "--local-addr=127.0.0.1", PROGRAM[1], *WORDS]
    done([(shared, {}), (shared, {})], tmp_path)
    folder = tmp_path / "runs/demo/job7"
    assert "num_nodes: 2" in (folder / "config.yaml").read_text()
    assert values(folder) == pytest.approx(alone, rel=1e-3, abs=1e-4)


def test_srun(tmp_path, alone):
    shared = {"SLURM_NTASKS": "2", "SLURM_JOB_ID": "4711", "SLURM_JOB_NAME": "train", "SLURM_NODEID": "0"}
    shared |= {"MASTER_PORT": free_port(), "SLURM_NODELIST": "127.0.0.1"}
    command = [([*PROGRAM, *WORDS], {"SLURM_PROCID": rank, "SLURM_LOCALID": rank}) for rank in "01"]
    done(command, tmp_path, **shared)
    assert_close(tmp_path / "runs/demo/slurm_4711", alone)


def test_submitit_starts_a_sweeps_jobs_with_several_processes(tmp_path, alone):
    pytest.importorskip("hydra_plugins.hydra_submitit_launcher")
    launcher = ["--multirun", "hydra/launcher=submitit_local", "hydra.launcher.tasks_per_node=2"]
    done([([*PROGRAM, *launcher, *WORDS, "seed=0,1"], {})], tmp_path)
    (sweep,) = tmp_path.glob("runs/demo/*_sweep")
    assert_close(sweep / "0", alone)
    assert values(sweep / "1") != values(sweep / "0")


LIVES = [*ADVERSARIAL, "updates=100", "training.log_every=1", "processes.silence=5", "checkpoint.every=20"]
LIVES += ["trainer.devices=2"]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A run that nothing has disturbed."""
    folder = tmp_path_factory.mktemp("whole")
    run = start(folder, *LIVES)
    assert run.wait(timeout=900) == 0, run.communicate()[0]
    return folder


def children(process):
    return [int(one) for one in Path(f"/proc/{process}/task/{process}/children").read_text().split()]


def is_there(process):
    stat = Path(f"/proc/{process}/stat")
    return stat.exists() and stat.read_text().rpartition(")")[2].split()[0] != "Z"


@pytest.mark.parametrize(
    ("launcher", "rank", "how", "told"),
    [
        ("lightning", 1, "SIGKILL", "process 1 of 2 was ended by SIGKILL"),
        ("lightning", 0, "SIGKILL", "process 0 of 2 is gone"),
        ("lightning", 1, "SIGSTOP", "process 1 of 2 has given no sign of life"),
        ("lightning", 0, "SIGSTOP", "process 0 of 2 has given no sign of life"),
        ("torchrun", 1, "SIGKILL", "process 1 of 2 has given no sign of life"),
        ("torchrun", 0, "SIGSTOP", "process 0 of 2 has given no sign of life"),
    ],
)
def test_all_end_where_one_is_gone_and_the_run_goes_on_to_the_bit(
    tmp_path, monkeypatch, whole, launcher, rank, how, told
):
    words = LIVES if launcher == "lightning" else LIVES[:-1]
    if launcher == "torchrun":
        monkeypatch.setattr(sys.modules[start.__module__], "PROGRAM", [*TORCHRUN, "--standalone", PROGRAM[1]])
    part = start(tmp_path, *words)
    wait_for(part, tmp_path / "metrics.csv", len(logged(whole)) * 2 // 5)
    if launcher == "lightning":
        ranks = [part.pid, *children(part.pid)]
    else:
        ranks = sorted(children(part.pid), key=lambda one: b"\0RANK=1\0" in Path(f"/proc/{one}/environ").read_bytes())
    os.kill(ranks[rank], getattr(signal, how))
    shown, _ = part.communicate(timeout=900)
    assert part.returncode != 0
    (line,) = [line for line in shown.splitlines() if line.startswith(told)]
    assert line.endswith("start the run again to resume from its last checkpoint")
    until = time.monotonic() + 900
    while any(is_there(one) for one in ranks):
        assert time.monotonic() < until, "a process is left"
        time.sleep(0.2)
    saved = torch.load(tmp_path / "checkpoints/last.ckpt", weights_only=True)["state_dict"]["updates"]
    assert 0 < int(saved) < 100
    again = start(tmp_path, *words)
    assert again.wait(timeout=900) == 0, again.communicate()[0]
    assert logged(tmp_path) == logged(whole)


def test_a_mistake_of_all_processes_ends_them_with_its_status(tmp_path):
    """Files that no process can read: each says so, and none waits for another."""
    broken = tmp_path / "photos"
    broken.mkdir()
    for number in range(8):
        (broken / f"{number}.png").write_bytes(b"not a picture")
    words = [f"data.root={broken}", "trainer.devices=2", *WORDS, f"hydra.run.dir={tmp_path / 'run'}"]
    words = [word for word in words if not word.startswith(("data=", "data.length", "data.val_length"))]
    command = [*PROGRAM, "data=image_folder", *words]
    process = subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True, timeout=900, check=False)
    assert process.returncode == 2 and "Traceback" not in process.stderr, process.stderr
    assert "files tried could be read" in process.stderr
