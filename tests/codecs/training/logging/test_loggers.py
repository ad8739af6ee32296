"""Loggers on bad days: a full disk, no network, a wrong key, a helper that dies. And what they hold on good ones."""

import csv
import errno
import json
import os
import signal
import subprocess
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
import wandb
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from wandb.proto import wandb_internal_pb2

from varitok import UserError
from varitok.codecs.modalities.media import write_mp4
from varitok.codecs.training.logging.loggers import CsvLog
from varitok.codecs.training.logging.scalars import read_scalars
from varitok.codecs.training.logging.tensorboard import TensorboardLog
from varitok.codecs.training.logging.wandb import WandbLog

from ...examples import QUIET
from ..test_survival import ADVERSARIAL, fit, killed, logged
from ..test_training import TINY

ROOT = Path(__file__).parents[4]


@pytest.fixture
def apart():
    """W&B with nothing that an earlier test has left, and leaving nothing."""
    wandb.teardown()
    yield
    wandb.teardown()


def records(folder):
    """Read all that W&B's offline files hold: LevelDB's logs, records in blocks of 32 KiB, behind a head of 7 bytes."""
    wandb.teardown()  # its helper writes behind
    for path in sorted(folder.glob("wandb/offline-run-*/*.wandb")):
        data, at, whole = path.read_bytes(), 7, b""
        while at + 7 <= len(data):
            if 32768 - at % 32768 < 7:
                at += 32768 - at % 32768
                continue
            length, kind = int.from_bytes(data[at + 4 : at + 6], "little"), data[at + 6]
            whole += data[at + 7 : at + 7 + length]
            at += 7 + length
            if kind in (1, 4):  # whole, or its last part
                yield wandb_internal_pb2.Record.FromString(whole)
                whole = b""


def histories(folder):
    for record in records(folder):
        if record.WhichOneof("record_type") == "history":
            yield {item.key or ".".join(item.nested_key): json.loads(item.value_json) for item in record.history.item}


def media(folder):
    """Make a picture, a sound and a clip."""
    picture = folder / "picture.png"
    Image.fromarray(np.arange(192, dtype=np.uint8).reshape(8, 8, 3)).save(picture)
    sound, clip = folder / "0.wav", folder / "1.mp4"
    soundfile.write(sound, np.sin(np.arange(800) / 9), 8000)
    write_mp4(clip, torch.randint(0, 256, (3, 5, 16, 16), dtype=torch.uint8), 8.0)
    return picture, {"0": sound, "1": clip}


def test_wandb_offline_holds_what_was_logged(tmp_path, monkeypatch, apart):
    monkeypatch.setenv("WANDB_MODE", "offline")
    (tmp_path / "provenance.json").write_text(json.dumps({"git": {"commit": "abc", "dirty": True}}))
    picture, files = media(tmp_path)
    log = WandbLog(str(tmp_path), "run")
    log.log_hyperparams({"optim": {"codec": {"lr": 0.5}}})
    log.log_metrics({"loss": 0.25, "health/used": 0.5}, 3)
    log.log_picture("samples", picture, 3)
    log.log_media("samples", files, 3)
    log.finalize("success")
    rows = list(histories(tmp_path))
    assert rows[0].items() >= {"loss": 0.25, "health/used": 0.5, "update": 3}.items()
    (held,) = tmp_path.glob("wandb/offline-run-*/files")
    kinds = {"samples": "image-file", "samples/0": "audio-file", "samples/1": "video-file"}
    originals = {"samples": picture, "samples/0": files["0"], "samples/1": files["1"]}
    found = {name: value for row in rows for name, value in row.items()}
    for name, kind in kinds.items():
        assert found[f"{name}._type"] == kind
        assert (held / found[f"{name}.path"]).read_bytes() == originals[name].read_bytes(), name
    config = {
        update.key: json.loads(update.value_json) for record in records(tmp_path) for update in record.run.config.update
    }
    assert config["optim"] == {"codec": {"lr": 0.5}} and config["provenance"]["git"] == {"commit": "abc", "dirty": True}
    assert [record.exit.exit_code for record in records(tmp_path) if record.WhichOneof("record_type") == "exit"] == [0]


@pytest.mark.parametrize(
    ("leaving", "status", "code", "preempted"),
    [
        (SystemExit(143), "failed", 143, True),
        (SystemExit(130), "failed", 130, False),
        (ValueError(), "failed", 1, False),
    ],
)
def test_wandb_gets_the_exit_status(tmp_path, monkeypatch, apart, leaving, status, code, preempted):
    monkeypatch.setenv("WANDB_MODE", "offline")
    log = WandbLog(str(tmp_path), "run")
    log.log_metrics({"loss": 1.0}, 1)
    try:
        raise leaving
    except BaseException:
        log.finalize(status)
    kinds = {record.WhichOneof("record_type"): record for record in records(tmp_path)}
    assert kinds["exit"].exit.exit_code == code and ("preempting" in kinds) is preempted


