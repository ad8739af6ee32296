"""Killed runs: checkpoints are written whole, and runs resume as if nothing had happened."""

import csv
import errno
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import pytorch_lightning as pl
import torch
from omegaconf import OmegaConf

from varitok import UserError
from varitok.codecs.training.callbacks.checkpoints import WholeFiles
from varitok.codecs.training.run import build_run

from ..examples import QUIET
from .test_training import ADVERSARIAL, RESIDUAL, compose, fit

ROOT = Path(__file__).parents[3]


def logged(folder):
    """Return the log in its order, without timings."""
    with (folder / "metrics.csv").open() as file:
        return [row for row in csv.reader(file) if not row[1].startswith(("checkpoint/", "speed/"))]


class Killed(pl.Callback):
    """Ends a run in the middle of an update."""

    def __init__(self, update):
        self.update = update

    def on_train_batch_start(self, trainer, pl_module, *_):
        if pl_module.update == self.update:
            raise RuntimeError("killed")


def killed(folder, update, *overrides):
    run = build_run(compose(*overrides), folder)
    run.trainer.callbacks.insert(0, Killed(update))
    with pytest.raises(RuntimeError, match="killed"):
        run.trainer.fit(run.module, run.data, ckpt_path=run.resume, weights_only=True)


@pytest.mark.slow
def test_a_killed_runs_log_is_that_of_an_undisturbed_one(tmp_path):
    # Readings of the log, evaluations and checkpoints all come at updates of their own.
    words = [
        *ADVERSARIAL,
        *RESIDUAL,
        "length=two_axes",
        "callbacks.samples=null",
        "updates=9",
        "training.log_every=4",
        "checkpoint.every=3",
        "callbacks.evaluation.every=2",
    ]
    fit(tmp_path / "whole", *words)
    for update in (2, 5, 7, 8):
        killed(tmp_path / "part", update, *words)
    fit(tmp_path / "part", *words)
    assert logged(tmp_path / "part") == logged(tmp_path / "whole")
    assert len(logged(tmp_path / "whole")) > 30


def test_a_finished_run_ends_once_more_without_a_further_update(tmp_path):
    words = ["callbacks.samples=null", "callbacks.evaluation.every=2"]
    fit(tmp_path, *words)
    before = logged(tmp_path)
    (tmp_path / "evaluation" / "evaluation.csv").unlink()
    again = fit(tmp_path, *words)
    assert again.module.update == 4 and logged(tmp_path) == before
    assert (tmp_path / "evaluation" / "evaluation.csv").is_file()


def test_a_run_does_not_begin_anew_over_another(tmp_path):
    fit(tmp_path, *QUIET)
    with pytest.raises(UserError, match="has a run already; resume it by resume=auto"):
        build_run(compose(*QUIET, "resume=none"), tmp_path)


def test_a_checkpoint_is_not_fetched(tmp_path):
    # Lightning would run what such a file says: it reads addresses with `weights_only=False`.
    for where in ("http://127.0.0.1:9/last.ckpt", "memory://last.ckpt"):
        with pytest.raises(UserError, match="no such checkpoint"):
            build_run(compose(*QUIET, f"resume={where}"), tmp_path)


def test_a_full_disk_leaves_the_last_checkpoint_and_the_run_goes_on(tmp_path, monkeypatch, caplog):
    saved, real = [], torch.save

    def save(what, file):
        saved.append(what["state_dict"]["updates"].item())
        if saved[-1] in (2, 3):
            file.write(b"some of it")
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        real(what, file)
        if saved[-1] == 3:
            pytest.fail("saved")

    monkeypatch.setattr(torch, "save", save)
    fit(tmp_path, *QUIET, "checkpoint.every=1", "updates=5")
    assert saved == [1, 2, 3, 4, 5]
    assert caplog.text.count("could not be saved (No space left on device); the last checkpoint is kept") == 2
    assert torch.load(tmp_path / "checkpoints/last.ckpt", weights_only=True)["state_dict"]["updates"] == 5
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["last.ckpt"]


