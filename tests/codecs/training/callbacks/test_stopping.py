"""A signal ends a run after the update in which it came, with everything saved; until then the log has its progress."""

import logging
import os
import signal
from types import SimpleNamespace

import pytest
import pytorch_lightning as pl
import torch

from varitok.codecs.training.callbacks import stopping
from varitok.codecs.training.run import build_run

from ....composing import composed
from ...examples import QUIET, TINY_RUN

WORDS = [*TINY_RUN, *QUIET, "export=none", "updates=4", "training.log_every=1", "trainer.enable_progress_bar=true"]


class Send(pl.Callback):
    """Sends this process a signal in the second update."""

    def __init__(self, number):
        self.number = number

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if pl_module.update == 1:
            os.kill(os.getpid(), self.number)


@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT", "SIGUSR1"])
def test_a_signal_ends_the_run_with_its_update_saved(tmp_path, caplog, name):
    number, before = signal.Signals[name], signal.getsignal(signal.SIGINT)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell ignores it for what it starts in the background
    run = build_run(composed(*WORDS), tmp_path)
    run.trainer.callbacks.insert(0, Send(number))
    try:
        with caplog.at_level(logging.INFO), pytest.raises(SystemExit) as left:
            run.trainer.fit(run.module, run.data)
        assert signal.getsignal(number) in (signal.SIG_DFL, signal.default_int_handler)
    finally:
        signal.signal(signal.SIGINT, before)
    assert left.value.code == 128 + number
    assert torch.load(tmp_path / "checkpoints/last.ckpt", weights_only=True)["global_step"] == 2
    assert f"{name}: saved after update 2" in caplog.text
    assert "update 1/4  loss " in caplog.text and "updates/s" in caplog.text and "update 3/4" not in caplog.text


def test_a_second_interrupt_ends_at_once():
    callback = stopping.Stopping(SimpleNamespace())
    callback._receive(signal.SIGINT, None)
    with pytest.raises(KeyboardInterrupt):
        callback._receive(signal.SIGINT, None)


@pytest.mark.parametrize("status", [0, 1])
def test_slurm_is_asked_to_queue_the_job_again(tmp_path, monkeypatch, caplog, status):
    command = tmp_path / "scontrol"
    command.write_text(f'#!/bin/sh\necho "$@" > {tmp_path}/asked\necho "no such job" >&2\nexit {status}\n')
    command.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    monkeypatch.setenv("SLURM_JOB_ID", "17")
    stopping._queue_again()
    assert (tmp_path / "asked").read_text() == "requeue 17\n"
    assert ("could not queue job 17 again (no such job)" in caplog.text) == bool(status)