def test_wandb_survives_the_death_of_its_helper(tmp_path, monkeypatch, apart, caplog):
    monkeypatch.setenv("WANDB_MODE", "offline")
    log = WandbLog(str(tmp_path), "run")
    log.log_metrics({"loss": 1.0}, 1)
    helper = log.run._wl.assert_service()._proc._process
    helper.kill()
    helper.wait()
    for update in range(2, 40):
        log.log_metrics({"loss": 1.0}, update)
        time.sleep(0.01)
    assert log.failed and caplog.text.count("the run goes on") == 1
    log.finalize("success")


@pytest.fixture
def refusing():
    """A service that knows no key."""

    class Refusing(BaseHTTPRequestHandler):
        def do_POST(self):
            self.rfile.read(int(self.headers.get("content-length", 0)))
            self.send_response(401)
            self.send_header("content-length", "2")
            self.end_headers()
            self.wfile.write(b"{}")

        do_GET = do_POST

        def log_message(self, *_):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Refusing)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()


def test_a_wrong_key_ends_in_an_offline_run(tmp_path, monkeypatch, apart, caplog, refusing):
    monkeypatch.delenv("WANDB_MODE", raising=False)
    monkeypatch.setenv("WANDB_API_KEY", "a" * 40)
    monkeypatch.setenv("WANDB_BASE_URL", refusing)
    log = WandbLog(str(tmp_path), "run")
    log.log_metrics({"loss": 1.0}, 1)
    log.finalize("success")
    (line,) = [record.message for record in caplog.records if "could not start online" in record.message]
    assert "401" in line and "\n" not in line
    assert [row["loss"] for row in histories(tmp_path)] == [1.0]


def test_what_wandb_has_no_room_for_is_passed_over(tmp_path, caplog):
    (tmp_path / "wandb").mkdir()
    log = WandbLog(str(tmp_path), "run")
    taken = []

    class Run:
        def log(self, values):
            if "picture" in values:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            taken.append(values)

    log._run = Run()
    for update in range(3):
        log.log_metrics({"loss": 1.0}, update)
        log.log_metrics({"picture": 1.0}, update)
    assert [values["update"] for values in taken] == [0, 1, 2] and "skipped a record" in caplog.text


@pytest.mark.slow
def test_several_lives_send_nothing_twice_with_other_content(tmp_path, monkeypatch, apart):
    monkeypatch.setenv("WANDB_MODE", "offline")
    words = ["logger=wandb", "updates=9", "training.log_every=2", "checkpoint.every=3", "callbacks.evaluation.every=2"]
    for update in (4, 8):
        killed(tmp_path, update, *words)
        wandb.teardown()
    fit(tmp_path, *words)
    wandb.teardown()
    sent = {}
    for row in histories(tmp_path):
        for name, value in row.items():
            # Times differ, and paths have W&B's own count of steps.
            if not name.startswith(("_", "speed/", "checkpoint/")) and not name.endswith(".path"):
                sent.setdefault((row["update"], name), set()).add(value)
    assert not {key: values for key, values in sent.items() if len(values) > 1}
    names = {name for _, name, _ in logged(tmp_path)[1:]}
    assert {"data/samples", "data/epochs", "rate/tokens", "rate/bits", "health/used"} <= names
    assert {(int(update), name) for update, name, _ in logged(tmp_path)[1:]} <= sent.keys()
    # offline-run-TIME-ID; of two that begin in one second W&B calls the other offline-run-TIME-ID-1.
    assert len({path.name.split("-")[3] for path in tmp_path.glob("wandb/offline-run-*")}) == 1


def test_counters_count(tmp_path):
    fit(tmp_path, *QUIET, "data.length=12", "loader.batch_size=4")
    scalars = read_scalars(tmp_path / "metrics.csv")
    assert scalars["data/samples"] == {2: 8.0, 4: 16.0}
    assert scalars["data/epochs"][4] == pytest.approx(16 / 12)
    assert 1 <= scalars["rate/tokens"][4] <= 6
    assert scalars["rate/bits"][4] > scalars["rate/tokens"][4]


