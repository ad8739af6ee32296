"""How fast a run is said to be."""

import csv
import logging

import pytest

from varitok.codecs.training.logging import throughput as pace
from varitok.codecs.training.logging.throughput import Throughput

from ...examples import QUIET
from ..test_training import fit

LOGGED = [*QUIET, "training.log_every=1"]


@pytest.fixture
def clock(monkeypatch):
    """A clock that is moved by hand."""

    class Clock:
        now = 100.0

    monkeypatch.setattr(pace.time, "perf_counter", lambda: Clock.now)
    return Clock


def batches(clock, measured, count, wait, work, other=0.0):
    """Wait for each batch, work on it, and do something else behind it."""
    for _ in range(count):
        clock.now += wait
        measured.arrive(8)
        clock.now += work + other
        measured.leave()


def test_waiting_is_what_lies_between_a_batch_and_the_next(clock):
    measured = Throughput()
    assert measured.read() == {}
    batches(clock, measured, 1, wait=60, work=1)  # the start of the workers isn't counted
    batches(clock, measured, 3, wait=0.5, work=1, other=0.5)
    assert measured.read() == pytest.approx({"speed/samples": 32 / 7.0, "speed/waiting": 1.5 / 7.0}, rel=1e-6)
    batches(clock, measured, 2, wait=0, work=2)
    assert measured.read() == pytest.approx({"speed/samples": 4.0, "speed/waiting": 0.0})


def test_a_run_that_waits_much_is_told_once(clock, caplog):
    measured = Throughput()
    batches(clock, measured, 9, wait=1, work=2)
    with caplog.at_level(logging.WARNING):
        measured.read()
        assert "training waits for data 31 % of its time: give more loader.workers" in caplog.text
        batches(clock, measured, 9, wait=1, work=2)
        measured.read()
    assert caplog.text.count("waits for data") == 1


def test_a_run_that_waits_little_is_told_nothing(clock, caplog):
    measured = Throughput()
    batches(clock, measured, 90, wait=1, work=9)
    measured.read()
    batches(clock, measured, 2, wait=1, work=0.1)  # too short to measure
    measured.read()
    assert not caplog.text


def test_a_run_logs_its_pace(tmp_path):
    fit(tmp_path, *LOGGED)
    with (tmp_path / "metrics.csv").open() as file:
        values = {name: float(value) for _, name, value in list(csv.reader(file))[1:]}
    assert values["speed/samples"] > 0 and 0 <= values["speed/waiting"] <= 1