def test_a_checkpoint_written_while_training_goes_on_is_of_its_update(tmp_path, monkeypatch):
    """As for a GPU: it is written from copies, and until it is in place the one before is there."""
    real, read = torch.save, []

    def save(what, file):
        update = int(what["state_dict"]["updates"])
        until = time.monotonic() + 60
        while update < 6 and run.module.update == update and time.monotonic() < until:
            time.sleep(0.001)  # the next update changes weights, moments and averages
        last = tmp_path / "True/checkpoints/last.ckpt"
        read.append(int(torch.load(last, weights_only=True)["state_dict"]["updates"]) if last.is_file() else 0)
        real(what, file)

    states = []
    for on_gpu in (False, True):
        if on_gpu:
            monkeypatch.setattr(torch, "save", save)
        words = ["updates=6", "checkpoint.every=2", "checkpoint.archive=2", "checkpoint.keep=null"]
        run = build_run(compose(*QUIET, *ADVERSARIAL, *words), tmp_path / str(on_gpu))
        run.trainer.strategy.checkpoint_io.on_gpu = on_gpu
        run.trainer.fit(run.module, run.data)
        files = sorted((tmp_path / str(on_gpu) / "checkpoints").glob("*.ckpt"))
        states.append({file.name: torch.load(file, weights_only=True) for file in files})
    assert read == [0, 2, 4]
    for name, state in states[0].items():
        for part in ("state_dict", "optimizer_states", "unread"):
            torch.testing.assert_close(states[1][name][part], state[part], rtol=0, atol=0)
    assert list(states[0]) == ["last.ckpt", *(f"update_000000{update}.ckpt" for update in (2, 4, 6))]


def test_a_disk_that_stays_full_ends_the_run_with_what_there_was(tmp_path, monkeypatch):
    real = torch.save

    def save(what, file):
        if what["state_dict"]["updates"] > 1:
            raise RuntimeError("PytorchStreamWriter failed writing file data/3: file write failed")
        real(what, file)

    monkeypatch.setattr(torch, "save", save)
    with pytest.raises(UserError, match=r"could not be saved 3 times in a row \(Pytorch.*free disk space, then resume"):
        fit(tmp_path, *QUIET, "checkpoint.every=1", "updates=9")
    assert torch.load(tmp_path / "checkpoints/last.ckpt", weights_only=True)["state_dict"]["updates"] == 1


def test_what_could_not_be_read_back_is_found_when_it_is_saved(tmp_path):
    files = WholeFiles()
    files.save_checkpoint({"weights": torch.ones(3)}, tmp_path / "a.ckpt")
    # It would be saved for days, and refused on the day of the resume.
    with pytest.raises(Exception, match="DictConfig"):
        files.save_checkpoint({"config": OmegaConf.create({"a": 1})}, tmp_path / "a.ckpt")
    assert "weights" in torch.load(tmp_path / "a.ckpt", weights_only=True)


def test_what_a_kill_leaves_half_written_is_cleared_away(tmp_path):
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints" / "last.ckpt.partial").write_bytes(b"half of")
    run = fit(tmp_path, *QUIET)
    assert run.resume is None and not [*tmp_path.rglob("*.partial")]