class Full:
    """A disk with `room` more bytes."""

    def __init__(self, monkeypatch, room):
        self.room = room
        real = Path.open

        def opened(path, mode="r", **options):
            file = real(path, mode, **options)
            if "a" not in mode:
                return file
            write = file.write

            class File:
                def __enter__(self):
                    return self

                def __exit__(self, *_):
                    file.close()

                def write(_, data):
                    write(data[: self.room])
                    if len(data) > self.room:
                        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

            return File()

        monkeypatch.setattr(Path, "open", opened)


@pytest.mark.parametrize("kind", [CsvLog, TensorboardLog])
def test_rows_wait_for_room_on_a_full_disk(tmp_path, monkeypatch, caplog, kind):
    log = kind(str(tmp_path), "run")
    log.log_metrics({"loss": 1.0, "lr": 0.1}, 1)
    disk = Full(monkeypatch, 7)
    log.log_metrics({"loss": 2.0}, 2)
    log.log_metrics({"loss": 3.0}, 3)
    assert losses(tmp_path, kind) == {1: 1.0}
    assert caplog.text.count("No space left on device") == 1
    disk.room = 10**6
    log.log_metrics({"loss": 4.0}, 4)
    assert losses(tmp_path, kind) == {1: 1.0, 2: 2.0, 3: 3.0, 4: 4.0}


def test_pictures_and_tables_that_find_no_room_do_not_end_a_run(tmp_path, monkeypatch, caplog):
    def full(*_, **__):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("varitok.codecs.modalities.image.Image.write_samples", full)
    monkeypatch.setattr("varitok.codecs.evaluation.table.Table.write_csv", full)
    assert fit(tmp_path).module.update == 4
    assert "samples/update_0000002: can't be written (No space left on device); the run goes on" in caplog.text
    assert "evaluation: can't be written (No space left on device)" in caplog.text


def losses(folder, kind):
    if kind is CsvLog:
        return read_scalars(folder / "metrics.csv")["loss"]
    return {event.step: event.value for event in accumulated(folder).Scalars("loss")}


def accumulated(folder):
    events = EventAccumulator(str(folder / "tensorboard"), size_guidance={"scalars": 0, "images": 0, "audio": 0})
    events.Reload()
    return events


def test_tensorboard_holds_what_was_logged(tmp_path):
    picture, files = media(tmp_path)
    log = TensorboardLog(str(tmp_path), "run")
    log.log_metrics({"loss": 0.25}, 3)
    log.log_picture("samples", picture, 3)
    log.log_media("samples", files, 3)
    events = accumulated(tmp_path)
    assert [(event.step, event.value) for event in events.Scalars("loss")] == [(3, 0.25)]
    assert events.Images("samples")[0].encoded_image_string == picture.read_bytes()
    assert events.Audio("samples/0")[0].encoded_audio_string == files["0"].read_bytes()
    clip = Image.open(BytesIO(events.Images("samples/1")[0].encoded_image_string))
    assert clip.n_frames == 5 and clip.size == (16, 16)


@pytest.mark.slow
def test_a_killed_runs_tensorboard_is_that_of_an_undisturbed_one(tmp_path):
    words = ["logger=tensorboard", *ADVERSARIAL, "updates=7", "training.log_every=2", "checkpoint.every=3"]
    words += ["callbacks.evaluation.every=2", "callbacks.samples.every=3"]
    fit(tmp_path / "whole", *words)
    killed(tmp_path / "part", 5, *words)
    (events,) = (tmp_path / "part/tensorboard").iterdir()
    events.write_bytes(events.read_bytes()[:-5])  # as a kill may leave it
    fit(tmp_path / "part", *words)
    found = [
        {
            tag: [(event.step, event.value) for event in events.Scalars(tag)]
            for tag in sorted(events.Tags()["scalars"])
            if not tag.startswith(("checkpoint/", "speed/"))
        }
        for events in map(accumulated, (tmp_path / "whole", tmp_path / "part"))
    ]
    assert found[0] == found[1] and len(found[0]) > 20
    assert [event.step for event in accumulated(tmp_path / "part").Images("samples")] == [3, 6, 7]


def test_tensorboard_without_its_package_is_one_line(tmp_path, monkeypatch):
    for name in [name for name in sys.modules if name.partition(".")[0] == "tensorboard"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "tensorboard", None)
    with pytest.raises(UserError, match=r"needs the package tensorboard.*pip install 'varitok\[tensorboard\]'"):
        TensorboardLog(str(tmp_path), "run")


def test_a_damaged_file_of_scalars_is_one_line(tmp_path):
    CsvLog(str(tmp_path), "run").log_metrics({"loss": 1.0}, 1)
    with (tmp_path / "metrics.csv").open("a") as file:
        file.write("2,lo")
    assert read_scalars(tmp_path / "metrics.csv") == {"loss": {1: 1.0}}
    with (tmp_path / "metrics.csv").open("a") as file:
        file.write("ss,much\n")
    with pytest.raises(UserError, match=r"metrics\.csv: not the log of a run"):
        read_scalars(tmp_path / "metrics.csv")


def train(folder, *words, before=(), **environment):
    """Run `train.py` as a user does; gives its exit status and what it said."""
    clean = {key: value for key, value in os.environ.items() if not key.startswith("WANDB_")}
    command = [*before, sys.executable, str(ROOT / "train.py"), *TINY, *words, f"hydra.run.dir={folder}"]
    done = subprocess.run(
        command, check=False, capture_output=True, text=True, timeout=900, env=clean | environment, cwd=folder.parent
    )
    return done.returncode, done.stdout + done.stderr


@pytest.mark.slow
def test_a_run_ends_well_whatever_becomes_of_wandb(tmp_path, refusing):
    words = ["updates=40", "training.log_every=1", "checkpoint.every=20"]
    assert train(tmp_path / "plain", *words)[0] == 0
    key = {"WANDB_API_KEY": "a" * 40}
    for name, environment in {
        "offline": {"WANDB_MODE": "offline"},
        "blocked": key | {"WANDB_BASE_URL": "http://127.0.0.1:9"},
        "wrong": key | {"WANDB_BASE_URL": refusing},
        "none": {"HOME": str(tmp_path)},
    }.items():
        status, shown = train(tmp_path / name, *words, "logger=wandb", **environment)
        assert status == 0 and "Traceback" not in shown, shown
        assert logged(tmp_path / name) == logged(tmp_path / "plain")
        assert {row["update"] for row in histories(tmp_path / name)} == set(range(1, 41)), name
        assert (tmp_path / name / "evaluation/evaluation.csv").is_file()
        assert any("samples.path" in row for row in histories(tmp_path / name))


@pytest.mark.slow
def test_a_run_ends_well_though_wandbs_helper_is_killed(tmp_path):
    words = ["updates=400", "training.log_every=1", "checkpoint.every=200", "logger=wandb"]
    environment = os.environ | {"WANDB_MODE": "offline"}
    command = [sys.executable, str(ROOT / "train.py"), *TINY, *words, f"hydra.run.dir={tmp_path}"]
    run = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    while not (tmp_path / "wandb/sent").is_file():
        assert run.poll() is None
        time.sleep(0.05)
    children = " ".join(path.read_text() for path in Path(f"/proc/{run.pid}/task").glob("*/children")).split()
    (helper,) = [child for child in children if "wandb-core" in Path(f"/proc/{child}/cmdline").read_text()]
    os.kill(int(helper), signal.SIGKILL)
    shown, _ = run.communicate(timeout=900)
    assert run.returncode == 0 and "WandbLog stopped logging" in shown and "Traceback" not in shown, shown
    with (tmp_path / "metrics.csv").open() as file:
        assert {int(row["update"]) for row in csv.DictReader(file)} == set(range(1, 401))


# A small file system of its own, filled to the last byte when the run logs, emptied when it has said so.
FILLED = """
mount -t tmpfs -o size=4m none {disk}
(until [ -s {disk}/run/wandb/sent ]; do sleep 0.1; done; cat /dev/zero > {disk}/filler 2> /dev/null
 until grep -q "until there is room" {kept}/said; do sleep 0.1; done; rm {disk}/filler) &
"$0" "$@" > {kept}/said 2>&1
status=$?
cp {disk}/run/metrics.csv {kept}
exit $status
"""


@pytest.mark.slow
def test_a_run_ends_well_on_a_disk_that_was_full(tmp_path):
    disk, kept = tmp_path / "disk", tmp_path / "kept"
    disk.mkdir()
    kept.mkdir()
    before = ["unshare", "-rm", "sh", "-c"]
    if subprocess.run([*before, f"mount -t tmpfs none {disk}"], check=False, capture_output=True).returncode:
        pytest.skip("no file system can be made here")
    words = ["updates=400", "callbacks.samples.every=10", "checkpoint.every=400", "logger=wandb"]
    script = FILLED.format(disk=disk, kept=kept)
    status, _ = train(disk / "run", *words, before=[*before, script], WANDB_MODE="offline")
    said = (kept / "said").read_text()
    assert status == 0 and "rows are kept until there is room" in said and "Traceback" not in said, said
    assert set(read_scalars(kept / "metrics.csv")["loss"]) == set(range(2, 401, 2))