@pytest.mark.slow
def test_archived_and_best_checkpoints_stay(tmp_path):
    words = ["callbacks.samples=null", "checkpoint.every=1", "updates=6", "callbacks.evaluation.every=1"]
    fit(tmp_path, *words, "checkpoint.archive=2", "checkpoint.keep=2", "checkpoint.best=val/psnr@4")
    names = {path.name for path in (tmp_path / "checkpoints").iterdir()}
    assert names == {"last.ckpt", "best.ckpt", "update_0000004.ckpt", "update_0000006.ckpt"}
    values = {int(update): float(value) for update, name, value in logged(tmp_path)[1:] if name == "val/psnr@4"}
    best = torch.load(tmp_path / "checkpoints/best.ckpt", weights_only=True)
    assert int(best["state_dict"]["updates"]) == max(values, key=values.get)
    sizes = {name: float(value) for _, name, value in csv.reader((tmp_path / "metrics.csv").open()) if "/mega" in name}
    megabytes = (tmp_path / "checkpoints/last.ckpt").stat().st_size / 1e6
    assert sizes["checkpoint/megabytes"] == pytest.approx(megabytes, rel=0.01)
    with pytest.raises(UserError, match=r"checkpoint\.archive=3: must be a multiple of checkpoint\.every=2"):
        build_run(compose(*words, "checkpoint.every=2", "checkpoint.archive=3"), tmp_path / "other")
    for best in ("val/mos", "-1"):
        with pytest.raises(UserError, match=rf"checkpoint\.best={best}: no evaluation logs it; give one that does"):
            build_run(compose(*words, f"checkpoint.best={best}"), tmp_path / "other")
    with pytest.raises(UserError, match=r"checkpoint\.best=val/psnr@3: no evaluation logs it; they log val/psnr@1"):
        fit(tmp_path / "other", *words, "checkpoint.best=val/psnr@3")


PROGRAM = [sys.executable, str(ROOT / "train.py")]


def start(folder, *words, **environment):
    tiny = [*compose_words(), *QUIET, f"hydra.run.dir={folder}", *words]
    return subprocess.Popen(
        [*PROGRAM, *tiny],
        env=os.environ | {"OMP_NUM_THREADS": "1"} | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def compose_words():
    from .test_training import TINY

    return [*TINY, "updates=300", "training.log_every=2", "checkpoint.every=50"]


def wait_for(process, path, rows):
    until = time.monotonic() + 900
    while not path.is_file() or path.read_text().count("\n") < rows:
        assert process.poll() is None and time.monotonic() < until, process.communicate()[0]
        time.sleep(0.02)


@pytest.mark.slow
@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize(("name", "status"), [("SIGTERM", 143), ("SIGINT", 130), ("SIGUSR1", 138), ("SIGKILL", -9)])
def test_a_signal_costs_nothing(tmp_path, name, status, workers):
    words = [f"loader.workers={workers}", *ADVERSARIAL]
    whole = start(tmp_path / "whole", *words)
    part = start(tmp_path / "part", *words)
    wait_for(part, tmp_path / "part" / "metrics.csv", 100)
    os.killpg(part.pid, getattr(signal, name))  # as Ctrl-C and schedulers do, to its workers too
    shown, _ = part.communicate(timeout=900)
    assert part.returncode == status, shown
    if name != "SIGKILL":
        assert f"{name}: saved after update" in shown and "Traceback" not in shown
        stopped = int(torch.load(tmp_path / "part/checkpoints/last.ckpt", weights_only=True)["state_dict"]["updates"])
        assert f"saved after update {stopped}" in shown and 0 < stopped < 300
    again = start(tmp_path / "part", *words)
    assert again.wait(timeout=900) == 0, again.communicate()[0]
    assert whole.wait(timeout=900) == 0
    assert logged(tmp_path / "part") == logged(tmp_path / "whole")


@pytest.mark.slow
@pytest.mark.parametrize("to", ["first", "second", "all"])
def test_a_signal_to_any_of_several_processes_stops_all(tmp_path, to):
    words = ["trainer.devices=2", "trainer.strategy=ddp_find_unused_parameters_true", *ADVERSARIAL]
    whole = start(tmp_path / "whole", *words)
    assert whole.wait(timeout=900) == 0, whole.communicate()[0]
    part = start(tmp_path / "part", *words)
    wait_for(part, tmp_path / "part" / "metrics.csv", 100)
    if to == "all":
        os.killpg(part.pid, signal.SIGTERM)
    else:
        children = Path(f"/proc/{part.pid}/task/{part.pid}/children").read_text().split()
        os.kill(part.pid if to == "first" else int(children[0]), signal.SIGTERM)
    shown, _ = part.communicate(timeout=900)
    assert part.returncode in (143, -15) and "SIGTERM: saved after update" in shown, shown
    again = start(tmp_path / "part", *words)
    assert again.wait(timeout=900) == 0, again.communicate()[0]
    assert logged(tmp_path / "part") == logged(tmp_path / "whole")
